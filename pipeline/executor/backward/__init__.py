"""The backward of a layer, cut out of one trace: residuals, and its halves. Start reading at `traced_vjp.py`."""
