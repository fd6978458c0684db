"""Checks of a pipeline's arguments and functions, from types and shapes, before anything runs."""
