"""Steps of random layers, by name. A step maps two arrays of one shape to one array of floats.

Together they hold more than a hundred primitives of jax, structured control flow and hand-written gradients among them.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Draw = np.random.Generator
Step = Callable[[Draw, jax.Array, jax.Array], jax.Array]
"""step(choices, array, another array of the same shape) -> array."""


def fit(value: jax.Array, shape: Iterable[int]) -> jax.Array:
    """Return the numbers of an array in another shape: repeated where they are too few, cut where they are too many."""
    size = int(np.prod(tuple(shape)))
    flat = value.reshape(-1)
    if flat.size < size:
        flat = jnp.concatenate([flat] * -(-size // flat.size))
    return (flat if flat.size == size else flat[:size]).reshape(tuple(shape))


def _axis(draw: Draw, x: jax.Array) -> int:
    return int(draw.integers(x.ndim))


def _unary(function: Callable[[jax.Array], jax.Array]) -> Step:
    """End a step in a tanh, whose residual is its result, or in a product, whose residual is its operand."""

    def op(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
        y = function(jnp.clip(x, -0.9, 0.9))
        return jnp.tanh(y) if draw.integers(2) else 0.3 * y * other

    return op


def _binary(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Step:
    return lambda draw, x, other: jnp.tanh(function(x, other))


def _reshape(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    sizes = [n for n in range(1, x.size + 1) if x.size % n == 0]
    first = int(draw.choice(sizes))
    order = tuple(map(int, draw.permutation(x.ndim)))
    return lax.reshape(x, (first, x.size // first), order if draw.integers(2) else None)


def _transpose(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.transpose(x, tuple(map(int, draw.permutation(x.ndim))))


def _slice(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    axis = _axis(draw, x)
    return lax.slice_in_dim(x, int(draw.integers(x.shape[axis])), None, int(draw.integers(1, 3)), axis)


def _dynamic_slice(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    axis = _axis(draw, x)
    start = jnp.argmax(other.reshape(-1)) % x.shape[axis]
    return lax.dynamic_slice_in_dim(x, start, (x.shape[axis] + 1) // 2, axis)


def _dynamic_update(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    axis = _axis(draw, x)
    part = lax.slice_in_dim(other, 0, (x.shape[axis] + 1) // 2, 1, axis)
    return lax.dynamic_update_slice_in_dim(x, part, jnp.argmin(other.reshape(-1)) % x.shape[axis], axis)


def _pad(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    sizes = [(int(draw.integers(-(n > 1), 2)), int(draw.integers(2)), int(draw.integers(2))) for n in x.shape]
    return lax.pad(x, np.float32(0.5), sizes)


def _gather(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    axis = _axis(draw, x)
    places = (jnp.abs(other.reshape(-1)[:5]) * 10).astype(jnp.int32) % x.shape[axis]
    return jnp.take(x, places, axis=axis)


def _scatter(kind: str) -> Step:
    def op(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
        flat, values = x.reshape(-1), other.reshape(-1)[:3]
        # Setting wants places of their own.
        places = jnp.asarray(draw.permutation(flat.size)[: values.size], jnp.int32)
        return jnp.tanh(getattr(flat.at[places], kind)(values, unique_indices=True))

    return op


def _reduce(function: Callable[..., jax.Array]) -> Step:
    return lambda draw, x, other: jnp.tanh(function(x, axis=_axis(draw, x)))


def _cumulate(function: Callable[..., jax.Array]) -> Step:
    return lambda draw, x, other: jnp.tanh(function(x, axis=_axis(draw, x), reverse=bool(draw.integers(2))))


def _sort(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    axis = _axis(draw, x)
    first, second = lax.sort((x, other), dimension=axis, num_keys=1)
    return first if draw.integers(2) else second


def _top(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    values, places = lax.top_k(x, (x.shape[-1] + 1) // 2)
    return values * (1 + places.astype(jnp.float32)) / 4


def _product(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    """Multiply by a square matrix made of the other array's elements, or multiply batches of matrices."""
    if x.ndim == 3 and draw.integers(2):
        return lax.dot_general(x, other, (((2,), (2,)), ((0,), (0,)))) / 2
    return x @ fit(other, (x.shape[-1], x.shape[-1])) / 2


def _convolve(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    image, kernel = fit(x, (2, 2, 8)), fit(other, (3, 2, 3))
    padding = "SAME" if draw.integers(2) else "VALID"
    return jnp.tanh(lax.conv_general_dilated(image, kernel, (int(draw.integers(1, 3)),), padding))


def _pool(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    start, combine = ((-jnp.inf, lax.max), (0.0, lax.add))[draw.integers(2)]
    return lax.reduce_window(fit(x, (4, 6)), start, combine, (2, 3), (1, 2), "VALID") / 2


def _select(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    mask = (x > other) ^ (other < 0.1) | ~(x >= 0) & (x != other)
    return jnp.where(mask, x, other)


def _fourier(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    waves = jnp.fft.fft(x.reshape(-1) / 4)
    return jnp.real(waves) + jnp.imag(waves) * other.reshape(-1)


def _solve(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    square = fit(other, (3, 3))
    positive = square @ square.T + 2 * jnp.eye(3)
    lower = jnp.linalg.cholesky(positive)
    return lax.linalg.triangular_solve(lower, fit(x, (3, 2)), left_side=True, lower=True)


def _round(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    """Combine values without a gradient with values that have one."""
    steps = jnp.floor(3 * x) + jnp.ceil(2 * other) + jnp.round(4 * x) + jnp.sign(other)
    return jnp.tanh(x * steps)


def _cast(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    kind = (jnp.bfloat16, jnp.float16)[draw.integers(2)]
    return x.astype(kind).astype(jnp.float32) * lax.reduce_precision(other, 8, 10)


def _bitcast(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    number = lax.bitcast_convert_type(other, jnp.int32)
    return x * (lax.population_count(number) & 3).astype(jnp.float32) / 3


def _branch(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    square = fit(other, (x.shape[-1], x.shape[-1]))
    branches = (lambda a: jnp.tanh(a @ square), lambda a: jnp.sin(a) * other, lambda a: a)
    which = jnp.argmax(other.reshape(-1)) % 3
    if draw.integers(2):
        return lax.switch(which, branches, x)
    return lax.cond(which > 0, branches[0], branches[1], x)


def _scan(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(carry + row * 0.5)
        return carry, carry * row

    carry, rows = lax.scan(step, other[0], x, reverse=bool(draw.integers(2)))
    return rows if draw.integers(2) else carry


def _while(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    """Multiply by the result of a loop whose length depends on the data and which has no gradient."""
    halve = lambda state: (state[0] / 2, state[1] + 1)  # noqa: E731
    start = lax.stop_gradient(1 + jnp.abs(other).sum()), jnp.float32(0)
    count = lax.while_loop(lambda state: state[0] > 0.5, halve, start)[1]
    return x * jnp.sin(count) + lax.fori_loop(0, 2, lambda _, a: jnp.sin(a), other)


def _jit(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    return jax.jit(lambda a, b: jnp.sin(a) * b + a.reshape(-1)[::-1].reshape(a.shape))(x, other)


def _remat(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    policy = jax.checkpoint_policies.save_only_these_names("kept") if draw.integers(2) else None
    return jax.checkpoint(lambda a, b: jnp.sin(checkpoint_name(jnp.tanh(a * b), "kept")) * a, policy=policy)(x, other)


@jax.custom_vjp
def _scaled(x: jax.Array, other: jax.Array) -> jax.Array:
    return x * jnp.cos(other)


_scaled.defvjp(
    lambda x, other: (x * jnp.cos(other), (x.reshape(-1), other)),
    lambda kept, grad: (0.5 * grad * jnp.cos(kept[1]), grad * kept[0][::-1].reshape(grad.shape)),
)


@jax.custom_jvp
def _bent(x: jax.Array) -> jax.Array:
    return jnp.sin(x) * x


_bent.defjvp(lambda primals, tangents: (_bent(primals[0]), tangents[0] * jnp.cos(primals[0]).reshape(-1)[0]))


def _own_vjp(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    """Apply a function with a custom gradient, or one that closes over a value of the layer."""
    if draw.integers(2):
        return _scaled(x, other)
    fixed = lax.stop_gradient(jnp.cos(other))
    closed = jax.custom_vjp(jnp.sin)
    closed.defvjp(lambda a: (jnp.sin(a), a), lambda a, grad: (grad * jnp.cos(a),))
    return closed(x) * fixed


def _expand(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    if x.ndim > 2:
        return jnp.squeeze(x[:, :1], 1) + jnp.broadcast_to(other.reshape(-1)[:1], (x.shape[0], *x.shape[2:]))
    return jnp.broadcast_to(jnp.expand_dims(x, 1), (x.shape[0], 2, *x.shape[1:]))


def _pieces(draw: Draw, x: jax.Array, other: jax.Array) -> jax.Array:
    axis = _axis(draw, x)
    size = x.shape[axis]
    if size < 2:
        return jnp.concatenate([x, other], axis)
    one, two = lax.split(x, (size // 2, size - size // 2), axis)
    return jnp.concatenate([two, other, one], axis) if draw.integers(2) else jnp.concatenate([two, one], axis)


_UNARY = (
    "sin cos tan tanh logistic exp exp2 expm1 cbrt square abs erf erfc erf_inv asin acos atan sinh cosh asinh atanh"
)
_SAFE = "log log1p sqrt rsqrt lgamma digamma acosh"
_CUMULATED = "cumsum cumprod cummax cummin cumlogsumexp"

STEPS: dict[str, Step] = {
    **{name: _unary(getattr(lax, name)) for name in _UNARY.split()},
    **{name: _unary(lambda x, name=name: getattr(lax, name)(1.5 + x * x)) for name in _SAFE.split()},
    **{name: _cumulate(getattr(lax, name)) for name in _CUMULATED.split()},
    **{name: _reduce(getattr(jnp, name)) for name in ("sum", "max", "min", "prod", "mean", "var")},
    **{f"scatter {name}": _scatter(name) for name in ("set", "add", "multiply", "max")},
    **{name: _binary(getattr(lax, name)) for name in ("add", "sub", "mul", "max", "min", "atan2")},
    "div": _binary(lambda x, other: x / (1.2 + other * other)),
    "rem": _binary(lambda x, other: lax.rem(x, 1.3 + other * other)),
    "pow": _binary(lambda x, other: lax.pow(1.1 + x * x, other)),
    "integer_pow": _unary(lambda x: x**3),
    "neg": lambda draw, x, other: -x,
    "clamp": lambda draw, x, other: jnp.clip(x, -0.3, jnp.abs(other)),
    "rev": lambda draw, x, other: lax.rev(x, (_axis(draw, x),)),
    "ravel": lambda draw, x, other: jnp.ravel(x, order="F") * other.reshape(-1),
    "flat": lambda draw, x, other: x.reshape(-1),
    "copy": lambda draw, x, other: jnp.copy(x) * other,
    "barrier": lambda draw, x, other: lax.optimization_barrier((x, other))[0],
    "matrix": lambda draw, x, other: fit(x, (6, 4)) @ fit(other, (4, 5)) / 2,
    "finite": lambda draw, x, other: jnp.where(jnp.isfinite(x) & (x.sum() < 9), x, other),
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update": _dynamic_update,
    "pad": _pad,
    "gather": _gather,
    "sort": _sort,
    "top": _top,
    "product": _product,
    "convolve": _convolve,
    "pool": _pool,
    "select": _select,
    "fourier": _fourier,
    "solve": _solve,
    "round": _round,
    "cast": _cast,
    "bitcast": _bitcast,
    "branch": _branch,
    "scan": _scan,
    "while": _while,
    "jit": _jit,
    "remat": _remat,
    "own_vjp": _own_vjp,
    "expand": _expand,
    "pieces": _pieces,
    "own_jvp": lambda draw, x, other: _bent(x) * other,
}
