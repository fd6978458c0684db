"""Weights that are kept split over devices, and gathered for use. Start reading at `sharded.py`."""
