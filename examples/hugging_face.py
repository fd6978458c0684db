"""Read a Hugging Face model onto a mesh, write it back, compare every bit, and answer with it.

Run:     python examples/hugging_face.py [FOLDER]     (without a folder: a tiny random Llama; about 20 seconds)
Expect:  "0 of N tensors differ".
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trellax.hub import read_hub_model, read_weights, write_weights
from trellax.meshes import MeshSpec, build_mesh, use_fake_devices
from trellax.serve import Engine, Request, param_shapes

use_fake_devices(4)


# --8<-- [start:tiny]
def write_tiny_llama(folder: Path) -> Path:
    """Write a two-layer Llama of random weights whose tokens are bytes, as `transformers` would save it."""
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "dtype": "float32"}
    config |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    shapes = {"model.embed_tokens": (256, 64), "model.norm": (64,), "lm_head": (256, 64)}
    for layer in (f"model.layers.{number}" for number in range(2)):
        shapes |= {f"{layer}.input_layernorm": (64,), f"{layer}.post_attention_layernorm": (64,)}
        shapes |= {f"{layer}.self_attn.{name}_proj": (64, 64) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (32, 64) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (128, 64) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (64, 128)}
    draw = np.random.default_rng(0).standard_normal
    tensors = {f"{name}.weight": 0.1 * draw(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# --8<-- [end:tiny]


source = Path(sys.argv[1]) if len(sys.argv) > 1 else write_tiny_llama(Path("tiny-llama-hf"))

# --8<-- [start:read]
model = read_hub_model(source)  # config.json alone
mesh = build_mesh(MeshSpec(tensor=2, pipe=2))
shapes = param_shapes(model.config, mesh=mesh, dtype="float32")  # with shardings; nothing is read yet
params = read_weights(source, shapes)  # each device reads its own part
print(f"{model.architecture}: query kernels {params['blocks']['attention']['query']['kernel'].sharding.spec}")
# --8<-- [end:read]

# --8<-- [start:write]
write_weights(params, model.config, "tiny-llama-back", architecture=model.architecture)
before, after = load_file(source / "model.safetensors"), load_file("tiny-llama-back/model.safetensors")
different = [name for name in before | after if not np.array_equal(before[name], after[name])]
print(f"{len(different)} of {len(before)} tensors differ")
# --8<-- [end:write]

# --8<-- [start:answer]
engine = Engine(model.config, params, mesh=mesh, slots=2, max_tokens=32)  # the engine takes the arrays over
for answer in engine.generate([Request(prompt=(1, 2, 3), max_new_tokens=5), Request(prompt=(4,), max_new_tokens=5)]):
    print(answer)
# --8<-- [end:answer]
