"""Architectures that are Llama with choices of `layers/options/`, or with tensors that files join."""
