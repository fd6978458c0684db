"""The arguments of each command, and the checks that need neither jax nor a model: help and mistakes cost 0.2 s."""
