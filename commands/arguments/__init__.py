"""Declare and check the arguments of each command without importing jax, so that help and mistakes take 0.2 s."""
