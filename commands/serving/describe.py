"""`trellax describe --serve`: the bytes of an engine on each device, from shapes alone; nothing is compiled."""

import argparse
import json
from typing import Any

from ...configs.run_config import RunConfig
from ...layers import bytes_per_device
from ...meshes.columns import align
from ...programs.report_tables import format_bytes
from ...serve.inspection.least import least_bytes
from ...serve.params import stage_shapes
from ...serve.state import state_shapes
from ..engine import open_mesh, resolve_devices
from .sizes import Served, served_by


def run_describe_serving(config: RunConfig, args: argparse.Namespace) -> int:
    """Print what an engine holds and reads, and return the exit code.

    Raises:
        TrellaxError: the engine does not fit model, mesh or devices.
    """
    served = served_by(config, resolve_devices(config.mesh, fake_devices=config.run.fake_devices), args)
    numbers = _count(served)
    print(json.dumps(numbers) if args.json else _format(served, numbers))
    return 0


def _count(served: Served) -> dict[str, Any]:
    """Return the bytes of weights, cache and state on each device, of a token of the cache, and those of a tick."""
    mesh = open_mesh(served.spec)
    own: dict[str, Any] = {"mesh": mesh, "axes": served.spec.roles}
    formats: dict[str, Any] = {"cache_dtype": served.cache_dtype}
    state = state_shapes(served.config, served.sizes, **own, **formats)
    cache = bytes_per_device(state.cache)
    formats |= {"weights": served.weights, "rows": served.sizes.group_size, "context": served.sizes.max_tokens}
    least = least_bytes(served.config, served.sizes, **own, **formats)
    return {
        "slots": served.sizes.slots,
        "max_tokens": served.sizes.max_tokens,
        "weights": bytes_per_device(stage_shapes(served.config, **own, weights=served.weights)),
        "cache": cache,
        "state": bytes_per_device(state) - cache,
        "cached_token": cache / (served.sizes.cached_tokens / served.sizes.num_shards),
        "read_weights": max(least.weights),
        "read_cache": max(least.cache),
    }


def _format(served: Served, numbers: dict[str, Any]) -> str:
    sizes = served.sizes
    total = numbers["weights"] + numbers["cache"] + numbers["state"]
    lines = [("a device holds", "bytes", "")]
    lines += [(name, f"{numbers[name]:,}", format_bytes(numbers[name])) for name in ("weights", "cache", "state")]
    lines.append(("total", f"{total:,}", format_bytes(total)))
    return (
        f"mesh      {served.spec}\n"
        f"engine    {sizes.slots} slots of {sizes.max_tokens:,} tokens in {sizes.groups} groups a data shard; weights "
        f"{served.weights}, cache {served.cache_dtype}\n\n{align(lines)}\n\n"
        f"a token in the cache takes {numbers['cached_token']:,.0f} bytes of a device; for a token of each of "
        f"{sizes.group_size} full sequences\na device reads {format_bytes(numbers['read_weights'])} of weights and "
        f"{format_bytes(numbers['read_cache'])} of cache.\n"
        "`trellax inspect --serve` compiles the programs, and adds temporary memory, kernels and time."
    )
