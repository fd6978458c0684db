"""The command line: `registry.py` lists the commands, and each has a file."""
