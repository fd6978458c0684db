"""Count the parameters, the weights and the residuals of a model's adapters."""

from typing import Any

from .linears import Linear, adapted_by_run, adapted_of, has_adapted_head, head_linear, layer_runs


def count_adapters(config: Any) -> int:
    """Return the number of parameters of the adapters of all blocks, with the magnitudes of columns."""
    given: dict[str, Any] = {"rank": config.lora_rank, "magnitude": config.lora_magnitude}
    runs = zip(layer_runs(config), adapted_by_run(config), strict=True)
    return sum(run.count * sum(one.adapter_params(**given) for one in own) for run, own in runs)


def count_head_adapter(config: Any) -> int:
    """Return the number of parameters of the adapter of the output table, 0 if it has none."""
    if not has_adapted_head(config):
        return 0
    return head_linear(config).adapter_params(config.lora_rank, magnitude=config.lora_magnitude)


def used_weights(config: Any) -> int:
    """Return the weights of adapters that a token uses: of experts those that it chooses."""
    runs = zip(layer_runs(config), adapted_by_run(config), strict=True)
    of_head = config.lora_rank * (config.hidden_size + config.vocab_size) if has_adapted_head(config) else 0
    return of_head + sum(
        run.count * config.lora_rank * (one.num_in + one.num_out) * (config.experts_per_token if one.copies > 1 else 1)
        for run, own in runs
        for one in own
    )


def products_width(config: Any, *, d: int) -> int:
    """Return the features of x A that a layer keeps for one token, of adapters that all tokens use.

    Args:
        d: features of x for one token on this device, on average.
    """
    adapted = _used_by_all(config)
    # Maps down to latent vectors read x, which may have a part of the tokens.
    own = sum(one.split == "none" for one in adapted)
    return config.lora_rank * (len(adapted) - own) + config.lora_rank * own * d // config.hidden_size


def scaled_widths(config: Any, widths: Any, *, d: int, tensor: int) -> dict[str, int]:
    """Return the columns that magnitudes scale for one token on this device, by linear layer.

    Args:
        widths: `AttentionWidths` of the model.
    """
    of_heads = {f"attention.{name}": getattr(widths, name) for name in ("query", "key", "value")}
    return {
        one.name: of_heads.get(one.name, one.num_out // tensor)
        if one.split == "columns"
        else one.num_out * d // config.hidden_size
        for one in _used_by_all(config)
    }


def _used_by_all(config: Any) -> list[Linear]:
    return [one for one in adapted_of(config) if one.copies == 1]
