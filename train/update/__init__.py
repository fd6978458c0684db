"""Update parameters from gradients: clipping, AdamW or Muon, an average of the weights, moments on the device or host.

`optimizer.py` builds the transformation of optax, `muon.py` its part for kernels; `offload.py` applies it.
"""
