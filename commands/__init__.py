"""Implement the command line: `registry.py` lists the commands, `cli.py` runs them, and each has a file."""
