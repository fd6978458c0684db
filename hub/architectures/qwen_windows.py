"""Read and write the attention windows of Qwen 2 and Qwen 3, which config.json can give for each layer.

They apply only if `use_sliding_window` is true. Then `layer_types` lists the layers with a window; without that list,
all layers from index `max_window_layers` on have one.
"""

from collections.abc import Iterator
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values


def window_of_layer(values: Values, layer: int) -> int:
    """Return the attention window of a layer in tokens; 0 is full attention."""
    if not values.get("use_sliding_window", False):
        return 0
    window = values.get("sliding_window", 4096) or 0
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else 0
    return window if layer >= values.get("max_window_layers", 28) else 0


def refuse_windows(values: Values) -> Iterator[str]:
    """Yield a line if `layer_types` is not a list."""
    kinds = values.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        yield f"layer_types={shown(kinds)} is no list"


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that give all layers the attention window of a model."""
    window = config.attention_window or None
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention" if window else "full_attention"] * config.num_layers,
    }


def warn_of_unused_windows(values: Values) -> Iterator[str]:
    """Yield a line if `layer_types` lists windows while `use_sliding_window` is false."""
    kinds = values.get("layer_types")
    if not values.get("use_sliding_window") and isinstance(kinds, list) and "sliding_attention" in kinds:
        yield "layer_types names sliding windows, but use_sliding_window=False counts"
