"""The loss of preferences between two answers (DPO). Start reading at `dpo.py`."""
