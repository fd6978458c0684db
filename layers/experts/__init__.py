"""Mixtures of experts: feed-forward layers of which each token uses a few. Start reading at `moe.py`."""
