"""Every count, number and choice of a public function, given wrongly, is refused by its name before anything is made.

Which arguments there are is read off the signatures, so a new one is in the test by itself.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from flax import nnx
from trellax.configs.run_config import OptimizerSection
from trellax.layers import ModelConfig
from trellax.meshes import MeshSpec, TrellaxError, abstract_mesh
from trellax.pipeline import PipelineParams, StageFns
from trellax.plan import Layout, ServeQuestion, TrainQuestion, read_topology
from trellax.schedules import build_schedule
from trellax.serve import Request

PUBLIC = (Path(__file__).parent / "golden" / "public_names.txt").read_text(encoding="utf-8").split()
INTERNAL = [
    *("trellax.meshes.processes.launchers.find_processes", "trellax.layers.block.rematerialize"),
    *(
        "trellax.layers.block.run_blocks",
        "trellax.layers.attention.cache.cache_shapes",
        "trellax.layers.partitioning.make_param",
    ),
]
"""Functions that no package exports, and that check what they are given all the same."""


MODEL = ModelConfig(vocab_size=64, num_layers=4, hidden_size=32, num_heads=4, max_tokens=16)
GRID = build_schedule("1f1b", num_ranks=2, num_microbatches=2)
MESH = abstract_mesh(MeshSpec())
OPTIMIZER = OptimizerSection(learning_rate=1e-3)
SIZES: dict[str, Any] = {"num_ranks": 2, "num_microbatches": 2}
TOPOLOGY = read_topology("h100x8")
TRAIN = TrainQuestion(model=MODEL, topology=TOPOLOGY, batch_size=8, num_tokens=16)
LINEAR: dict[str, Any] = {"in_size": 4, "out_size": 4, "dim": "ffn", "rngs": nnx.Rngs(0)}
FUNCTIONS: dict[str, Any] = {"first": print, "layer": print, "last": print}
PIPELINE: dict[str, Any] = {
    "fns": StageFns(**FUNCTIONS),
    "params": PipelineParams(stages={}, shared={}),
    "batch": {},
    "mesh": MESH,
    "schedule": GRID,
}
PLACED: dict[str, Any] = {"model": MODEL, "layout": Layout()}

CALLS: dict[str, dict[str, Any]] = {
    "meshes.MeshSpec": {},
    "meshes.mesh_sizes": {"mesh": MESH},
    "meshes.processes.launchers.find_processes": {"coordinator": "localhost:1", "count": 2, "index": 0, "environ": {}},
    "meshes.use_fake_devices": {"num_devices": 8},
    "layers.ColumnLinear": LINEAR,
    "layers.MLP": {"config": MODEL, "rngs": nnx.Rngs(0)},
    "layers.ModelConfig": {"vocab_size": 64, "num_layers": 4, "hidden_size": 32, "num_heads": 4},
    "layers.activation_bytes": {"config": MODEL, "num_sequences": 1, "num_tokens": 8},
    "layers.attention.cache.cache_shapes": {
        "config": MODEL,
        "mesh": MESH,
        "num_rows": 1,
        "num_pages": 1,
        "page": 8,
        "dtype": "float32",
        "stacks": (4,),
    },
    "layers.flops_per_token": {"config": MODEL, "num_tokens": 8},
    "layers.RowLinear": LINEAR,
    "layers.partitioning.make_param": {"key": None, "shape": (2,), "dims": ("embed",), "std": 1.0},
    "layers.Transformer": {"config": MODEL, "rngs": None},
    "layers.block.run_blocks": {"graph": None, "params_L": None, "x_BTD": None},
    "layers.block.rematerialize": {"layer": print, "remat": "dots"},
    "schedules.Action": {"stage": 0, "kind": "F", "microbatch": 0},
    "schedules.StageCost": {"forward": 1.0, "input_grad": 1.0, "weight_grad": 1.0},
    "pipeline.StageFns": FUNCTIONS,
    "pipeline.balance_layers": {"num_layers": 4, "num_stages": 2},
    "schedules.build_schedule": SIZES | {"name": "1f1b"},
    "pipeline.compiler_options": {"mesh": MESH},
    "pipeline.natural_order": {"stages": {}},
    "pipeline.check_layers": {"num_layers": 4, "num_ranks": 2},
    "pipeline.lower": {"schedule": GRID},
    "pipeline.pipeline_grads": PIPELINE,
    "pipeline.pipeline_loss": PIPELINE,
    "pipeline.resolve_layers": {"config": MODEL, "num_ranks": 2, "num_tokens": 8},
    "schedules.simulate": {"schedule": GRID},
    "pipeline.split_transformer": {"config": MODEL, "mesh": MESH},
    "pipeline.stage_costs": {"config": MODEL, "layers_per_stage": (2, 2), "num_tokens": 8},
    "pipeline.stages_from_layers": {"layers": {}, "num_ranks": 2},
    "schedules.Schedule": SIZES | {"name": "mine", "ticks": GRID.ticks},
    "schedules.Family": {"name": "mine", "build": print},
    "schedules.draw_picture": {"schedule": GRID},
    "schedules.explain_difference": {"schedule": GRID, "formula": None, "timing": None},
    "schedules.find_formula": {"schedule": GRID},
    "schedules.load_schedule": {"path": "mine.csv"},
    "schedules.schedule_from_csv": {"text": "0F0,0B0", "name": "mine"},
    "schedules.schedule_from_orders": {"orders": [[], []], "name": "mine", "num_microbatches": 2},
    "schedules.time_actions": {"schedule": GRID},
    "schedules.trace_from_schedule": {"schedule": GRID},
    "plan.Layout": {},
    "plan.Runtime": {},
    "plan.ServeQuestion": {"model": MODEL, "topology": TOPOLOGY},
    "plan.StepSizes": {"model": MODEL, "mesh": MeshSpec(), "num_microbatches": 1, "num_sequences": 1, "num_tokens": 8},
    "programs.Target": {"name": "cpu"},
    "plan.Topology": {"name": "mine", "accelerator": TOPOLOGY.accelerator, "num_devices": 8, "devices_per_node": 8},
    "plan.TrainQuestion": {"model": MODEL, "topology": TOPOLOGY, "batch_size": 8, "num_tokens": 16},
    "programs.assert_fits": {"report": None, "memory_bytes": 1},
    "programs.assert_sends_at_most": {"report": None, "over": "data"},
    "programs.assert_sends_near_minimum": {"report": None, "over": "data"},
    "plan.inference_time": PLACED | {"topology": TOPOLOGY, "batch": 1, "prompt": 8, "generated": 8},
    "programs.open_target": {"target": None, "num_devices": 1},
    "plan.search_serving": {"question": ServeQuestion(model=MODEL, topology=TOPOLOGY), "objective": "latency"},
    "plan.search_train": {"question": TRAIN},
    "plan.step_memory": PLACED | {"num_tokens": 8},
    "plan.step_time": PLACED | {"topology": TOPOLOGY, "num_tokens": 8},
    "plan.trellax_runtime": {"model": MODEL, "accelerator": TOPOLOGY.accelerator},
    "serve.AsyncEngine": {"engine": None},
    "serve.Engine": {"config": MODEL, "params": None, "mesh": MESH},
    "serve.Request": {"prompt": (1,)},
    "serve.Sizes": {"slots": 2, "max_tokens": 8, "groups": 1, "num_shards": 1, "chunk": 4, "items": 1, "rounds": 1},
    "serve.check_model": {"config": MODEL, "sizes": MESH.shape, "max_tokens": 8},
    "serve.check_request": {"request": Request(prompt=(1,)), "config": MODEL, "max_tokens": 8},
    "train.Batches": {"tokens": np.zeros(99, np.int32), "seq_len": 8, "batch_size": 2, "microbatches": 1, "seed": 0},
    "train.Checkpoints": {"run_folder": "mine", "keep": 1},
    "configs.check_run": {"config": None, "num_devices": 8},
    "train.describe_run": {"setup": None},
    "train.draw_schedule": {"schedule": GRID},
    "train.evaluate": {"folder": "mine"},
    "train.evaluate_files": {"folder": "mine", "files": ()},
    "train.load_corpus": {"data": None},
    "serve.Constraint": {"kind": "regex", "text": "[0-9]+"},
    "serve.Speculation": {},
    "serve.param_shapes": {"config": MODEL, "mesh": MESH},
    "serve.quantize_params": {"params": None, "config": MODEL, "mesh": MESH, "weights": "int8"},
    "serve.load_for_serving": {"path": "mine", "mesh": MESH},
    "hub.load_model": {"folder": "mine"},
    "hub.load_params": {"folder": "mine", "shapes": {}},
    "hub.open_model": {"folder": "mine"},
    "train.make_learning_rate": {"section": OPTIMIZER, "steps": 8},
    "train.make_optimizer": {"section": OPTIMIZER, "steps": 8},
    "train.train": {"config": None},
    "hub.write_weights": {"params": {}, "config": MODEL, "folder": "mine"},
}
"""What each public function and class may be called with; the arguments that follow are put in one by one."""

RESULTS = {
    *("layers.ActivationBytes", "layers.FlopCounts", "layers.ParamCounts"),
    *("pipeline.Tables", "schedules.Timing", "schedules.Formula", "schedules.Span"),
    *(
        "plan.Accelerator",
        "plan.Diagnosis",
        "programs.Hardware",
        "plan.InferenceTime",
        "programs.Machine",
        "programs.Memory",
    ),
    *(
        "plan.MemoryUse",
        "plan.Plan",
        "programs.ProgramReport",
        "plan.StepTime",
        "programs.Traffic",
        "programs.inspect_compiled",
        "programs.measure_host",
    ),
    *(
        "serve.Completion",
        "serve.ServedSequence",
        "serve.TokenLogprobs",
        "serve.Usage",
        "train.Corpus",
        "train.FileLoss",
        "hub.ModelTokenizer",
        "train.Summary",
        "train.prepare",
    ),
}
"""What functions of ours give, or read out of files that they check; and what takes no value before it has compiled."""

BELOW_ZERO = {"first_sequence"}
"""What may be negative."""

WRONG: dict[str, tuple[Any, ...]] = {
    "choice": ("nonsense", True),
    "count": (2.5, True, "2", -3),
    "number": ("1", float("nan")),
}


def kind_of(annotation: Any) -> str | None:
    own = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if any(get_origin(part) is Literal for part in own):
        return "choice"
    return "count" if int in own else "number" if float in own else None


def arguments() -> Iterator[tuple[str, Any, str, str]]:
    """Name of a public function, itself, an argument of it, and what kind of value that takes; each object once."""
    seen = []
    for path in [*PUBLIC, *INTERNAL]:
        module, _, own = path.rpartition(".")
        thing = getattr(import_module(module), own)
        if not callable(thing) or get_origin(thing) is not None or thing in seen:
            continue
        seen.append(thing)
        call: Any = thing.__init__ if inspect.isclass(thing) else thing
        for name, parameter in inspect.signature(call).parameters.items():
            kind = kind_of(parameter.annotation)
            if kind is not None and parameter.kind is not parameter.VAR_KEYWORD:
                yield path.removeprefix("trellax."), thing, name, kind


ARGUMENTS = list(arguments())


def test_every_argument_is_tried() -> None:
    assert {path for path, *_ in ARGUMENTS} == CALLS.keys() | RESULTS


@pytest.mark.parametrize("path", CALLS)
def test_wrong_values_are_refused_by_name(path: str) -> None:
    for own, thing, name, kind in ARGUMENTS:
        for value in WRONG[kind] if own == path else ():
            if value == -3 and name in BELOW_ZERO:
                continue
            with pytest.raises(TrellaxError, match=name.split("_")[-1]):
                thing(**(CALLS[path] | {name: value}))
