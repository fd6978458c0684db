"""Command lines made by the grammar: a good one of every command, with words changed, added, left out and doubled."""

import random
import re

from . import grammar

TRAIN = ("--fake-devices", "--profile", "--coordinator", "--num-processes", "--process-id")
INSPECT = ("--target", "--hlo", "--png", "--fake-devices")
PLAN = ("--topology", "--objective", "--requests", "--prompt", "--generate", "--png", "--write", "--fake-devices")
SCHEDULE_SIZES = ("--ranks", "--microbatches", "--chunks", "--max-in-flight", "--layers", "--clock")
SCHEDULE = (*SCHEDULE_SIZES, "--forward", "--input-grad", "--weight-grad", "--transfer", "--file")
SCHEDULE_FILES = ("--png", "--svg", "--csv", "--trace")
ENGINE = ("--fake-devices", "--dtype", "--weights", "--cache-dtype", "--chunk", "--groups")
ANSWER = ("--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "--mesh", "--slots")
SPECULATE = ("--speculate", "--speculate-tokens")
PENALTIES = ("--min-p", "--repetition-penalty", "--presence-penalty", "--frequency-penalty", "--logit-bias")
GENERATE = (*SPECULATE, *PENALTIES, "--logprobs", *ENGINE, *ANSWER, "--max-tokens", "--prompt", "--prompts-file")
HTTP = ("--host", "--port", "--name", "--api-key", "--chat-template", "--queue", "--max-body-bytes", "--timeout")
SERVED = ("--num-processes", "--silence", "--mesh", "--slots", "--max-tokens", "--cache-tokens")
SERVE = (*SPECULATE, *ENGINE, *HTTP, *SERVED)
BENCH = (*ENGINE, "--batch", "--meshes", "--prompt-tokens", "--new-tokens", "--png")

PREPARE = ("--text-field", "--vocab-size", "--tokenizer", "--processes", "--shard-mib", "--max-damaged")
EVAL = ("--data", "--text-field", "--mesh", "--fake-devices", "--seq-len", "--batch-size", "--dtype")

COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "train": (["tiny-dense"], TRAIN),
    "describe": (["tiny-dense"], ("--fake-devices",)),
    "inspect": (["tiny-dense", "--mesh.data=8"], INSPECT),
    "plan": (["tiny-dense", "--topology", "h100x8", "--mesh.data=8"], PLAN),
    "schedule": (["1f1b", "--ranks", "2", "--microbatches", "4"], (*SCHEDULE, *SCHEDULE, *SCHEDULE_FILES)),
    "checkpoints": (["no-run"], ()),
    "calibrate": (["no-folder/machine.toml"], ("--config", "--fake-devices")),
    "import-hf": (["model", "out"], ("--mesh", "--fake-devices")),
    "export-hf": (["no-run", "out"], ("--mesh", "--fake-devices", "--architecture", "--dtype")),
    "generate": (["model", "--prompt", "a"], GENERATE),
    "serve": (["model"], SERVE),
    "data": (["prepare", "no-text.txt", "--out", "out"], PREPARE),
    "eval": (["model", "--data", "no-text.txt"], EVAL),
    "runs": (["no-runs"], ("--png",)),
    "bench-decode": (["tiny-dense", "--new-tokens=2", "--prompt-tokens=2"], BENCH),
}
FLAGS = (
    "--json",
    "--ema",
    "--fresh",
    "--force",
    "--override",
    "--this",
    "--compare",
    "--verify",
    "--help",
    "--version",
)


def draw_command(rng: random.Random) -> tuple[str, list[str]]:
    """Return what a refusal must name, as a regular expression, and the words after `trellax`.

    Which of many wrong words is told first is the command's to say: it must be one of them, or what is missing.
    """
    command = rng.choice(sorted(COMMANDS))
    start, options = COMMANDS[command]
    words = [command, *start]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_give_option, _give_option, _give_option, _change_word, _stray_word))(words, options, rng)
    words = [word.replace("\0", "") for word in words]
    parts = [part for word in words for part in (word, *word.split("=", 1))]
    parts += options
    wanted = [re.escape(shape[:12]) for part in parts for shape in _shapes(part) if shape.strip()]
    return "|".join([*wanted, "required", "unknown command", "argument [A-Z]", "CONFIG", "mesh"]), words


def _give_option(words: list[str], options: tuple[str, ...], rng: random.Random) -> None:
    option, value = rng.choice(options or FLAGS), grammar.word(rng)
    new = rng.choice(([option, value], [f"{option}={value}"], [f"{option}={value}"], [option], [f"{option}="]))
    place = rng.randrange(1, len(words) + 1)
    words[place:place] = new


def _change_word(words: list[str], options: tuple[str, ...], rng: random.Random) -> None:
    words[rng.randrange(len(words))] = grammar.word(rng)


def _stray_word(words: list[str], options: tuple[str, ...], rng: random.Random) -> None:
    pool = [*FLAGS, *TRAIN, *PLAN, *GENERATE, "--train.steps", "--x", "--jsno", "--fre", "--js", "-x", "-j", "--"]
    words.insert(rng.randrange(len(words) + 1), grammar.pick(rng, lambda r: r.choice(pool), grammar.word))


def _shapes(word: str) -> tuple[str, ...]:
    """How a word may be told: as it is, escaped, or as an attribute."""
    return (word, repr(word)[1:-1], word.lstrip("-").replace("-", "_")) if word.strip() else (repr(word),)
