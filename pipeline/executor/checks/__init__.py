"""Checks of what a pipeline is given, made from types and shapes before anything runs."""
