"""The frozen reference of preference training. Start reading at `reference.py`."""
