"""A run of many processes: what they must have in common, and how they watch each other."""
