"""Define the abstract `Architecture`: it converts config.json to a `ModelConfig` and back, and names the tensors.

Reading takes three steps, called by `../config.py`:

    config.json --resolve_keys--> one value a key --find_unsupported_*--> errors, or --read--> ModelConfig fields

Read `llama_family.py` and `gpt2.py` for the two implementations. Nothing here imports jax, so `--help` is quick.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...layers import ModelConfig
from ...layers.options.check_config import options_of
from ...layers.own.check_config import OWN_CLASSES
from ...meshes.errors import shown
from .tensor_names import TensorNames

Values = Mapping[str, Any]
"""The keys of a config.json."""


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A Hugging Face architecture.

    Args:
        model_type: its name in config.json.
        class_name: the class in transformers, listed in config.json under `architectures`.
        tensors: the names of its tensors.
        sizes: keys of required sizes in config.json, by `ModelConfig` field.
        optional_sizes: keys of sizes that may be missing or null, by `ModelConfig` field.
        counts: keys of whole numbers that may be 0.
        positive_numbers: keys of numbers above 0.
        supported: values that the architecture can have, by `ModelConfig` field, such as {"norm": ("rmsnorm",)}.
        options: fields of `layers/options/` that the architecture can have at any value.
    """

    model_type: str
    class_name: str
    tensors: TensorNames
    sizes: Mapping[str, str]
    optional_sizes: Mapping[str, str]
    counts: tuple[str, ...]
    positive_numbers: tuple[str, ...]
    supported: Mapping[str, tuple[str, ...]]
    options: tuple[str, ...] = ()

    @abstractmethod
    def resolve_keys(self, values: Values, warnings: list[str]) -> dict[str, Any]:
        """Return one value for each setting that several keys can give, choosing the key that transformers 5 reads.

        Args:
            warnings: list to append a line to for every two keys that differ.

        Raises:
            TypeError: a value has the wrong type.
        """

    @abstractmethod
    def find_unsupported_keys(self, values: Values) -> Iterator[str]:
        """Yield a line for each setting that trellax cannot compute; `values` are those of `resolve_keys`."""

    def find_unsupported_layers(self, values: Values) -> Iterator[str]:
        """Yield the same for settings of single layers; called only if all sizes are valid."""
        del values
        return iter(())

    @abstractmethod
    def read(self, values: Values) -> dict[str, Any]:
        """Return fields of a `ModelConfig` from resolved and supported keys."""

    @abstractmethod
    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of config.json for a model, without `architectures` and `model_type`."""

    def find_unsupported_fields(self, config: ModelConfig) -> Iterator[str]:
        """Yield a line for each field of a model that this architecture cannot have."""
        for field, choices in self.supported.items():
            if getattr(config, field) not in choices:
                yield f"model.{field}={getattr(config, field)!r}, not {' or '.join(map(repr, choices))}"
        for field in OWN_CLASSES:
            if path := getattr(config, field):
                yield f"model.{field}={path!r}, a class of your own"
        for field, (value, default) in options_of(config).items():
            if value != default and field not in (*self.supported, *self.options):
                yield f"model.{field}={value!r}, not {default!r}"
        for field in ("num_experts", "latent_size", "lora_rank"):
            if getattr(config, field) and field not in self.sizes:
                yield f"model.{field}={getattr(config, field)}, not 0"

    def has_use(self, config: ModelConfig) -> bool:
        """Return whether a model has one of the options of this architecture, if that has any; else others hold it."""
        found = options_of(config)
        return not self.options or any(found[name][0] != found[name][1] for name in self.options)


def take_first(values: Values, names: Iterable[str], warnings: list[str]) -> Any:
    """Return the first value of several keys that is not null; append a warning for each later one that differs."""
    given = [(name, values[name]) for name in names if values.get(name) is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            warnings.append(f"{given[0][0]}={shown(given[0][1])} counts, not {name}={shown(value)}")
    return given[0][1] if given else None


def read_dtype(values: Values) -> str:
    """Return the dtype to compute in: that of config.json if trellax has it, else float32."""
    # Not bfloat16 for float16 files: it would round their weights.
    dtype = values.get("dtype") or "float32"
    return dtype if dtype in ("float32", "bfloat16") else "float32"


def find_own_head_size(config: ModelConfig) -> Iterator[str]:
    """Yield a line if head_size is not hidden_size / num_heads, for architectures without a key for it."""
    if config.query_size != config.hidden_size:
        yield f"model.head_size={config.head_size}, not hidden_size / num_heads"
