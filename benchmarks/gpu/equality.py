"""Check that training steps and answers on a GPU equal those on the CPU of the same machine.

Command:  python benchmarks/gpu/equality.py [--json]

Small models with random weights, dense and of experts, take the same weights and batches to both devices: losses and
gradient norms of five steps in float32 with exact products (relative 2e-5 at the first step, whose weights are equal;
1e-3 at later ones, since AdamW divides small gradients by their size), in bfloat16 (2e-2, its rounding), and greedy
answers of up to 48 tokens in float32, which must be identical. The exit code is 1 if anything is further apart.
"""

import sys
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from trellax.commands.inspect_step import compile_step
from trellax.configs import RunConfig, load_config
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import Engine, Request
from trellax.serve.measure import draw_params
from trellax.train.state import Setup

from benchmarks.arguments import make_parser
from benchmarks.gpu.trellax_step import make_batch
from benchmarks.rounds import tell
from benchmarks.targets import Target, exit_code, format_targets, print_json

STEPS, NEW_TOKENS = 5, 48
SETTINGS = {
    "tiny-llama, float32": ("tiny-llama", []),
    "tiny-moe, float32": ("tiny-moe", []),
    "tiny-llama, bfloat16": ("tiny-llama", ["--model.dtype", "bfloat16"]),
    "tiny-moe, bfloat16": ("tiny-moe", ["--model.dtype", "bfloat16"]),
}


def main() -> int:
    arguments = make_parser(__doc__).parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    here, there = jax.devices("cpu")[0], jax.devices()[0]
    targets = []
    for name, (config, words) in SETTINGS.items():
        tell(name)
        targets += judge(name, *compare_steps(load_config(config, words), here, there))
    for config in ("tiny-llama", "tiny-moe"):
        tell(f"answers of {config}")
        answers = compare_answers(load_config(config, []), here, there)
        targets.append(Target.at_most(f"{config}: answers that differ", answers, 0))
    report = {"device": there.device_kind, "jax": jax.__version__}
    if arguments.json:
        print_json(report, targets)
    else:
        print(f"{report['device']} and the CPU, jax {report['jax']}\n{format_targets(targets)}")
    return exit_code(targets)


def compare_steps(config: RunConfig, here: Any, there: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return losses and gradient norms [steps, 2] of the same steps on two devices."""
    host = Setup(config, build_mesh(MeshSpec(), devices=[here]))
    start = jax.tree.map(np.asarray, host.init_state())
    return run_steps(host, start), run_steps(Setup(config, build_mesh(MeshSpec(), devices=[there])), start)


def run_steps(setup: Setup, start: Any) -> np.ndarray:
    compiled, _ = compile_step(setup)
    state = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), start, setup.shapes)
    batch, found = make_batch(setup), []
    for _ in range(STEPS):
        state, metrics = compiled(state, batch, setup.peak_rate)
        found.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.asarray(found)


def judge(name: str, host: np.ndarray, device: np.ndarray) -> list[Target]:
    """Compare the first step, and the later ones."""
    apart = np.abs(device - host) / np.abs(host)
    apart = np.where(np.isfinite(apart), apart, np.inf).max(1)
    first, later = (2e-5, 1e-3) if "float32" in name else (2e-2, 2e-2)
    return [
        Target.at_most(f"{name}: first step / {first:g}", float(apart[0]) / first, 1),
        Target.at_most(f"{name}: steps 2 to {STEPS} / {later:g}", float(apart[1:].max()) / later, 1),
    ]


def compare_answers(config: RunConfig, here: Any, there: Any) -> int:
    """Return the number of prompts whose greedy answers differ between two devices."""
    model, found = config.model, []
    rng = np.random.default_rng(0)
    limit = model.max_tokens
    prompts = [tuple(rng.integers(0, model.vocab_size, size).tolist()) for size in (1, 3, 7, 12)]
    params = draw_params(model, build_mesh(MeshSpec(), devices=[here]))
    start = jax.tree.map(np.asarray, params)
    for device in (here, there):
        mesh = build_mesh(MeshSpec(), devices=[device])
        own = jax.tree.map(lambda leaf: jax.device_put(leaf, device), start)  # noqa: B023
        with jax.default_device(device):
            engine = Engine(model, own, mesh=mesh, slots=4, max_tokens=limit, chunk=8)
            room = min(NEW_TOKENS, limit - 12)
            asked = [Request(prompt=prompt, max_new_tokens=room) for prompt in prompts]
            found.append([answer.tokens for answer in engine.generate(asked)])
    return sum(one != other for one, other in zip(*found, strict=True))


if __name__ == "__main__":
    sys.exit(main())
