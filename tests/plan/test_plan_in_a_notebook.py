from xml.etree import ElementTree

from trellax.plan import TrainQuestion, read_topology, search_train

from .models import GPT2


def test_notebook_shows_a_plan_as_a_table_of_its_numbers() -> None:
    question = TrainQuestion(model=GPT2, topology=read_topology("l40sx8"), batch_size=16, num_tokens=1024)
    plan = search_train(question)[0]
    rows = [[cell.text for cell in row] for row in ElementTree.fromstring(plan._repr_html_())]
    shown = {name: value for name, value in rows if name}
    assert shown["time of a step"] == f"{plan.time_s:.4g} s"
    assert shown["memory per device"] == f"{plan.memory.total / 1e9:.1f} GB"
    assert shown["why"] == plan.why
