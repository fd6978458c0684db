"""Training data: corpora as rows of tokens, and batches by step number."""
