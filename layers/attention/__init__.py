"""Attention over a sequence or over a cache, and what it costs. Start reading at `attention.py`."""
