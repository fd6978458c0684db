"""Tokenize files once into memory-mapped shards with an index."""
