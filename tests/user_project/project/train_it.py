"""A training script of a user's: from a config, and with a loop of their own."""

from pathlib import Path
from typing import assert_type

import jax
from trellax.configs import RunConfig, load_config
from trellax.layers import ModelConfig, ParamCounts, param_counts
from trellax.meshes import MeshSpec, TrellaxError
from trellax.train import (
    Batches,
    Checkpoints,
    Setup,
    StepMetrics,
    Summary,
    TrainState,
    evaluate,
    load_corpus,
    make_train_step,
    prepare,
    train,
)


def run(name: str, *, steps: int) -> float | None:
    config = load_config("tiny-dense", ["--run.name", name, f"--train.steps={steps}"])
    assert_type(config, RunConfig)
    assert_type(config.model, ModelConfig)
    assert_type(config.optimizer.learning_rate, float)
    assert_type(config.run_folder, Path)
    summary = train(config, start="fresh")
    assert_type(summary, Summary)
    assert_type(summary.steps, int)
    assert_type(evaluate(summary.folder), float)
    return summary.final_val_loss


def go_on(config: RunConfig, folder: str) -> StepMetrics | None:
    setup = prepare(config)
    assert_type(setup, Setup)
    metrics: StepMetrics | None = None
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(setup)
        assert_type(state, TrainState)
        step = make_train_step(setup)
        batches = Batches(
            load_corpus(config.data).train,
            seq_len=config.data.seq_len,
            batch_size=config.train.batch_size,
            microbatches=config.pipeline.microbatches,
            seed=config.run.seed,
        )
        for index in range(3):
            batch = jax.device_put(batches[index], setup.batch_sharding)
            state, metrics = step(state, batch, setup.peak_rate)
        checkpoints.save(state, setup)
    return metrics


def size_of(layers: int) -> int:
    try:
        config = ModelConfig(
            vocab_size=256, num_layers=layers, hidden_size=64, num_heads=4, lora_targets=("mlp.*",), lora_rank=2
        )
    except TrellaxError as error:
        assert_type(error.fix, str | None)
        return 0
    counts = param_counts(config)
    assert_type(counts, ParamCounts)
    assert_type(MeshSpec(data=2, tensor=2).num_devices, int)
    return counts.trained
