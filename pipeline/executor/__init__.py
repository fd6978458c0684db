"""The executor: one jitted program that runs any schedule on any stage functions. Start reading at `grads.py`."""
