"""Write tests/golden/hf: a small model of every architecture as transformers saves it, and the logits it then has.

Run with the extra `hf` installed: `python -m tests.hub.make_hf_goldens`, from the top folder. Answers are float32
numbers of torch on a CPU; they differ in the last bits between machines, which the tests' tolerance allows for.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .hub import GOLDEN, MODELS, hub_values_of, tokens_of


def build(name: str) -> Any:
    """Return a model of transformers with every parameter drawn, biases and norms too, and those of routers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = hub_values_of(name)
    kind, dtype = values.pop("model_type"), values.pop("dtype", "float32")
    config = AutoConfig.for_model(kind, **values, attn_implementation="eager", bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        biases = [named for named in model.named_buffers() if named[0].endswith("e_score_correction_bias")]
        for leaf_name, leaf in (*model.named_parameters(), *biases):
            drawn = torch.randn(leaf.shape, generator=noise) * (0.1 if leaf.ndim == 1 else 0.3)
            leaf.copy_(drawn + 1 if "norm" in leaf_name or ("ln_" in leaf_name and "weight" in leaf_name) else drawn)
    return model.eval()


def answer(folder: Path) -> np.ndarray:
    """Return the logits that transformers has for a folder, in float32 whatever type the weights are of."""
    import torch
    from transformers import AutoModelForCausalLM

    # Its own type would round the tables of rotary positions along with the weights.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens_of(), dtype=torch.long)).logits.numpy()


def save(name: str, folder: Path) -> np.ndarray:
    """Save a model of `MODELS` in several files and return its logits."""
    build(name).save_pretrained(folder, max_shard_size="16KB")
    return answer(folder)


def main() -> None:
    """Write all of them."""
    for name in MODELS:
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        logits = save(name, GOLDEN / name)
        np.save(GOLDEN / name / "logits.npy", logits)


if __name__ == "__main__":
    main()
