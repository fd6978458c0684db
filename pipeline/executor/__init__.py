"""The executor: one jitted program that runs any schedule over any stage functions."""
