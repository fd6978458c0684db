"""Low-rank adapters on frozen linear layers. Start reading at `adapter.py`."""
