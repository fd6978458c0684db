"""Load corpora as arrays of tokens, and cut batches out of them by step number."""
