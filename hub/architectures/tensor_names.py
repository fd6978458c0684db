"""The tensor of a Hugging Face file that each parameter of a `Transformer` is stored in, as data.

Parameters are named by their path in the tree {"embed", "blocks", "head"}, such as `blocks.mlp.up.kernel`. A block's
parameter holds all layers at once, [L, ...]; a file has one tensor for each layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """The place of one parameter in a file: a tensor, or one of several equal parts of a tensor.

    GPT-2 stores query, key and value as one tensor [in, 3 * out]; the key is part 1 of 3. torch's linear layers are
    [out, in], the transpose of ours.

    Args:
        name: the tensor's name, with `{layer}` where every layer has its own.
        layout: "transposed" where the tensor is [out, in].
        part: index of the part of the tensor's last dimension (in our layout) that the parameter is.
        num_parts: number of such parts; 1 where the whole tensor is the parameter.
    """

    name: str
    layout: Literal["same", "transposed"] = "same"
    part: int = 0
    num_parts: int = 1

    def shape(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor, given the shape of one layer of the parameter."""
        wide = (*own[:-1], own[-1] * self.num_parts)
        return wide[::-1] if self.layout == "transposed" else wide

    def index(self, own: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index of a block of the parameter in the tensor.

        Args:
            own: the block, as an index of one layer of the parameter.
            shape: the shape of the tensor.
        """
        wide = shape[0] if self.layout == "transposed" else shape[-1]
        start = self.part * wide // self.num_parts
        moved = (*own[:-1], slice(own[-1].start + start, own[-1].stop + start))
        return moved[::-1] if self.layout == "transposed" else moved


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The names of an architecture's tensors.

    Args:
        prefix: start of every name but the head's; a file of a model without its head may leave it out.
        places: place of every parameter that the architecture can have, by path.
        head: name of the output table, which has no prefix. A model with tied embeddings may store it or not.
        ignored: ends of names that hold no parameter, such as tables that older versions of transformers saved.
    """

    prefix: str
    places: Mapping[str, TensorPlace]
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()

    def select(self, paths: Iterable[str]) -> dict[str, TensorPlace]:
        """Return the places of the parameters of one model, in the order of their paths."""
        return {path: self.places[path] for path in paths}

    def full_name(self, name: str, *, prefix: str) -> str:
        """Return a tensor's name as a file with this prefix has it."""
        return name if name == self.head else prefix + name
