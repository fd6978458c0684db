"""Checkpoints of a run: a store that knows no trainer, and what this trainer saves in it.

`store.py` writes, seals and keeps (step, arrays by path, record); `layer_order.py` turns a state into arrays that any
mesh can read; `checkpoints.py` joins the two; `initial_weights.py` begins a run with given weights. The format on the
disk, and reading it without a trainer, are in `../../hub/saves/`.
"""
