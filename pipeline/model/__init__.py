"""Models cut into pipeline stages: the stage protocol, the order of layers, balancing, and our own transformer."""
