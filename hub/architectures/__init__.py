"""List the Hugging Face architectures that trellax reads and writes, each a value of `Architecture`.

To add one, write a file beside `llama.py` with a value of `LlamaFamily` (or a subclass of `Architecture`, as in
`gpt2.py`), and add the value to `_ALL`. Nothing here imports jax.
"""

from .architecture import Architecture
from .deepseek_v2 import DEEPSEEK_V2
from .deepseek_v3 import DEEPSEEK_V3
from .dots1 import DOTS1
from .glm4_moe import GLM4_MOE
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .with_options.gemma2 import GEMMA2
from .with_options.gemma3 import GEMMA3
from .with_options.gpt_oss import GPT_OSS
from .with_options.granite import GRANITE
from .with_options.olmo2 import OLMO2
from .with_options.olmo3 import OLMO3
from .with_options.phi3 import PHI3
from .with_options.smollm3 import SMOLLM3

_ALL: tuple[Architecture, ...] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE),
    *(DEEPSEEK_V2, DEEPSEEK_V3, DOTS1, GLM4_MOE, GPT2),
    *(OLMO2, GRANITE, SMOLLM3, PHI3, GEMMA2, GEMMA3, GPT_OSS, OLMO3),
)

ARCHITECTURES = {one.model_type: one for one in _ALL}
"""All architectures by `model_type`, in the order in which messages list them."""
