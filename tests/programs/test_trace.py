"""The operations of a program in its profile, by time and class."""

from pathlib import Path

import jax
import jax.numpy as jnp
from trellax.programs.hlo import HloModule
from trellax.programs.trace import _find_wrappers, format_operations, list_operations, sum_classes


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


def test_kernel_of_a_product_inside_a_fusion_counts_for_the_fusion() -> None:
    """On GPUs cuBLAS's products that read a slice in place are wrapped, and their kernels have the inner name."""
    text = """HloModule jit_step, is_scheduled=true

%inner (p0: bf16[8,8], p1: bf16[8,8]) -> bf16[8,8] {
  %p0 = bf16[8,8]{1,0} parameter(0)
  %p1 = bf16[8,8]{1,0} parameter(1)
  ROOT %custom-call.7 = bf16[8,8]{1,0} custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul"
}

ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %dynamic_slice_fusion.3 = bf16[8,8]{1,0} fusion(%a, %a), kind=kCustom, calls=%inner
}
"""
    assert _find_wrappers(HloModule.parse(text))["custom-call.7"] == "dynamic_slice_fusion.3"
