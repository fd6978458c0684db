"""Measure the machine at hand for the planner: products, copies and collectives. Read `measure.py` first."""
