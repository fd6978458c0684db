"""The time of a GPU program by a stated model: what overlaps, what waits, and what communication is exposed."""
