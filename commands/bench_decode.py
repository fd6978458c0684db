"""`trellax bench-decode`: measure latency and throughput of decoding, and compare them with the memory roofline."""

import argparse
import io
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from ..configs.run_config import load_config
from ..hub.cached_folder import find_model_folder
from ..hub.model_folder import open_model
from ..layers import ModelConfig, bytes_per_device
from ..meshes import ConfigError, MeshSpec, ServeError, use_fake_devices
from ..meshes.build import visible_devices
from ..meshes.columns import align
from ..meshes.numbers import whole_number
from ..plan.machines.detect import detect_topology
from ..programs.hardware import measure_host
from ..serve import Engine, Sizes, check_model, param_shapes
from ..serve.measure import draw_params, measure_decode
from ..serve.params import stage_shapes
from ..serve.state import state_shapes
from .engine import apply_dtype, open_mesh, quantize_and_tell, resolve_mesh
from .output_file import check_output_files, write_output_file

_GIB = 2**30


def run_bench_decode(args: argparse.Namespace) -> int:
    """Measure every batch size on every mesh, print a table, and return the exit code.

    Raises:
        TrellaxError: a mesh or batch size does not fit the model or the memory; nothing is measured then.
    """
    check_output_files(args.png)
    if args.fake_devices:
        use_fake_devices(args.fake_devices)
    specs = [resolve_mesh(text) for text in args.meshes.split(";") if text.strip()]
    if not specs:
        raise ConfigError(
            f"--meshes {args.meshes!r} names no mesh.", fix="write for example --meshes 'tensor=4;pipe=4'."
        )
    batches = _read_batches(args)
    config, read = _open_model(args)
    trials = [_Trial(config, spec, batch, args) for spec in specs for batch in batches]
    memory = _Memory()
    for trial in trials:
        trial.check(memory)
    rows = [trial.measure(read, memory) for trial in trials]
    if args.json:
        print(json.dumps({"memory": memory.source, "rows": rows}))
    else:
        print(_table(rows, memory, args))
    if args.png:
        _write_png(args.png, rows)
    return 0


def _read_batches(args: argparse.Namespace) -> list[int]:
    try:
        batches = [whole_number(word) for word in args.batch.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ConfigError(
            f"--batch {args.batch!r} is not a list of numbers of requests.", fix="write for example --batch 1,4,16."
        )
    if args.prompt_tokens < 1 or args.new_tokens < 2:
        raise ConfigError(
            f"--prompt-tokens {args.prompt_tokens} --new-tokens {args.new_tokens}: there is nothing to time.",
            fix="read 1 token or more and write 2 or more.",
        )
    return batches


def _open_model(args: argparse.Namespace) -> tuple[ModelConfig, Any]:
    """Return the model, and a function (mesh, axes) -> parameters: random for a config, read for a folder."""
    if find_model_folder(args.model).is_dir():
        source = open_model(args.model)
        config = apply_dtype(source.config, args)
        return config, lambda mesh, axes: source.read(param_shapes(config, mesh=mesh, axes=axes))
    config = apply_dtype(load_config(args.model).model, args)
    return config, lambda mesh, axes: draw_params(config, mesh, axes=axes)


class _Memory:
    """Size and bandwidth of device memory, and the source of these figures; fake devices share the host's memory."""

    def __init__(self) -> None:
        device, known = visible_devices()[0], detect_topology()
        self._is_shared = device.platform == "cpu"
        self._num_bytes, self._speed = (device.memory_stats() or {}).get("bytes_limit"), None
        self.source = "the speed of this device's memory is not known"
        if self._is_shared:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            host = measure_host(num_devices=1, memory_bytes=free)
            self._num_bytes, self._speed = host.memory_bytes, host.memory_bytes_per_s
            self.source = (
                f"{self._speed / 1e9:,.1f} GB/s for a copy on this machine, measured now and shared by the devices of "
                "a mesh; caches are faster"
            )
        elif known:
            self._speed = known.accelerator.memory_bytes_per_s
            self.source = f"{self._speed / 1e9:,.0f} GB/s by the data sheet of {device.device_kind}"

    def num_bytes(self, mesh: MeshSpec) -> float | None:
        """Return the memory of each device of a mesh in bytes, or None if it is unknown."""
        return self._share(self._num_bytes, mesh)

    def bytes_per_s(self, mesh: MeshSpec) -> float | None:
        """Return the memory bandwidth of each device of a mesh in bytes/s, or None if it is unknown."""
        return self._share(self._speed, mesh)

    def _share(self, whole: float | None, mesh: MeshSpec) -> float | None:
        return None if whole is None else whole / (mesh.num_devices if self._is_shared else 1)


class _Trial:
    """One mesh and batch size to measure: a row of the table."""

    def __init__(self, config: ModelConfig, spec: MeshSpec, batch: int, args: argparse.Namespace) -> None:
        self.config, self.spec, self.batch, self.args = config, spec, batch, args
        # With fewer requests than stages, a group for each stage would leave some without a request.
        groups = args.groups or min(spec.pipe, -(-batch // spec.data))
        parts = spec.data * groups
        self.sizes = Sizes(
            slots=-(-batch // parts) * parts,
            max_tokens=args.prompt_tokens + args.new_tokens,
            groups=groups,
            num_shards=spec.data,
            chunk=args.chunk,
            items=16,
            rounds=8,
        )

    def check(self, memory: _Memory) -> None:
        """Check that the model splits over the mesh, and that weights and cache fit into memory; allocates nothing.

        Raises:
            TrellaxError: the model does not split, or the memory is too small.
        """
        axes = self.spec.roles
        check_model(self.config, self.spec.sizes, max_tokens=self.sizes.max_tokens, axes=axes)
        mesh, dtype = open_mesh(self.spec), self.args.cache_dtype or self.config.dtype
        state = state_shapes(self.config, self.sizes, mesh=mesh, cache_dtype=dtype, axes=axes)
        cache = bytes_per_device(state)
        weights = bytes_per_device(stage_shapes(self.config, mesh=mesh, axes=axes, weights=self.args.weights))
        room = memory.num_bytes(self.spec)
        if room is not None and weights + cache > room:
            raise ServeError(
                f"{self.spec} with {self.batch} requests: a device would hold {weights / _GIB:.1f} GiB of weights and "
                f"{cache / _GIB:.1f} GiB of cache, and has {room / _GIB:.1f} GiB.",
                fix="use more devices, fewer requests, --weights int8, or --cache-dtype bfloat16.",
            )

    def measure(self, read: Any, memory: _Memory) -> dict[str, Any]:
        """Build an engine, run it once to compile and once to be timed, and return the row."""
        print(f"{self.spec}, {self.batch} requests ...", file=sys.stderr)
        mesh, sizes = open_mesh(self.spec), self.sizes
        params = read(mesh, self.spec.roles)
        engine = Engine(
            self.config,
            quantize_and_tell(params, self.config, self.spec, self.args, mesh=mesh),
            mesh=mesh,
            axes=self.spec.roles,
            slots=sizes.slots,
            max_tokens=sizes.max_tokens,
            groups=sizes.groups,
            chunk=sizes.chunk,
            cache_dtype=self.args.cache_dtype,
        )
        times = measure_decode(engine, batch=self.batch, prompt=self.args.prompt_tokens, new=self.args.new_tokens)
        speed = memory.bytes_per_s(self.spec)
        share = None if speed is None else times.roofline_share(speed)
        return {"mesh": str(self.spec), "batch": self.batch} | asdict(times) | {"roofline_share": share}


def _table(rows: list[dict[str, Any]], memory: _Memory, args: argparse.Namespace) -> str:
    head = ["mesh", "requests", "first token ms", "per token ms", "tokens/s", "stages idle", "of memory's roofline"]
    lines = [
        [
            row["mesh"],
            str(row["batch"]),
            f"{1e3 * row['first_token_s']:.1f}",
            f"{1e3 * row['per_token_s']:.2f}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['idle_share']:.0%}",
            "-" if row["roofline_share"] is None else f"{row['roofline_share']:.1%}",
        ]
        for row in rows
    ]
    about = f"{args.prompt_tokens} tokens read and {args.new_tokens} written for each request\n"
    return f"{about}{align([head, *lines])}\nmemory: {memory.source}"


def _write_png(path: str, rows: list[dict[str, Any]]) -> None:
    # matplotlib takes half a second to import, and few calls draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for mesh in dict.fromkeys(row["mesh"] for row in rows):
        own = [row for row in rows if row["mesh"] == mesh]
        latency, throughput = [1e3 * row["per_token_s"] for row in own], [row["tokens_per_s"] for row in own]
        axes.plot(latency, throughput, marker="o", label=mesh)
        for x, y, row in zip(latency, throughput, own, strict=True):
            axes.annotate(str(row["batch"]), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="milliseconds a token of one request", ylabel="tokens/s of all requests", title="requests at a time"
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_output_file(path, buffer.getvalue())
