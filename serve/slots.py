"""What the host tells the devices about each slot with every call: settings and pages, one row a slot.

They are data, so a request that takes a slot compiles nothing. Read `decode.py` next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..meshes import DEFAULT_RULES, ShardingRules
from .requests import MOST_BIASES, ServedSequence
from .sampling.allowed import num_words
from .sampling.penalties import PromptPart
from .sampling.settings import SamplingSettings
from .state import Sizes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlotInputs:
    """What the host tells the devices about each slot with every call: its settings, and its pages [B@data, pages].

    Pages are numbered from 0 on each data shard; entries that are not in use are any page. `allowed`, [B@data, W], has
    a bit for each token that a constrained slot may choose, token t as bit t % 32 of word t // 32.
    """

    settings: SamplingSettings
    pages: Any
    allowed: Any

    @property
    def most_read(self) -> Any:
        """The most tokens that each sequence reads, [B@data]; the last of its longest answer is never read."""
        return self.settings.limit - 1


def input_shapes(sizes: Sizes, *, vocab_size: int, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> SlotInputs:
    """Return shapes and shardings of the inputs of all slots, which are the same on all ranks."""

    def leaf(dtype: Any, *inner: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.slots, *inner), dtype, sharding=NamedSharding(mesh, rules.spec(("batch",))))

    settings = SamplingSettings(
        temperature=leaf(jnp.float32),
        top_k=leaf(jnp.int32),
        top_p=leaf(jnp.float32),
        min_p=leaf(jnp.float32),
        repetition_penalty=leaf(jnp.float32),
        frequency_penalty=leaf(jnp.float32),
        presence_penalty=leaf(jnp.float32),
        bias_tokens=leaf(jnp.int32, MOST_BIASES),
        biases=leaf(jnp.float32, MOST_BIASES),
        num_logprobs=leaf(jnp.int32),
        is_constrained=leaf(jnp.bool_),
        seed=leaf(jnp.uint32),
        limit=leaf(jnp.int32),
        stops=leaf(jnp.int32, sizes.stops),
    )
    allowed = leaf(jnp.uint32, num_words(vocab_size))
    return SlotInputs(settings=settings, pages=leaf(jnp.int32, sizes.pages_per_row), allowed=allowed)


def empty_inputs(sizes: Sizes) -> SlotInputs:
    """Return inputs of unused slots, on the host: a request overwrites its row, and each call sends them all.

    `allowed` is missing: `constraints/masks.py` adds it to those of a call.
    """
    slots = sizes.slots
    settings = SamplingSettings(
        temperature=np.zeros(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        min_p=np.zeros(slots, np.float32),
        repetition_penalty=np.ones(slots, np.float32),
        frequency_penalty=np.zeros(slots, np.float32),
        presence_penalty=np.zeros(slots, np.float32),
        bias_tokens=np.full((slots, MOST_BIASES), -1, np.int32),
        biases=np.zeros((slots, MOST_BIASES), np.float32),
        num_logprobs=np.full(slots, -1, np.int32),
        is_constrained=np.zeros(slots, np.bool_),
        seed=np.zeros(slots, np.uint32),
        limit=np.zeros(slots, np.int32),
        stops=np.full((slots, sizes.stops), -1, np.int32),
    )
    return SlotInputs(settings=settings, pages=np.zeros((slots, sizes.pages_per_row), np.int32), allowed=None)


def write_inputs(slots: SlotInputs, sequence: ServedSequence, *, vocab_size: int) -> None:
    """Write the pages and the settings of an admitted request into the row of its slot, on the host."""
    request, slot, settings = sequence.request, sequence.slot, slots.settings
    slots.pages[slot, : len(sequence.pages)] = sequence.pages
    settings.temperature[slot] = request.temperature
    settings.top_k[slot] = min(request.top_k, vocab_size)
    for name in ("top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        getattr(settings, name)[slot] = getattr(request, name)
    settings.num_logprobs[slot] = -1 if request.logprobs is None else request.logprobs
    settings.bias_tokens[slot] = -1
    for place, (token, bias) in enumerate(request.logit_bias):
        settings.bias_tokens[slot, place], settings.biases[slot, place] = token, bias
    settings.seed[slot] = request.seed
    settings.limit[slot] = len(request.prompt) + request.max_new_tokens
    settings.stops[slot] = -1
    settings.stops[slot, : len(request.stop)] = request.stop


def part_shapes(sizes: Sizes, *, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> PromptPart:
    """Return shapes and shardings of a part of a prompt, which is as long as all chunks of a call."""

    def leaf(dtype: Any, *inner: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, rules.spec(("batch",)))
        return jax.ShapeDtypeStruct((sizes.num_shards, *inner), dtype, sharding=sharding)

    return PromptPart(slot=leaf(jnp.int32), tokens=leaf(jnp.int32, sizes.items * sizes.chunk), is_first=leaf(jnp.bool_))


def prompt_parts(sizes: Sizes, sequence: ServedSequence) -> Iterator[PromptPart]:
    """Yield the parts in which the prompt of an admitted sequence is counted."""
    assert sequence.slot is not None
    shard, own = divmod(sequence.slot, sizes.slots_per_shard)
    prompt, size = sequence.request.prompt, sizes.items * sizes.chunk
    # Other shards count nothing: their slot is past the last.
    slot = np.full(sizes.num_shards, sizes.slots_per_shard, np.int32)
    slot[shard] = own
    for start in range(0, len(prompt), size):
        part = prompt[start : start + size]
        tokens = np.full((sizes.num_shards, size), -1, np.int32)
        tokens[shard, : len(part)] = part
        yield PromptPart(slot=slot, tokens=tokens, is_first=np.full(sizes.num_shards, start == 0))
