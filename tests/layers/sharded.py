"""What the tests of this folder share: a layer run on one device or on a mesh, its errors, and its collectives."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from trellax.layers import ModelConfig
from trellax.meshes import DEFAULT_RULES, MeshSpec, ShardingRules, build_mesh

TOLERANCE = 2e-5
"""Relative, in float32: a sum split over devices is added in another order, and the mantissa has 24 bits."""

STYLES: dict[str, dict[str, Any]] = {
    "gpt": {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "bias": "on"},
    "llama": {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off"},
    "qwen": {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "qkv", "qk_norm": "on"}
    | {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_tokens": 64, "attention_window": 5},
}


def small_config(style: str = "gpt", **changes: Any) -> ModelConfig:
    """Two layers of width 32 with 8 heads: every tensor size up to 8 fits."""
    sizes: dict[str, Any] = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 8, "max_tokens": 16}
    return ModelConfig(**(sizes | STYLES[style] | changes))


@cache
def mesh_of(text: str) -> Mesh:
    """The mesh `data=2,tensor=4` says, on the first of the eight fake devices."""
    spec = MeshSpec.parse(text)
    return build_mesh(spec, devices=jax.devices()[: spec.num_devices])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw_params(module: nnx.Module) -> dict[str, Any]:
    """Parameters in numpy, moved off their zeros and ones, which would hide a bias or scale that is used twice."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return (rng.standard_normal(leaf.shape) * 0.1 + ("scale" in str(path))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def dims_of(module: nnx.Module) -> dict[str, Any]:
    """Logical dimensions of every parameter of a layer that is not stacked."""
    return nnx.to_pure_dict(
        nnx.map_state(lambda _, leaf: leaf.get_metadata("out_sharding"), nnx.state(module, nnx.Param))
    )


def place(params: Any, dims: Any, *, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """The parameters on the mesh, each split as its dimensions say."""

    def put(own: Any, leaf: Any) -> jax.Array:
        return jax.device_put(leaf, rules.sharding(own, shape=leaf.shape, mesh=mesh))

    return jax.tree.map(put, dims, params, is_leaf=lambda node: isinstance(node, tuple))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A layer with drawn parameters: run it and its backward on any mesh, or compile it to read the program."""

    graph: Any
    params: dict[str, Any]
    dims: dict[str, Any]
    rules: ShardingRules

    @classmethod
    def of(cls, build: Callable[[], nnx.Module], *, rules: ShardingRules = DEFAULT_RULES) -> "Probe":
        """Probe the module that `build` makes; nothing is allocated."""
        module = nnx.eval_shape(build)
        return cls(graph=nnx.split(module)[0], params=draw_params(module), dims=dims_of(module), rules=rules)

    def forward(self, params: Any, x: Any) -> jax.Array:
        """Merge and call."""
        return nnx.merge(self.graph, params)(x)

    def backward(self, params: Any, x: Any) -> dict[str, Any]:
        """Output, and the gradients of a random projection of it."""
        run = self.forward if jnp.issubdtype(x.dtype, jnp.floating) else lambda params, _: self.forward(params, x)
        y, vjp = jax.vjp(run, params, x)
        grads, grad_x = vjp(jnp.asarray(normal(*y.shape, seed=2), y.dtype))
        return {"y": y, "grads": grads} | ({"x": grad_x} if jnp.issubdtype(x.dtype, jnp.floating) else {})

    def answer(self, x: np.ndarray, *, mesh: Mesh | None = None) -> dict[str, Any]:
        """Run forward and backward; on one device without a mesh."""
        if mesh is None:
            return jax.device_get(jax.jit(self.backward)(self.params, x))
        with jax.set_mesh(mesh):
            params = place(self.params, self.dims, mesh=mesh, rules=self.rules)
            return jax.device_get(jax.jit(self.backward)(params, self._split(x, mesh)))

    def program(self, x: np.ndarray, *, mesh: Mesh) -> str:
        """The compiled forward, as HLO text."""
        with jax.set_mesh(mesh):
            params = place(self.params, self.dims, mesh=mesh, rules=self.rules)
            return text_of(jax.jit(self.forward).lower(params, self._split(x, mesh)).compile())

    def _split(self, x: np.ndarray, mesh: Mesh) -> jax.Array:
        return place(x, ("batch", *[None] * (x.ndim - 1)), mesh=mesh)


def errors_of(actual: Any, expected: Any) -> dict[str, float]:
    """Largest difference of each leaf over the largest value in its layer, but no less than 1e-3 of the largest of all.

    In its layer, since kernel and bias gradients add up the same numbers: that of a key bias is mathematically zero,
    and what is computed there is the rounding of numbers as large as those of its kernel.
    """
    wanted, found = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (expected, actual))
    assert found.keys() == wanted.keys()
    top = max(np.abs(leaf).max() for leaf in wanted.values())
    errors = {}
    for path, leaf in wanted.items():
        layer = [np.abs(other).max() for name, other in wanted.items() if name[:-1] == path[:-1]]
        scale = max(*layer, 1e-3 * top)
        difference = np.abs(np.asarray(found[path], np.float64) - np.asarray(leaf, np.float64)).max()
        errors[jax.tree_util.keystr(path, simple=True, separator=".")] = float(difference / scale)
    return errors


def differing(actual: Any, expected: Any, *, tolerance: float = TOLERANCE) -> dict[str, float]:
    """The errors beyond the tolerance, by name; NaN is beyond."""
    return {name: error for name, error in errors_of(actual, expected).items() if not error <= tolerance}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """An array that a collective of a compiled program sends: how, its shape, and whether in a loop or once."""

    kind: str
    shape: tuple[int, ...]
    where: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def text_of(compiled: Any) -> str:
    """The HLO of a compiled program."""
    return compiled.as_text() or ""


def collectives(program: str) -> list[Collective]:
    """Every array sent in an HLO text, in order; `where` is "loop" in the body of a while and "once" elsewhere."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    found, name = [], ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[1]
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        if hit := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            for dims in re.findall(r"\w+\[([\d,]*)\]", hit[1]):
                shape = tuple(int(n) for n in dims.split(",") if n)
                found.append(Collective(kind=hit[2], shape=shape, where="loop" if name in bodies else "once"))
    return found
