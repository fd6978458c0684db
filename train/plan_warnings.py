"""What the planner would say about a run, told before it starts. Read `../plan/diagnoses.py` for the mistakes."""

from ..configs.layout import layout_of
from ..configs.run_config import RunConfig
from ..meshes import TrellaxError
from ..plan.costs.runtime import trellax_runtime
from ..plan.diagnoses import diagnose
from ..plan.machines.detect import detect_topology
from ..plan.machines.topology import Topology
from ..plan.training_search import TrainQuestion, price_layout


def warn_of_layout(config: RunConfig, *, topology: Topology | None = None) -> list[str]:
    """Return a line for each warning about a run's layout, none on machines that the planner has no figures of.

    Args:
        topology: the machine; detected if left out.
    """
    machine = topology or detect_topology()
    if machine is None:
        return []
    question = TrainQuestion(
        model=config.model,
        topology=machine,
        batch_size=config.train.batch_size,
        num_tokens=config.data.seq_len,
        runtime=trellax_runtime(config.model, machine.accelerator, vocab=config.pipeline.vocab),
    )
    try:
        plan = price_layout(question, layout_of(config, num_devices=machine.num_devices))
    except TrellaxError:
        # A schedule of the user's own has no price; the run itself has been checked already.
        return []
    found = [one for one in diagnose(question, plan) if one.severity != "note"]
    return [f"{one.severity}: {one.message}. Fix: {one.fix}" for one in found]
