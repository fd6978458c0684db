"""Conditionals that communicate run one after another on CPUs, and are left alone on GPUs."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers import in_order
from trellax.meshes import MeshSpec, build_mesh
from trellax.programs.execution_counts import count_executions
from trellax.programs.hlo import HloModule

from ..pipeline.unordered import find_unordered


def _two_exchanges(*, is_marked: bool) -> Any:
    """Two permutes in conditionals of their own, of arrays that have nothing to do with each other."""
    mesh = build_mesh(MeshSpec(pipe=4), devices=jax.devices()[:4])

    def send(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, "pipe", [(0, 1), (1, 2), (2, 3)])

    def exchange(x: jax.Array, mark: in_order.Mark, is_active: jax.Array) -> Any:
        def run(both: tuple[jax.Array, in_order.Mark]) -> Any:
            return send(both[0]), in_order.next_mark(both[1])

        return jax.lax.cond(in_order.after(mark, is_active == 1), run, lambda both: both, (x, mark))

    def turn(carry: Any, is_active: Any) -> Any:
        x, y, mark = carry
        x, mark = exchange(x, mark, is_active[0])
        y, mark = exchange(y, mark, is_active[1])
        return (x, y, mark), None

    def run(x: jax.Array, y: jax.Array) -> Any:
        mark = in_order.start_mark() if is_marked else None
        return jax.lax.scan(turn, (x, y, mark), jnp.asarray([[1, 0], [0, 1], [1, 1]]))[0][:2]

    fn = jax.shard_map(run, mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe"))
    x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, P("pipe")))
    return jax.jit(fn).lower(x, -x).compile(), x


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_mark_orders_conditionals_that_share_no_array(is_marked: bool) -> None:
    compiled, x = _two_exchanges(is_marked=is_marked)
    found = find_unordered(HloModule.parse(compiled.as_text()), num_devices=4)
    assert [pair.kinds for pair in found] == ([] if is_marked else [{"collective-permute"}])
    sent = jnp.concatenate([jnp.zeros(4), x[:4]])
    assert [y.tolist() for y in compiled(x, -x)] == [sent.tolist(), (-sent).tolist()]


def test_the_inspector_sees_through_the_mark() -> None:
    compiled, _ = _two_exchanges(is_marked=True)
    program = HloModule.parse(compiled.as_text())
    executions = count_executions(program, num_devices=4)
    assert executions.notes == ()


def test_nothing_is_marked_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_order.start_mark() is not None
    monkeypatch.setattr(in_order, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    assert in_order.start_mark() is None
