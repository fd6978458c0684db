"""List the planner's warnings about the layout of a run. Read `../../plan/diagnoses.py` for how it finds them."""

from ...configs.layout import layout_of, question_of
from ...configs.run_config import RunConfig
from ...meshes import TrellaxError
from ...plan.diagnoses import diagnose
from ...plan.machines.detect import detect_topology
from ...plan.machines.topology import Topology
from ...plan.training_search import price_layout


def warn_of_layout(config: RunConfig, *, topology: Topology | None = None) -> list[str]:
    """Return the planner's warnings about the layout of a run, one line each; none on machines it has no data for.

    Args:
        topology: the machine; this one if left out.
    """
    machine = topology or detect_topology()
    if machine is None:
        return []
    try:
        question = question_of(config, topology=machine)
        plan = price_layout(question, layout_of(config, num_devices=machine.num_devices))
    except TrellaxError:
        # The planner has no price for a schedule read from a file. The run itself has been checked before.
        return []
    warnings = [diagnosis for diagnosis in diagnose(question, plan) if diagnosis.severity != "note"]
    return [f"{warning.severity}: {warning.message}. Fix: {warning.fix}" for warning in warnings]
