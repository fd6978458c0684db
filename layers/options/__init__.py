"""Choices that a few architectures make: norms over all heads, factors, caps of scores, attention by layer."""
