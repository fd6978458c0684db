"""List the operations of one transformer layer on one device: matrix products by shape, others by memory traffic.

Bytes per element follow from the arrays that an operation reads and writes: activations of 2 bytes (4 in float32
models), dropout masks of one. A backward reads the output's gradient and the residuals, and writes the input's
gradient. Read `layer_time.py` next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...layers import ModelConfig
from ...layers.attention.counts import attention_products, attention_widths
from ...layers.lora.linears import adapted_of, ends_of
from ...layers.own.counts import own_flops
from ...layers.own.trace import trace_products
from .device_params import block_matrices
from .runtime import Runtime

Part = Literal["core", "weights", "adapters", "vector"]
"""core: the core of attention, which "selective" recomputes; weights: products with parameters; adapters: those with
adapters beside frozen weights; vector: the rest."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """`batch` products [m, k] x [k, n] forward; the backward has one product for each operand.

    `layers` are the linear layers that it is the product of, as `Runtime.adapted` names them.
    """

    part: Part
    m: float
    n: float
    k: float
    batch: float = 1
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Memory traffic in bytes, forward and backward."""

    part: Part
    forward_bytes: float
    backward_bytes: float


@dataclass(frozen=True, kw_only=True)
class Flash:
    """Fused attention: flops of its products forward; the backward has five products for the forward's two."""

    flops: float
    part: Part = "core"


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """One device's part of a layer: `sequences` of `queries` tokens that attend to `keys`; widths are over `tensor`."""

    sequences: int
    queries: float
    keys: float
    tensor: int
    expert: int = 1


Operation = Product | Stream | Flash


def layer_operations(model: ModelConfig, *, size: LayerSize, runtime: Runtime) -> Iterator[Operation]:
    """Yield the operations of one block, with the casts of its products' factors."""
    for operation in _block_operations(model, size=size, runtime=runtime):
        yield operation
        if not isinstance(operation, Product) or operation.part != "weights":
            continue
        if runtime.product_format.is_narrow:
            yield _casts(operation, item_bytes(model), runtime)
        if num_adapters := _count_adapters(operation, model, runtime):
            yield from _adapter(operation, item_bytes(model), num_adapters * runtime.adapter_rank)
            if model.lora_magnitude == "on":
                yield _magnitudes(operation, item_bytes(model))


def _count_adapters(product: Product, model: ModelConfig, runtime: Runtime) -> int:
    """Return how many adapters the layers of a product have; those that share one have it together."""
    if not runtime.adapter_rank:
        return 0
    # Layers of different kinds may have them in different places.
    adapted = [(one.name,) for one in adapted_of(model)] if model.lora_rank else runtime.adapted
    ends = {end for name in product.layers for end in ends_of(name)}
    return sum(not ends.isdisjoint(names) for names in adapted)


def _block_operations(model: ModelConfig, *, size: LayerSize, runtime: Runtime) -> Iterator[Operation]:
    tokens, t, item = size.sequences * size.queries, size.tensor, item_bytes(model)
    whole = tokens * model.hidden_size / (t if runtime.sequence_parallel == "on" else 1)
    yield _norm(whole, item)
    if model.block or model.attention_class:
        yield from _own_products(model, "block" if model.block else "attention_class", size=size)
    else:
        yield from _attention(model, size=size, runtime=runtime)
    yield _residual(whole, item, runtime)
    yield _norm(whole, item)
    if model.num_experts:
        yield from _experts(model, size=size)
    if model.mlp_class:
        yield from _own_products(model, "mlp_class", size=size)
    elif features := 0 if model.block else model.shared_size if model.num_experts else model.ffn_size:
        name = "mlp.shared" if model.num_experts else "mlp"
        yield from _feed_forward(model, tokens=tokens, features=features / t, name=name)
    yield _residual(whole, item, runtime)
    for _ in range(model.num_block_norms - 2):
        yield _norm(whole, item)
    # Microbatches add their weight gradients to one array.
    is_apart = runtime.gradient_sums == "apart" and not runtime.adapter_rank
    weights = block_matrices(model, tensor=t, expert=size.expert) if is_apart else 0
    yield Stream(part="weights", forward_bytes=0, backward_bytes=runtime.sum_traffic_bytes * weights)


def _attention(model: ModelConfig, *, size: LayerSize, runtime: Runtime) -> Iterator[Operation]:
    tokens, t, item = size.sequences * size.queries, size.tensor, item_bytes(model)
    own, (*into, out) = attention_widths(model, tensor=t), attention_products(model, tensor=t)
    for (rows, columns), layers in zip(into, _attention_inputs(model), strict=True):
        yield Product(part="weights", m=tokens, n=columns, k=rows, layers=layers)
    if normed := own.latents + (own.query + own.key if model.qk_norm != "off" else 0):
        yield _norm(tokens * normed, item)
    if model.positions == "rotary":
        turned = tokens * (own.query + own.key)
        yield Stream(part="vector", forward_bytes=2 * item * turned, backward_bytes=2 * item * turned)
    yield from _core(model, size=size, runtime=runtime)
    yield Product(part="weights", m=tokens, n=out[1], k=out[0], layers=("attention.out",))


def _attention_inputs(model: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Return the linear layers of each of `attention_products` but the last, by name."""
    if not model.latent_size:
        return (("attention.query", "attention.key", "attention.value"),)
    if not model.query_latent_size:
        return ("attention.latent_down",), ("attention.query",), ("attention.key_value",)
    return ("attention.latent_down", "attention.query.down"), ("attention.query.up",), ("attention.key_value",)


def _own_products(model: ModelConfig, key: str, *, size: LayerSize) -> Iterator[Operation]:
    """Yield the matrix products of a class of the user's, as its jaxpr has them for one sequence on one device.

    One whose jaxpr does not tell them counts flops itself: they are taken for one product from the hidden size.
    """
    num_tokens, share = round(size.keys), size.sequences * size.queries / size.keys
    traced = trace_products(model, key, num_tokens=num_tokens, tensor=size.tensor)
    if traced.uncounted:
        d = model.hidden_size
        flops = own_flops(model, num_tokens=num_tokens) / size.tensor
        yield Product(part="weights", m=size.sequences * size.queries, n=flops / (2 * d), k=d)
        return
    for own in traced.products:
        batch = own.batch * own.count
        if own.is_weight:
            yield Product(part="weights", m=own.m * share, n=own.n, k=own.k, batch=batch)
        else:
            yield Product(part="core", m=own.m, n=own.n, k=own.k, batch=batch * share)


def item_bytes(model: ModelConfig) -> int:
    """Return the bytes of one element of an activation."""
    return 4 if model.dtype == "float32" else 2


def _core(model: ModelConfig, *, size: LayerSize, runtime: Runtime) -> Iterator[Operation]:
    """Yield the core of attention: scores, softmax, dropout and the weighted sum of values, or one fused kernel."""
    heads = size.sequences * model.num_heads / size.tensor
    scores, value = heads * size.queries * size.keys, model.value_size // model.num_heads
    if runtime.attention == "fused":
        # A fused kernel skips the scores that the causal mask hides: half of 4 x scores x head_size.
        yield Flash(flops=scores * (model.head_size + value))
        return
    yield Product(part="core", m=size.queries, n=size.keys, k=model.head_size, batch=heads)
    # The softmax reads and writes the scores; its backward reads output and gradient, and writes one.
    b = runtime.score_bytes
    yield Stream(part="core", forward_bytes=2 * b * scores, backward_bytes=3 * b * scores)
    if runtime.dropout == "on":
        yield Stream(part="core", forward_bytes=(2 * b + 1) * scores, backward_bytes=(2 * b + 1) * scores)
    yield Product(part="core", m=size.queries, n=value, k=size.keys, batch=heads)


def _feed_forward(
    model: ModelConfig, *, tokens: float, features: float, name: str, batch: int = 1
) -> Iterator[Operation]:
    """Yield both products of the feed-forward part, and the activation function between them.

    name: that of its linear layers but for their last part.
    """
    item, f = item_bytes(model), features
    num_up, into = 2 if model.is_gated else 1, (f"{name}.gate", f"{name}.up")
    yield Product(part="weights", m=tokens, n=num_up * f, k=model.hidden_size, batch=batch, layers=into)
    moved = item * tokens * batch * f
    # GELU reads its input; SwiGLU reads two. Their backwards read the gradient and the inputs, and write as many.
    yield Stream(part="vector", forward_bytes=(num_up + 1) * moved, backward_bytes=(2 * num_up + 1) * moved)
    yield Product(part="weights", m=tokens, n=model.hidden_size, k=f, batch=batch, layers=(f"{name}.down",))


def _experts(model: ModelConfig, *, size: LayerSize) -> Iterator[Operation]:
    """Yield what a mixture of experts does without communication: the router, rows there and back, and the products."""
    tokens = size.sequences * size.queries
    yield Product(part="vector", m=tokens, n=model.num_experts, k=model.hidden_size)
    rows, item = model.expert_rows(max(1, round(tokens))), item_bytes(model)
    # Each row is read from a token and written, its result read and added; all four again backward.
    moved = 4 * item * rows * model.num_experts * model.hidden_size
    yield Stream(part="vector", forward_bytes=moved, backward_bytes=moved)
    # A device has its experts' rows of all devices of the group.
    own = model.num_experts // size.expert
    of_experts = {"tokens": rows * size.expert, "features": model.expert_size / size.tensor}
    yield from _feed_forward(model, **of_experts, name="mlp.experts", batch=own)


def _adapter(product: Product, item: int, rank: int) -> Iterator[Operation]:
    """Yield the operations of a product's adapters: x A B, added to the result (Hu et al. 2021, section 4.1).

    rank: that of all of them together; where several layers are one product, so are their adapters.
    """
    sizes = {"m": product.m, "batch": product.batch}
    yield Product(part="adapters", k=product.k, n=rank, **sizes)
    yield Product(part="adapters", k=rank, n=product.n, **sizes)
    # Two arrays are read and their sum is written: of results forward, of the input's gradients backward.
    added = 3 * item * product.m * product.batch
    yield Stream(part="vector", forward_bytes=added * product.n, backward_bytes=added * product.k)


def _magnitudes(product: Product, item: int) -> Stream:
    """Return the traffic of a product's magnitudes (Liu et al. 2024, equation 5).

    Forward: the weights are read for the squares of columns and for the product with A; the results are scaled as they
    are added. Backward: gradients are read and scaled, and read again beside the results for the magnitudes' own.
    """
    weights, results = product.k * product.n * product.batch, product.m * product.n * product.batch
    return Stream(part="vector", forward_bytes=2 * item * weights, backward_bytes=4 * item * results)


def _casts(product: Product, item: int, runtime: Runtime) -> Stream:
    """Return the traffic of casting activations and weights for a product's forward, and its gradient for the backward.

    Weights whose cast is kept for a step are cast in the update.
    """
    numbers = product.batch * product.k * (product.m + (product.n if runtime.weight_casts == "microbatch" else 0.0))
    gradients = product.batch * product.m * product.n
    each = runtime.product_format.cast_bytes(item, layouts=runtime.cast_layouts)
    return Stream(part="vector", forward_bytes=each * numbers, backward_bytes=each * gradients)


def _norm(numbers: float, item: int) -> Stream:
    """Return the traffic of a norm over so many numbers of `item` bytes."""
    return Stream(part="vector", forward_bytes=2 * item * numbers, backward_bytes=4 * item * numbers)


def _residual(numbers: float, item: int, runtime: Runtime) -> Stream:
    """Return the traffic of adding a branch to the residual stream, with its bias and dropout."""
    mask = 1 if runtime.dropout == "on" else 0
    # Backward: the mask is applied to the gradient, the bias sums it, and both branches' gradients are added.
    return Stream(part="vector", forward_bytes=(3 * item + mask) * numbers, backward_bytes=(6 * item + mask) * numbers)
