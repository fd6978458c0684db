"""The notebook runs from its first cell to its last, and what a cell ends with shows itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT

NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"

RUN = """
import ast, json, sys
names = {"__name__": "__main__"}
for source in json.load(sys.stdin):
    body = ast.parse(source).body
    shown = body.pop() if isinstance(body[-1], ast.Expr) and not ast.unparse(body[-1]).startswith("print(") else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if shown is not None:
        value = eval(compile(ast.Expression(shown.value), "cell", "eval"), names)
        print(type(value).__name__, len(value._repr_html_()) > 100)
"""
"""Runs cells as a kernel does: in one namespace, the value of a last expression shown."""


def cells_of(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cells_of("code")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [line for line in done.stdout.splitlines() if line.endswith((" True", " equal"))]
    assert shown == [
        "RunConfig True",
        "Report True",
        "Schedule True",
        "loss equal",
        "gradients equal",
        "ProgramReport True",
    ]


def test_notebook_has_no_outputs_and_a_text_before_each_cell() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2)
    assert not any(cell.get("outputs") for cell in notebook["cells"])
