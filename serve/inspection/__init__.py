"""What an engine's programs take on each device: the bytes that must be read, memory, kernels and time."""
