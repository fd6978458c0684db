"""The operations of a program in its profile, by time and class."""

from pathlib import Path

import jax
import jax.numpy as jnp
from trellax.programs.trace import format_operations, list_operations, sum_classes


def test_products_of_a_loop_are_found_as_often_as_they_ran(tmp_path: Path) -> None:
    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ y), x)

    @jax.jit
    def validate(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.tanh(y @ y), x)

    x = jnp.eye(128)
    compiled = run.lower(x).compile()
    jax.block_until_ready((compiled(x), validate(x)))
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            jax.block_until_ready(compiled(x))
        # Another program, whose instructions have the same names.
        jax.block_until_ready(validate(x))
    operations = list_operations(tmp_path, compiled, num_devices=1)
    assert [one.count for one in operations if one.kind == "matrix"] == [10]
    assert [one.time_s for one in operations] == sorted((one.time_s for one in operations), reverse=True)
    assert set(sum_classes(operations)) == {"matrix", "vector"}
    text = format_operations(operations, num_steps=2, top=1)
    assert text.startswith(f"{500 * sum(one.time_s for one in operations):,.1f} ms a step")
    assert len(text.splitlines()) == 2
