"""Count what the server does, and print it in the text format of Prometheus (version 0.0.4)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of a histogram of times, in seconds."""


@dataclass
class Histogram:
    """Numbers of observed times by bucket, with their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one time."""
        self.sum_s += seconds
        self.counts[sum(seconds > bound for bound in SECONDS)] += 1


@dataclass
class Metrics:
    """Numbers since the start; `responses` by path and status, `answers` by finish reason."""

    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    num_guessed_tokens: int = 0
    num_accepted_tokens: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    answer: Histogram = field(default_factory=Histogram)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all numbers as Prometheus reads them, with gauges by name, each with its help and value."""
        lines = [
            *_family("responses_total", "counter", "HTTP responses begun", self._response_lines()),
            *_family("answers_total", "counter", "Answers that ended, by reason", self._answer_lines()),
            *_family("prompt_tokens_total", "counter", "Prompt tokens taken", [("", self.num_prompt_tokens)]),
            *_family("answer_tokens_total", "counter", "Answer tokens sent", [("", self.num_answer_tokens)]),
            *_family("guessed_tokens_total", "counter", "Answer tokens guessed", [("", self.num_guessed_tokens)]),
            *_family("accepted_tokens_total", "counter", "Guesses that were right", [("", self.num_accepted_tokens)]),
        ]
        for name, (told, value) in gauges.items():
            lines += _family(name, "gauge", told, [("", value)])
        for name, told, histogram in (
            ("first_token_seconds", "Time from a request to the first token of an answer", self.first_token),
            ("answer_seconds", "Time from a request to the end of an answer", self.answer),
        ):
            lines += _histogram(name, told, histogram)
        return "\n".join(lines) + "\n"

    def _response_lines(self) -> Iterable[tuple[str, float]]:
        return [
            (f'{{path="{path}",status="{status}"}}', count) for (path, status), count in sorted(self.responses.items())
        ]

    def _answer_lines(self) -> Iterable[tuple[str, float]]:
        return [(f'{{reason="{reason}"}}', count) for reason, count in sorted(self.answers.items())]


def _family(name: str, kind: str, told: str, values: Iterable[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP trellax_{name} {told}."
    yield f"# TYPE trellax_{name} {kind}"
    for labels, value in values:
        yield f"trellax_{name}{labels} {value}"


def _histogram(name: str, told: str, histogram: Histogram) -> Iterator[str]:
    total, values = 0, []
    for bound, count in zip((*SECONDS, "+Inf"), histogram.counts, strict=True):
        total += count
        values.append((f'_bucket{{le="{bound}"}}', total))
    yield from _family(name, "histogram", told, [*values, ("_sum", histogram.sum_s), ("_count", total)])
