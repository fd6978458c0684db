"""The report of a run as a notebook shows it."""

import html

from trellax.configs import load_config
from trellax.train import describe_run, prepare


def test_notebook_shows_the_text_of_the_report_in_full() -> None:
    report = describe_run(prepare(load_config("quickstart")))
    shown = report._repr_html_()
    assert shown.startswith("<pre")
    assert html.unescape(shown.partition(">")[2].removesuffix("</pre>")) == str(report)
    assert "rank 1 |" in shown
