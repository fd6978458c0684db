"""The planner's warnings are listed before a run starts."""

from trellax.configs import load_config
from trellax.plan import read_topology
from trellax.train.report.plan_warnings import warn_of_layout


def test_collectives_over_pcie_give_a_warning() -> None:
    lines = warn_of_layout(load_config("llama3-8b-8gpu"), topology=read_topology("a100-pciex8"))
    assert [line for line in lines if line.startswith("warning: tensor=4 talks over PCIe") and "Fix: " in line]


def test_cpu_gets_no_warning() -> None:
    assert warn_of_layout(load_config("quickstart")) == []


def test_schedule_from_a_file_gets_no_warning() -> None:
    config = load_config("llama3-8b-8gpu", "--pipeline.schedule mine.csv")
    assert warn_of_layout(config, topology=read_topology("a100-pciex8")) == []
