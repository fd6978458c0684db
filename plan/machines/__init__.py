"""Machines: accelerators, their links, and how fast they multiply, read memory and communicate."""
