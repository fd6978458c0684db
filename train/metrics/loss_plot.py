"""Draw loss.png, the training and validation loss of a run, from its metrics.jsonl."""

import io
from pathlib import Path
from typing import Any

from ...meshes.files.own_file import replace_file
from .log import SET, last_set_losses, read_metrics

PLOT_FILE = "loss.png"


def draw_loss(folder: str | Path) -> Path | None:
    """Draw loss.png in a run's folder and return its path; None if metrics.jsonl holds no loss.

    Raises:
        RunError: metrics.jsonl is not a regular file, or larger than 4 GiB.
        OSError: the picture cannot be written.
    """
    lines = read_metrics(folder)
    train, validation = _curve(lines, name="loss"), _curve(lines, name="val_loss")
    if not train and not validation:
        return None
    # matplotlib takes half a second to import, and only the end of a run needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    curves = [(train, "training", "#2a6fbb", ""), (validation, "validation", "#d9822b", "o")]
    # A colour of matplotlib's for each further set.
    sets = enumerate(last_set_losses(lines))
    curves += [(_curve(lines, name=f"{SET}{name}"), name, f"C{2 + i % 8}", "o") for i, name in sets]
    for curve, label, colour, marker in curves:
        if curve:
            steps, losses = zip(*curve, strict=True)
            text = f"{label}, {losses[-1]:.3f} at step {steps[-1]}"
            axes.plot(steps, losses, label=text, color=colour, linewidth=1.6, marker=marker, markersize=4.5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=Path(folder).name)
    axes.grid(visible=True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path, picture = Path(folder) / PLOT_FILE, io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return path


def _curve(lines: list[dict[str, Any]], *, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
