"""The choice of the next token from its logits. Start reading at `choose.py`."""
