"""The training steps that the benchmark compiles: for each the settings before, and candidates for after."""

from dataclasses import dataclass

Settings = dict[str, str | int]
"""Keys of a config and their values, those of `mesh` and `pipeline` without the section."""

PLAIN: Settings = {"sequence": "off", "shard": "none", "remat": "full", "overlap": "off", "schedule": "1f1b"}
"""Settings of the table in issue 19: none of its mechanisms, and no steady state."""

_SECTIONS = {
    "shard": "train",
    "batch_size": "train",
    "data": "mesh",
    "tensor": "mesh",
    "pipe": "mesh",
    "sequence": "mesh",
}

_LLAMA_405B = (
    "llama3-70b-64gpu --model.num_layers 128 --model.hidden_size 16384 --model.num_heads 128 --model.ffn_size 53248 "
    "--train.batch_size 1024"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a machine, its settings before and after, and the most seconds that the best step may take."""

    name: str
    config: str
    target: str
    limit_s: float | None
    before: Settings | None
    candidates: tuple[Settings, ...]


def _layout(data: int, tensor: int, pipe: int, **more: str | int) -> Settings:
    return {"data": data, "tensor": tensor, "pipe": pipe, **more}


CASES = (
    Case(
        name="70B, 64 H100",
        config="llama3-70b-64gpu",
        target="h100:64/8",
        limit_s=8.2,
        before=PLAIN,
        candidates=(
            _layout(1, 8, 8, remat="dots"),
            _layout(1, 8, 8, remat="dots", schedule="interleaved-1f1b", chunks=2),
            _layout(1, 8, 8, remat="dots", schedule="zb-h1"),
            _layout(2, 8, 4, remat="dots", shard="step", microbatches=32),
            _layout(2, 8, 4, remat="dots", shard="step", microbatches=16, schedule="interleaved-1f1b", chunks=4),
            _layout(2, 8, 4, remat="dots", shard="step", microbatches=32, schedule="interleaved-1f1b", chunks=4),
            _layout(16, 4, 1, remat="dots", shard="layer", microbatches=4),
            _layout(64, 1, 1, remat="full", shard="layer", microbatches=1),
        ),
    ),
    Case(
        name="405B, 1,024 H200",
        config=_LLAMA_405B,
        target="h200:1024/8",
        limit_s=48.0,
        before={**_layout(8, 8, 16, microbatches=128), **PLAIN},
        candidates=(
            _layout(8, 8, 16, remat="dots", shard="step", microbatches=128),
            _layout(8, 8, 16, remat="dots", shard="step", microbatches=128, schedule="interleaved-1f1b", chunks=4),
            _layout(16, 8, 8, remat="dots", shard="step", microbatches=64),
            _layout(16, 8, 8, remat="dots", shard="step", microbatches=64, schedule="interleaved-1f1b", chunks=4),
            _layout(256, 4, 1, remat="dots", shard="layer", microbatches=4),
        ),
    ),
    Case(
        name="8B, 8 H200",
        config="llama3-8b-8gpu",
        target="h200:8",
        limit_s=6.0,
        before=PLAIN,
        candidates=(
            _layout(1, 4, 2, remat="dots"),
            _layout(1, 1, 8, remat="dots"),
            _layout(1, 1, 8, remat="none", schedule="interleaved-1f1b", chunks=4),
            _layout(2, 1, 4, remat="none", shard="step", microbatches=32, schedule="interleaved-1f1b", chunks=4),
            _layout(4, 1, 2, remat="none", shard="step", microbatches=16, schedule="interleaved-1f1b", chunks=4),
            _layout(8, 1, 1, remat="none", shard="layer", microbatches=4),
            _layout(8, 1, 1, remat="dots", shard="layer", microbatches=4),
            _layout(8, 1, 1, remat="dots", shard="step", microbatches=8),
        ),
    ),
    Case(
        name="8B data=8, 8 H100",
        config="llama3-8b-8gpu",
        target="h100:8",
        limit_s=None,
        before={**_layout(8, 1, 1, microbatches=8), **PLAIN, "shard": "optimizer"},
        candidates=(
            _layout(8, 1, 1, remat="dots", shard="layer", microbatches=8),
            _layout(8, 1, 1, remat="full", shard="layer", microbatches=8),
        ),
    ),
)


def overrides(settings: Settings) -> list[str]:
    """Return settings as words of a command line: `--mesh.data`, `8`, ..."""
    words = []
    for key, value in settings.items():
        words += [f"--{_SECTIONS.get(key, 'pipeline')}.{key}", str(value)]
    return words


def label(settings: Settings) -> str:
    """Return settings in one line: `1x8x8 dots zb-h1`."""
    mesh = "x".join(str(settings[axis]) for axis in ("data", "tensor", "pipe")) if "data" in settings else ""
    rest = [f"{key}={value}" for key, value in settings.items() if key not in ("data", "tensor", "pipe")]
    return " ".join([mesh, *rest]).strip()
