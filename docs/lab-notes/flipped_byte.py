"""A flipped byte in a safetensors file is loaded without a word."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

save_file({"weight": np.zeros(4, np.float32)}, "weight.safetensors")
data = bytearray(Path("weight.safetensors").read_bytes())
data[-1] ^= 64  # the last byte of the last number
Path("weight.safetensors").write_bytes(data)
print(load_file("weight.safetensors")["weight"])
