"""Write and read saves on disk: arrays by path, and a sealed record of them.

A save is a folder `<run folder>/checkpoints/<step>`. `names.py` names the folders, `arrays.py` writes and reads arrays
with Orbax, `seal.py` detects damage, and `reader.py` finds the newest whole save. Nothing here depends on the meaning
of the arrays.
"""
