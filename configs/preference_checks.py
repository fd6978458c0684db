"""Check a run on preferences: pairs stay in one microbatch of a data shard, and keys without a use for them are off."""

from collections.abc import Iterator

from ..meshes import ConfigError, MeshSpec, TrellaxError
from .run_config import RunConfig


def find_preference_errors(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error for each key that does not fit data.source='pairs'."""
    if config.data.source != "pairs":
        return
    if not config.train.init_from:
        yield ConfigError(
            "data.source='pairs' trains a model beside its initial weights, and train.init_from is empty.",
            fix="set train.init_from to a Hugging Face or run folder.",
        )
    size, parts = config.train.batch_size, config.pipeline.microbatches * max(1, mesh.data)
    if size % (2 * parts):
        yield ConfigError(
            f"train.batch_size={size} is {size / parts:g} rows for each microbatch and data shard, of "
            f"{config.pipeline.microbatches} x {parts // config.pipeline.microbatches}; a pair is two of them.",
            fix=f"set train.batch_size={2 * parts * max(1, round(size / parts / 2))}.",
        )
    tokens = "a loss of whole answers needs all tokens of a row"
    off = {f"mesh.{axis}": (mesh.sizes[axis], 1, tokens) for axis in mesh.roles.context} | {
        "model.num_experts": (config.model.num_experts, 0, "routers weigh tokens by a loss of tokens"),
        "data.packing": (config.data.packing, "off", "each row is a sequence of its own"),
        "data.shuffle": (config.data.shuffle, "sequences", "pairs are shuffled"),
        "data.weights": (config.data.weights, (), "there is no blend of pairs"),
        "data.validation": (config.data.validation, (), "the validation set is a part of the pairs"),
        "train.z_loss": (config.train.z_loss, 0.0, "it is added to the loss of tokens"),
        "train.noise_scale": (config.train.noise_scale, "off", "a pair is no sequence"),
    }
    for key, (value, wanted, why) in off.items():
        if value != wanted:
            yield ConfigError(
                f"{key}={value} with data.source='pairs': {why}.", fix=f"set {key}={wanted!r}, or leave it out."
            )
