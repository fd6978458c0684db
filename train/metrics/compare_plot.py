"""Draw the losses of several runs in one picture."""

import io
from collections.abc import Sequence
from pathlib import Path

from .log import read_metrics


def draw_losses(folders: Sequence[Path], *, labels: Sequence[str]) -> bytes:
    """Return a PNG: the training loss of each run as a line, and its validation losses as dots.

    Raises:
        RunError: metrics.jsonl of a run is not a regular file, or larger than 4 GiB.
    """
    # matplotlib takes half a second to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for folder, label in zip(folders, labels, strict=True):
        lines = read_metrics(folder)
        train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        validation = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
        (line,) = axes.plot(*zip(*train, strict=True) if train else ([], []), label=label, linewidth=1.4)
        if validation:
            axes.plot(*zip(*validation, strict=True), "o", color=line.get_color(), markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(visible=True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
