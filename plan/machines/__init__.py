"""Machines: accelerators, their links, and the time of their kernels and collectives."""
