"""Guess the next tokens of answers, and let the model check several in one pass. Start reading at `speculate.py`."""
