"""Check the sizes of an engine and of its requests before devices are used or weights are read."""

from collections.abc import Mapping
from typing import get_args

from ..layers import ModelConfig, model_rules
from ..layers.attention.cache import CacheDtype
from ..layers.own.load import load_class
from ..meshes import MeshAxes, ServeError, ShardingRules
from ..meshes.arguments import check_choice, check_count
from ..meshes.axes import DEFAULT_AXES
from ..meshes.switches import Switch, check_switches
from .requests import Request
from .stacks import LayerLoop, layers_of_stages
from .state import MAX_STOPS, Fill


def check_model(
    config: ModelConfig, sizes: Mapping[str, int], *, max_tokens: int, axes: MeshAxes = DEFAULT_AXES
) -> None:
    """Raise unless a model can be served on a mesh of these sizes with a cache of `max_tokens` tokens.

    Args:
        axes: roles of the axes, `spec.roles`, if they have names of their own.

    Raises:
        MeshError: an axis with several devices has no role.
        ModelError: heads or feed-forward features do not split over `tensor`, or experts over `expert`.
        ScheduleError: there are fewer layers than stages.
        ServeError: `max_tokens` is below 1, the cache is longer than the context of the model, an axis splits the
            tokens of a sequence, or a class of the user's has no cache.
    """
    check_count("max_tokens", max_tokens, error=ServeError)
    others = ", or to expert" if config.num_experts else ""
    for axis in axes.context:
        if sizes[axis] > 1:
            raise ServeError(
                f"the mesh has {axis}={sizes[axis]}, which splits the tokens of a sequence in training; a server keeps "
                "each sequence's cache whole.",
                fix=f"set {axis}=1, and give its devices to data, tensor or pipe{others}.",
            )
    _check_classes(config)
    model_rules(config, sizes, rules=ShardingRules.of(axes))
    layers_of_stages(config, num_ranks=sizes[axes.pipe])
    if max_tokens > config.max_tokens:
        raise ServeError(
            f"max_tokens={max_tokens} is more than the {config.max_tokens} tokens that the model can read.",
            fix=f"set max_tokens={config.max_tokens} or less.",
        )


def _check_classes(config: ModelConfig) -> None:
    """Raise unless a block or attention of the user's can read and write a cache."""
    for key in ("block", "attention_class"):
        path = getattr(config, key)
        if path and not hasattr(own := load_class(path, key=key), "extend"):
            raise ServeError(
                f"model.{key}={path!r}: {own.__name__} has no method extend, by which a server computes new tokens "
                "from a cache of the earlier ones.",
                fix="write extend(self, x_BTD, *, cache, layer, new) that returns y_BTD and the cache: "
                "Attention.extend does.",
            )


def check_request(request: Request, config: ModelConfig, *, max_tokens: int, max_stops: int = MAX_STOPS) -> None:
    """Raise unless a request fits into the cache, and its tokens into the vocabulary.

    Raises:
        ServeError: prompt and answer together are longer than a row of the cache, a token is not in the vocabulary,
            there are too many stop tokens, or `max_tokens` or `max_stops` is not a count.
    """
    check_count("max_tokens", max_tokens, error=ServeError)
    check_count("max_stops", max_stops, error=ServeError, least=0)
    prompt, new = len(request.prompt), request.max_new_tokens
    if prompt + new > max_tokens:
        room, is_model = max_tokens - prompt, prompt + new > config.max_tokens
        who = f"the model reads {config.max_tokens}" if is_model else f"the cache has max_tokens={max_tokens}"
        fix = (
            f"set max_new_tokens={room} or less" if room > 0 else f"shorten the prompt to less than {max_tokens} tokens"
        )
        raise ServeError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} are {prompt + new} tokens, but {who} for each "
            "sequence.",
            fix=f"{fix}." if is_model else f"{fix}, or set max_tokens={prompt + new}.",
        )
    for token in (*request.prompt, *request.stop, *(token for token, _ in request.logit_bias)):
        if not 0 <= token < config.vocab_size:
            raise ServeError(
                f"token id {token} is not in the vocabulary of {config.vocab_size}, ids 0 to {config.vocab_size - 1}.",
                fix="encode the text with the tokenizer of this model.",
            )
    if len(request.stop) > max_stops:
        raise ServeError(
            f"a request has {len(request.stop)} stop tokens, and an engine of max_stops={max_stops} looks for no more.",
            fix=f"set max_stops={len(request.stop)}, or give {max_stops} or fewer.",
        )


def check_values(
    cache_dtype: CacheDtype | None, layers: LayerLoop | None, fill: Fill, chunks_per_step: int, max_stops: int
) -> None:
    """Check jax's switches, and arguments of an engine that `Sizes` does not check or knows by another name.

    Raises:
        ServeError: one of them is wrong.
    """
    check_switches(*get_args(Switch), error=ServeError)
    check_count("chunks_per_step", chunks_per_step, error=ServeError)
    check_count("max_stops", max_stops, error=ServeError)
    check_choice("cache_dtype", cache_dtype, (None, *get_args(CacheDtype)), error=ServeError)
    check_choice("layers", layers, (None, *get_args(LayerLoop)), error=ServeError)
    check_choice("fill", fill, get_args(Fill), error=ServeError)
