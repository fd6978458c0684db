"""Attention whose keys and values come from one small vector of each token. Start reading at `attention.py`."""
