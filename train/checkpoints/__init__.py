"""Save and restore the state of a run, on any mesh.

`store.py` writes, seals and prunes saves and depends on no trainer; `layer_order.py` converts a state to arrays that do
not depend on the mesh; `checkpoints.py` combines the two; `initial_weights.py` initializes a run from given weights.
The format on the disk, and reading it without a trainer, are in `../../hub/saves/`.
"""
