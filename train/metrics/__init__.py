"""Metrics of a run: their files, TensorBoard's events, the summary, step times and the progress bar."""

from typing import TYPE_CHECKING

from ...meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .log import METRICS_FILE, MetricsLog, NoLog, last_loss, read_metrics
    from .loss_plot import PLOT_FILE, draw_loss
    from .memory import peak_memory_bytes
    from .summary import NO_SCHEDULE, SUMMARY_FILE, Summary, read_summary, summary_values, write_summary
    from .tensorboard import BOARD_FOLDER

__all__ = [
    "BOARD_FOLDER",
    "METRICS_FILE",
    "NO_SCHEDULE",
    "PLOT_FILE",
    "SUMMARY_FILE",
    "MetricsLog",
    "NoLog",
    "Summary",
    "draw_loss",
    "last_loss",
    "peak_memory_bytes",
    "read_metrics",
    "read_summary",
    "summary_values",
    "write_summary",
]

make_lazy(__name__)
