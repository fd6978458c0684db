"""The cost model: time, memory and traffic of one layout. Read `layout.py` and `runtime.py` first."""
