"""A grammar of what people and programs write into run files and command lines: right, wrong and hostile.

Everything is drawn from a `random.Random`, so a case is its seed.
"""

import random
from collections.abc import Callable, Sequence

Rule = Callable[[random.Random], str]
"""Draws one text."""

DIGITS = ("²", "٣", "\uff11\uff12", "Ⅷ", "४२", "\U0001d7d7", "½")
"""Digits that `str.isdigit` or `int` take and no format has."""


def pick(rng: random.Random, *rules: Rule | str) -> str:
    """One of the rules or texts, drawn."""
    rule = rng.choice(rules)
    return rule if isinstance(rule, str) else rule(rng)


def whole_number(rng: random.Random) -> str:
    power = rng.choice((1, 3, 7, 8, 15, 16, 31, 32, 53, 62, 63, 64, 70, 100, 1_000))
    return pick(
        rng,
        lambda r: str(r.randrange(-3, 40)),
        lambda r: str(2**power + r.randrange(-1, 2)),
        lambda r: f"-{2**power}",
        lambda r: "".join(r.choice("0123456789") for _ in range(r.randrange(1, 25))),
        lambda r: f"{r.randrange(1, 999)}_{r.randrange(1000):03}",
        lambda r: r.choice(("0x", "0o", "0b")) + "".join(r.choice("01") for _ in range(r.randrange(1, 80))),
        lambda r: "0x" + "f" * r.choice((2, 16, 5_000)),
        lambda r: "9" * r.choice((18, 19, 4_300, 4_301, 10_000)),
        *("-0", "+7", "1000000", "1000000000", "65536", "4096"),
    )


def real_number(rng: random.Random) -> str:
    return pick(
        rng,
        lambda r: f"{r.uniform(-2, 2):.3f}",
        lambda r: f"{r.randrange(1, 99)}e{r.choice((-400, -320, -30, -3, 0, 3, 30, 300, 308, 309, 400))}",
        lambda r: f"{r.choice(('', '+', '-'))}{r.choice(('nan', 'inf', '0.0', '1.0', '3.0', '1e5', '1_0.5e1_0'))}",
        lambda r: f"0.{'0' * r.choice((5, 500))}1",
        lambda r: f"1.{'9' * r.choice((5, 500))}",
    )


def no_number(rng: random.Random) -> str:
    return pick(
        rng,
        lambda r: r.choice(DIGITS),
        lambda r: f"1{r.choice(DIGITS)}",
        *("1__0", "_1", "1_", "0x", "0xg", "01", "1.", ".5", "1e", "--1", "+-1", "1 2", "1,5", "1e5e5", "0b2"),
        *("NaN", "Infinity", "infinity", "INF", "None", "null", "yes", "0x1p3", "1j", "1k", "8GB", "1/2", "2**3"),
    )


def moment(rng: random.Random) -> str:
    return pick(
        rng,
        *("1979-05-27", "07:32:00", "07:32:00.999999999", "1979-05-27T07:32:00Z", "1979-05-27 00:32:00-07:00"),
        *("0001-01-01", "9999-12-31T23:59:59Z", "0000-00-00", "2023-02-29", "24:00:00", "07:32", "1979-05-27T"),
        *("1979-05-27T07:32:00+99:99", "23:59:60", "10000-01-01"),
    )


def letters(rng: random.Random) -> str:
    """What may stand between quotes; nothing here needs more escaping than TOML's basic strings have."""
    return pick(
        rng,
        *("", " ", "auto", "1", "1e3", "none", "on", "data", "bytes", "text", "tokens", "1f1b", "zb-h1", "float16"),
        *("../..", "/", ".", "a/b", "a\\\\b", "~", "run[1]", "*", "**/*", "[", "{}", "%s", "{0}", "$HOME", "a,b", "-1"),
        *("\\u0000", "a\\u0000b", "\\u001b[31mred", "\\u001b]0;title\\u0007", "\\t\\n\\r", "\\u202eabc", "\\U0010ffff"),
        *("💥", "é", "ß" * 90, "\\u0085", "\\ufeff", "\\u2028", "\\uffff", "x.csv", ".csv", "\\u0000.csv", "*.csv"),
        lambda r: r.choice("aé💥\u3000") * r.choice((100, 300, 5_000)),
        lambda r: "a" * (1_000_000 if r.random() < 0.05 else 1_000),
        lambda r: "\\u001b" * r.choice((100, 5_000)),
        lambda r: "/".join(["a" * 200] * 30),
        lambda r: "".join(chr(r.randrange(0xA0, 0xD7FF)) for _ in range(r.randrange(1, 30))),
    )


def quoted(rng: random.Random) -> str:
    return pick(rng, *(lambda r, q=q: f"{q}{letters(r)}{q}" for q in ('"', '"""')), "''", "'\\u0000'", "'''a\nb'''")


def broken_text(rng: random.Random) -> str:
    return pick(
        rng,
        *('"', '"a', "'", '"\\x"', '"\\ud800"', '"\\U00110000"', '"\\u12"', "'a'b", '"a" "b"', '"a\nb"', "a b", "`a`"),
        *("\x00", "\x07", '"\x00"', '"\x1b"', "\\", "@", "$(date)", "\ufeff1", "=", "==", "#", ""),
    )


def container(rng: random.Random, depth: int = 0) -> str:
    items: list[Rule | str] = [whole_number, real_number, quoted, moment, "true", "[]", "{}"]
    if depth < 4:
        items += [lambda r: container(r, depth + 1)] * 2
    return pick(
        rng,
        lambda r: f"[{', '.join(pick(r, *items) for _ in range(r.randrange(5)))}]",
        lambda r: "{" + ", ".join(f"k{i} = {pick(r, *items)}" for i in range(r.randrange(4))) + "}",
        lambda r: f"[{pick(r, *items)},]",
        "[\n1, # one\n2]",
        "{a.b.c = 1}",
        '{"" = 1}',
        "{a = 1, a = 2}",
    )


def large_container(rng: random.Random) -> str:
    depth = rng.choice((50, 500, 5_000))
    return pick(
        rng,
        "[" * depth + "]" * depth,
        "[" * depth,
        "{a = " * depth + "1" + "}" * depth,
        f"[{'1, ' * rng.choice((1_000, 30_000))}]",
        f"[{'[], ' * 10_000}]",
        '["' + '", "'.join(f"f{i}.txt" for i in range(2_000)) + '"]',
        f"{{{', '.join(f'k{i} = {i}' for i in range(2_000))}}}",
    )


def value(rng: random.Random) -> str:
    """A value in TOML, or what was meant to be one."""
    rules: tuple[Rule, ...] = (whole_number, whole_number, real_number, no_number, moment, quoted, quoted, broken_text)
    return pick(rng, *rules, container, large_container, lambda r: r.choice(("true", "false", "True", "yes")))


def word(rng: random.Random) -> str:
    """A word of a command line; bytes that are no UTF-8 come as lone surrogates, and a null byte never comes."""
    text = pick(
        rng,
        *(whole_number, whole_number, real_number, no_number, no_number, moment, letters, container, quoted),
        lambda r: bytes(r.randrange(1, 256) for _ in range(r.randrange(1, 20))).decode("utf-8", "surrogateescape"),
        *("-", "--", "-h", "--x", "-1", "", " ", "\n", "\x1b[2J", "\udcff\udcfe", "true", "auto", "=", "a=b"),
    )
    return text.replace("\0", "")


def key(rng: random.Random) -> str:
    """A key in TOML, or what was meant to be one."""
    return pick(
        rng,
        *("x", "steps", "a.b", "a.b.c", '"a.b"', '""', "''", '"\\u0000"', '"\\u001b[31m"', "1", "1.5", "-", "é", "²"),
        *('"é"', "a b", "a.", ".a", "a..b", "true", '"\n"', "__class__", "__init__", "model_config", "self", "args"),
        *('"steps "', "a" * 5_000, '"' + "x" * 100_000 + '"', ".".join("a" * 50), ".".join("a" * 2_000)),
    )


def some(rng: random.Random, items: Sequence[str]) -> str:
    return rng.choice(items)
