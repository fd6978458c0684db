"""Models as pipeline stages: the stage protocol, the order of layers, balance, and our own transformer cut."""
