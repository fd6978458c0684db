"""Adapters in the files of the package `peft`. Start reading at `names.py`."""
