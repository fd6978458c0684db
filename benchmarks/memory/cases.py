"""The training steps whose planned memory is compared with their compiled programs: every layout that trellax has.

A case is a packaged config and overrides of it, for H200. Short models serve where the number of layers changes nothing
but how often a buffer is there. Read `run.py` next.
"""

from dataclasses import dataclass

from trellax.configs import load_config
from trellax.configs.run_config import RunConfig

ACCELERATOR = "h200"

_DENSE = "llama3-8b-8gpu"
_LATENT = "deepseek-v2-lite-8gpu"
_EXPERTS = "qwen3-30b-a3b-8gpu"
_ROOT = {"shard": "train", "offload": "train", "batch": "train", "seq": "data", "kind": "optimizer"}
_MESH = ("data", "tensor", "pipe", "context", "expert", "context_expert", "sequence")
_PIPELINE = ("schedule", "chunks", "microbatches", "remat", "vocab", "context_attention", "overlap")
_KEYS = {"train.batch": "train.batch_size", "data.seq": "data.seq_len"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to compile: the kind of layout, a packaged config, and its overrides."""

    kind: str
    config: str
    settings: str

    @property
    def name(self) -> str:
        """The case in one line."""
        return f"{self.config} {self.settings}"

    @property
    def words(self) -> list[str]:
        """The overrides as words of a command line."""
        found = []
        for setting in self.settings.split():
            key, value = setting.split("=", maxsplit=1)
            found += [f"--{_full_key(key)}", value]
        return found

    def load(self) -> RunConfig:
        """Return the config with its overrides."""
        return load_config(self.config, self.words)


def _full_key(key: str) -> str:
    """Return a key with its section; those of the model need none."""
    section = "mesh" if key in _MESH else "pipeline" if key in _PIPELINE else _ROOT.get(key, "model")
    return _KEYS.get(f"{section}.{key}", f"{section}.{key}")


def _cases(kind: str, config: str, *settings: str) -> list[Case]:
    return [Case(kind=kind, config=config, settings=one) for one in settings]


_ALONE = "data=8 tensor=1 pipe=1"
_DEEP = "tensor=1 pipe=8"
_LONG = "seq=32768 max_tokens=32768"

CASES: tuple[Case, ...] = (
    *_cases(
        "data",
        _DENSE,
        f"{_ALONE} shard=layer remat=none microbatches=4",
        f"{_ALONE} shard=layer remat=dots microbatches=4",
        f"{_ALONE} shard=layer remat=full microbatches=1",
        f"{_ALONE} shard=step remat=dots microbatches=8",
        f"{_ALONE} shard=optimizer remat=full microbatches=8",
        f"{_ALONE} shard=none remat=dots microbatches=8 num_layers=8",
    ),
    *_cases(
        "tensor",
        _DENSE,
        "tensor=8 pipe=1 remat=full microbatches=16",
        "tensor=8 pipe=1 remat=dots microbatches=16 sequence=off",
        "data=2 tensor=4 pipe=1 remat=none microbatches=16 shard=layer",
        "data=4 tensor=2 pipe=1 remat=dots microbatches=8 shard=optimizer",
    ),
    *_cases(
        "pipe, 1F1B",
        _DENSE,
        "remat=full",
        "remat=dots sequence=off",
        f"{_DEEP} remat=dots",
        f"{_DEEP} remat=none schedule=gpipe microbatches=8 num_layers=8",
        "data=2 tensor=2 pipe=2 remat=dots shard=step microbatches=16",
        "data=4 tensor=1 pipe=2 remat=full shard=layer microbatches=8",
        "data=2 tensor=1 pipe=4 remat=full shard=optimizer microbatches=16 vocab=ends",
    ),
    *_cases(
        "pipe, chunks",
        _DENSE,
        f"{_DEEP} remat=dots schedule=interleaved-1f1b chunks=2",
        "data=2 tensor=1 pipe=4 remat=none shard=step microbatches=32 schedule=interleaved-1f1b chunks=4",
        "tensor=2 pipe=4 remat=dots schedule=interleaved-1f1b chunks=2 microbatches=32",
    ),
    *_cases(
        "pipe, split backward",
        _DENSE,
        f"{_DEEP} remat=dots schedule=zb-h1",
        "tensor=2 pipe=4 remat=none schedule=zb-h1 microbatches=32",
        "tensor=1 pipe=4 data=2 remat=dots schedule=zb-v chunks=2 microbatches=16 shard=optimizer",
        f"{_DEEP} remat=dots schedule=v-half chunks=2",
        "tensor=2 pipe=4 remat=full schedule=v-min chunks=2 microbatches=32",
    ),
    *_cases(
        "context",
        _DENSE,
        "data=4 tensor=1 pipe=1 context=2 remat=dots shard=layer microbatches=4",
        "tensor=2 pipe=1 context=4 remat=full shard=step seq=32768 max_tokens=32768 batch=8 microbatches=4",
        "tensor=1 pipe=1 context=8 remat=full shard=layer seq=131072 max_tokens=131072 batch=2 microbatches=1",
        "tensor=1 pipe=4 context=2 remat=dots microbatches=16",
    ),
    *_cases(
        "experts",
        _EXPERTS,
        "data=2 expert=4 num_layers=12",
        "data=1 expert=8 shard=step remat=dots microbatches=4 num_layers=12",
        "data=4 expert=2 microbatches=2 num_layers=6",
        "data=1 expert=4 tensor=2 microbatches=4 num_layers=12 shard=step",
        "data=1 expert=4 pipe=2 shard=step microbatches=8 num_layers=12",
    ),
    *_cases(
        "experts, context",
        _EXPERTS,
        "data=1 expert=1 context_expert=8 seq=131072 max_tokens=131072 batch=1 num_layers=12",
        f"data=1 expert=2 context=2 context_expert=2 {_LONG} batch=8 microbatches=2 shard=step remat=dots num_layers=6",
        f"data=1 expert=1 context_expert=4 tensor=2 {_LONG} batch=4 microbatches=2 shard=step num_layers=6",
    ),
    *_cases(
        "experts, latents",
        _LATENT,
        "data=4 expert=2",
        "data=1 expert=8 remat=dots microbatches=4 num_layers=9",
        "data=2 expert=4 shard=step microbatches=2 num_layers=9",
    ),
    *_cases(
        "fp8",
        _DENSE,
        "matmuls=fp8 remat=dots",
        f"matmuls=fp8 {_ALONE} shard=layer remat=full microbatches=4",
    ),
    *_cases(
        "adapters",
        _DENSE,
        f"lora_rank=16 {_ALONE} remat=dots microbatches=8",
        "lora_rank=16 tensor=2 pipe=4 remat=full microbatches=32",
    ),
    *_cases(
        "Muon",
        _DENSE,
        f"kind=muon {_ALONE} shard=step remat=dots microbatches=8",
        "kind=muon tensor=4 pipe=2 remat=full",
    ),
    *_cases(
        "offload",
        _DENSE,
        f"offload=optimizer {_ALONE} shard=layer remat=dots microbatches=8",
        "offload=residuals tensor=2 pipe=4 remat=dots microbatches=32",
    ),
)
