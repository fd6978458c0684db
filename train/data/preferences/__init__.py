"""Pairs of answers to a prompt, chosen and rejected. Start reading at `pairs.py`."""
