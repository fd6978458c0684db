"""Compute the loss of any model on any files."""
