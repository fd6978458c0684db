"""The architectures of Hugging Face models that trellax reads and writes, one value each.

To add one, write a file beside `llama.py` with a value of `LlamaFamily` (or an implementation of `Architecture`, as in
`gpt2.py`), and add the value to `ARCHITECTURES`. Nothing here imports jax.
"""

from .architecture import Architecture
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3

_ALL: tuple[Architecture, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)

ARCHITECTURES = {one.model_type: one for one in _ALL}
"""Every architecture by its `model_type`, in the order in which messages name them."""
