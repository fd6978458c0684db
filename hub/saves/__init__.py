"""The format of a save on disk: arrays by path, and a sealed record of them.

A save is a folder `<run folder>/checkpoints/<step>`. `names.py` says what the names of folders mean, `arrays.py` writes
and reads arrays with Orbax, `seal.py` finds damage, and `reader.py` returns the newest whole save. Nothing here knows
what the arrays are of.
"""
