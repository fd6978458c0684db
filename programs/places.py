"""Shorten the names by which jax says where in a user's program an instruction comes from."""

_EMPTY_SCOPES = ("while", "body", "eval_jaxpr", "closed_call", "cond", "shard_map", "branch_0_fun", "branch_1_fun")
_NUM_PARTS = 3


def shorten_place(op_name: str) -> str:
    """Return the last three parts of a path of jax's scopes, without uninformative ones.

    >>> shorten_place("jit(step)/shard_map/while/body/eval_jaxpr/forward/while/body/jvp()/reduce_scatter")
    'forward/jvp()/reduce_scatter'
    """
    parts = [part for part in op_name.split("/") if part not in _EMPTY_SCOPES]
    return "/".join(parts[-_NUM_PARTS:])
