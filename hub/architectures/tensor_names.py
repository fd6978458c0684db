"""Map the parameters of a `Transformer` to the tensors of a Hugging Face file.

Parameters are named by their path in the tree {"embed", "blocks", "head"}, such as `blocks.mlp.up.kernel`. A
parameter of the blocks is stacked over layers, [L, ...]; a file has one tensor for each layer. Kernels of experts are
stacked over them too, [L, E, ...]; published files have one tensor for each layer and expert.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """The place of a parameter in a file: a tensor, or one of several equal parts of a tensor.

    GPT-2 stores query, key and value as one tensor [in, 3 * out]; the key is part 1 of 3. torch's linear layers are
    [out, in], the transpose of ours.

    Args:
        name: name of the tensor, with `{layer}` if every layer has its own, and `{expert}` if every expert has.
        layout: "transposed" if the last two dimensions of the tensor are [out, in].
        part: index of the parameter among the equal parts of the tensor's last dimension, in our layout.
        num_parts: number of these parts; 1 if the tensor is the parameter.
    """

    name: str
    layout: Literal["same", "transposed"] = "same"
    part: int = 0
    num_parts: int = 1

    @property
    def num_stacked(self) -> int:
        """Number of leading dimensions of the parameter along which every element is another tensor: 0, 1 or 2."""
        return ("{layer}" in self.name) + ("{expert}" in self.name)

    def tensor_name(self, number: tuple[int, ...]) -> str:
        """Return the name of a tensor, given its index along the stacked dimensions, (layer, expert)."""
        return self.name.format(**dict(zip(("layer", "expert"), number, strict=False)))

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each tensor, given the shape of the parameter."""
        own = parameter[self.num_stacked :]
        wide = (*own[:-1], own[-1] * self.num_parts)
        return _swap(wide) if self.layout == "transposed" else wide

    def index(self, own: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index of a block of the parameter in the tensor.

        Args:
            own: the block, as an index of the parameter without its stacked dimensions.
            shape: the shape of the tensor.
        """
        wide = shape[-2] if self.layout == "transposed" else shape[-1]
        # GPT-2's c_attn is [768, 3 * 768], and the key is part 1: its columns 0:64 are columns 768:832 of the tensor.
        start = self.part * wide // self.num_parts
        moved = (*own[:-1], slice(own[-1].start + start, own[-1].stop + start))
        return _swap(moved) if self.layout == "transposed" else moved


def _swap(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*dims[:-2], dims[-1], dims[-2])


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The names of an architecture's tensors.

    Args:
        prefix: prefix of all names except the head's; files of a model without a head may omit it.
        places: places of all parameters that the architecture can have, by path; those of published files.
        stacked: places in files that hold all experts of a layer as one tensor, for parameters that differ.
        head: name of the output table, which has no prefix. Files of a model with tied embeddings may omit it.
        ignored: suffixes of tensors that are not parameters, such as masks that older versions of transformers saved.
    """

    prefix: str
    places: Mapping[str, TensorPlace]
    stacked: Mapping[str, TensorPlace] = field(default_factory=dict)
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()

    def select(self, paths: Iterable[str]) -> dict[str, TensorPlace]:
        """Return the places of the parameters of one model, in the order of their paths."""
        return {path: self.places[path] for path in paths}

    def with_stacked(self) -> "TensorNames":
        """Return the names in files that hold all experts of a layer as one tensor."""
        return replace(self, places={**self.places, **self.stacked})

    def full_name(self, name: str, *, prefix: str) -> str:
        """Return the full name of a tensor in a file with this prefix."""
        return name if name == self.head else prefix + name
