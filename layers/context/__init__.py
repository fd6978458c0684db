"""Attention over sequences whose tokens are split over a context axis, and over several documents in a sequence."""
