"""The abstract `Architecture`: how the config.json and the tensors of a Hugging Face model describe a `ModelConfig`.

Read `llama_family.py` and `gpt2.py` for the two implementations, and `__init__.py` for the list of all architectures.
Nothing here imports jax, so that `--help` can list the architectures at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .tensor_names import TensorNames

Values = Mapping[str, Any]
"""The keys of a config.json."""


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """An architecture of Hugging Face models that trellax reads and writes.

    Args:
        model_type: its name in config.json.
        class_name: its class in transformers, which config.json lists under `architectures`.
        tensors: the names of its tensors.
        sizes: config.json key of each size that every file must have, by its field in `ModelConfig`.
        optional_sizes: the same of sizes that may be missing or null.
        counts: keys of whole numbers that may be 0.
        positive_numbers: keys of numbers above 0.
        holds: the choices that a model of this architecture can have, by field, such as {"norm": ("rmsnorm",)}.
    """

    model_type: str
    class_name: str
    tensors: TensorNames
    sizes: Mapping[str, str]
    optional_sizes: Mapping[str, str]
    counts: tuple[str, ...]
    positive_numbers: tuple[str, ...]
    holds: Mapping[str, tuple[str, ...]]

    @abstractmethod
    def settle(self, values: Values, warnings: list[str]) -> dict[str, Any]:
        """Return one value for each thing that config.json can say twice, as transformers 5 takes it.

        Args:
            warnings: gets a line for every two keys that differ.

        Raises:
            TypeError: a value has the wrong type.
        """

    @abstractmethod
    def refusals(self, values: Values) -> Iterator[str]:
        """Yield one line for each setting that trellax cannot compute; `values` are settled."""

    def layer_refusals(self, values: Values) -> Iterator[str]:
        """Yield the same for settings of single layers; called once the sizes are known to be right."""
        del values
        return iter(())

    @abstractmethod
    def read(self, values: Values) -> dict[str, Any]:
        """Return the fields of the `ModelConfig` that settled keys describe."""

    @abstractmethod
    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the config.json of a model, without `architectures` and `model_type`."""

    def lacks(self, config: ModelConfig) -> Iterator[str]:
        """Yield one line for each property of a model that this architecture does not have."""
        for field, choices in self.holds.items():
            if getattr(config, field) not in choices:
                yield f"model.{field}={getattr(config, field)!r}, not {' or '.join(map(repr, choices))}"


def take_first(values: Values, names: Iterable[str], warnings: list[str]) -> Any:
    """Return the value of the first of several keys that has one, and warn of those that differ from it."""
    given = [(name, values[name]) for name in names if values.get(name) is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            warnings.append(f"{given[0][0]}={shown(given[0][1])} counts, not {name}={shown(value)}")
    return given[0][1] if given else None


def read_dtype(values: Values) -> str:
    """Return the type to compute in."""
    # float16 files are computed in float32: bfloat16 would round them, and trellax does not compute in float16.
    dtype = values.get("dtype") or "float32"
    return dtype if dtype in ("float32", "bfloat16") else "float32"


def own_head_size(config: ModelConfig) -> Iterator[str]:
    """Yield a line where heads have another size than hidden_size / num_heads, which some architectures derive."""
    if config.query_size != config.hidden_size:
        yield f"model.head_size={config.head_size}, not hidden_size / num_heads"
