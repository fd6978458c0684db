"""The cost model: time and memory of a layout, from one layer to one training step."""
