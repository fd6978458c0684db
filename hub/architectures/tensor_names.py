"""Map the parameters of a `Transformer` to the tensors of a Hugging Face file.

Parameters are named by their path in the tree {"embed", "blocks", "head"}, such as `blocks.mlp.up.kernel`. A
parameter of the blocks is stacked over layers, [L, ...]; a file has one tensor for each layer. Kernels of experts are
stacked over them too, [L, E, ...]; published files have one tensor for each layer and expert.

Where the first N layers are dense, blocks.dense and blocks.experts are two stacks: layer i of the second is layer N + i
of the model. Parameters that both have, of attention say, have the same name in a file, of other layers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

_DENSE, _EXPERTS = "blocks.dense.", "blocks.experts."


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """The place of a parameter in a file: a tensor, or one of several parts of a tensor.

    GPT-2 stores query, key and value as one tensor [in, 3 * out]; the key is part 1 of 3. Phi-3 does too, but its parts
    are as wide as there are heads of each. gpt-oss stores the columns of gate and up in turn. torch's linear layers are
    [out, in], the transpose of ours.

    Args:
        name: name of the tensor, with `{layer}` if every layer has its own, and `{expert}` if every expert has.
        layout: "transposed" if the last two dimensions of the tensor are [out, in].
        part: index of the parameter among the parts of the tensor's last dimension, in our layout.
        num_parts: number of these parts; 1 if the tensor is the parameter.
        order: "interleaved" if the parts have their columns in turn, not side by side.
        joined: paths of the parameters that are the parts, in order, if these are not equally wide; `widths`, theirs in
            one model, are filled in by `TensorNames.select`.
        first: layer of the model that is the first of the stack.
        dtype: "float32" for what files have in float32 whatever the others are in.
    """

    name: str
    layout: Literal["same", "transposed"] = "same"
    part: int = 0
    num_parts: int = 1
    order: Literal["joined", "interleaved"] = "joined"
    joined: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    first: int = 0
    dtype: Literal["any", "float32"] = "any"

    @property
    def num_stacked(self) -> int:
        """Number of leading dimensions of the parameter along which every element is another tensor: 0, 1 or 2."""
        return ("{layer}" in self.name) + ("{expert}" in self.name)

    def tensor_name(self, number: tuple[int, ...]) -> str:
        """Return the name of a tensor, given its index along the stacked dimensions, (layer, expert)."""
        layer = tuple(one + self.first for one in number[:1])
        return self.name.format(**dict(zip(("layer", "expert"), (*layer, *number[1:]), strict=False)))

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each tensor, given the shape of the parameter."""
        own = parameter[self.num_stacked :]
        wide = (*own[:-1], sum(self.widths) or own[-1] * self.num_parts)
        return _swap(wide) if self.layout == "transposed" else wide

    def index(self, own: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index of a block of the parameter in the tensor.

        Args:
            own: the block, as an index of the parameter without its stacked dimensions.
            shape: the shape of the tensor.
        """
        if self.order == "interleaved":
            return self._index_in_turn(own)
        wide = shape[-2] if self.layout == "transposed" else shape[-1]
        # GPT-2's c_attn is [768, 3 * 768], and the key is part 1: its columns 0:64 are columns 768:832 of the tensor.
        start = sum(self.widths[: self.part]) if self.widths else self.part * wide // self.num_parts
        moved = (*own[:-1], slice(own[-1].start + start, own[-1].stop + start))
        return _swap(moved) if self.layout == "transposed" else moved

    def _index_in_turn(self, own: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return the index of columns a to b, of part p of n: a n + p, (a + 1) n + p, ..., (b - 1) n + p."""
        last, step = own[-1], self.num_parts
        turns = slice(last.start * step + self.part, (last.stop - 1) * step + self.part + 1, step)
        return _swap((*own[:-1], turns)) if self.layout == "transposed" else (*own[:-1], turns)


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
        quantized: forms of quantized weights that are read, by `quant_method` in config.json.
        more_layers: whether files may have layers behind the model's last, which are left out: those of DeepSeek-V3
            predict one token more in training.
    """

    prefix: str
    places: Mapping[str, TensorPlace]
    stacked: Mapping[str, TensorPlace] = field(default_factory=dict)
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    more_layers: Literal["refused", "ignored"] = "refused"

    def select(self, leaves: Mapping[str, Any]) -> dict[str, TensorPlace]:
        """Return the places of the parameters of one model, in the order of their paths.

        Args:
            leaves: arrays or shapes by path.
        """
        num_dense = next((leaf.shape[0] for path, leaf in leaves.items() if path.startswith(_DENSE)), 0)
        places = {path: self.place_of(path, num_dense=num_dense) for path in leaves}
        widths = {path: tuple(leaves[one].shape[-1] for one in place.joined) for path, place in places.items()}
        return {path: replace(place, widths=widths[path]) for path, place in places.items()}

    def place_of(self, path: str, *, num_dense: int) -> TensorPlace:
        """Return the place of a parameter, in a model whose first layers are dense."""
        if path in self.places:
            return self.places[path]
        first = num_dense if path.startswith(_EXPERTS) else 0
        return replace(self.places["blocks." + path.removeprefix(_DENSE).removeprefix(_EXPERTS)], first=first)

    def is_of_more_layers(self, name: str, *, num_layers: int) -> bool:
        """Return whether a tensor of a file is of a layer behind the model's last, where files may have such."""
        layer = re.search(r"(?:^|\.)layers\.(\d{1,6})\.", name)
        return self.more_layers == "ignored" and layer is not None and int(layer[1]) >= num_layers

    def with_stacked(self) -> "TensorNames":
        """Return the names in files that hold all experts of a layer as one tensor."""
        return replace(self, places={**self.places, **self.stacked})

    def full_name(self, name: str, *, prefix: str) -> str:
        """Return the full name of a tensor in a file with this prefix."""
        return name if name == self.head else prefix + name
