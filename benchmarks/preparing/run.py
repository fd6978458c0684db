"""Measure speed and memory of `trellax data prepare` on a generated file of JSON lines, beside `datasets`.

Command:  python benchmarks/preparing/run.py [--megabytes 10000] [--tokenizer 32768] [--beside] [--json]
Time: for 10 GB as bytes 4 minutes of CPU, most of them to write the file; with a tokenizer 0.5 s of CPU a megabyte.

The file is cut at random from the sources of Python's library, 2,800 bytes a document, with words drawn for each.
Memory is read from /proc twice a second and summed over all processes, and what they share counts in each. On a machine
with other work CPU seconds are to be compared, not seconds.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.arguments import make_parser, parse_count
from benchmarks.tables import Rows, format_table

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from trellax.commands.cli import main; sys.exit(main())"
SAMPLE_S = 0.5
TOKENIZER_BYTES = 50_000_000
"""Bytes of text that a tokenizer is trained on."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command took: seconds, CPU seconds and the largest sum of resident bytes, those of all its processes."""

    name: str
    wall_s: float
    cpu_s: float
    resident_bytes: int


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=parse_count, default=1_000, help="size of the file (default 1000)")
    parser.add_argument("--tokenizer", type=parse_count, help="train a tokenizer of so many words first; bytes without")
    parser.add_argument("--shard-mib", type=parse_count, default=64, help="as of the command (default 64)")
    parser.add_argument("--beside", action="store_true", help="tokenize the file with `datasets` too, in two processes")
    arguments = parser.parse_args()
    if arguments.tokenizer and arguments.tokenizer <= 256:
        parser.error("argument --tokenizer: expected more than the 256 bytes, got " + str(arguments.tokenizer))
    if arguments.beside and not arguments.tokenizer:
        parser.error("argument --beside: it tokenizes, so give --tokenizer 32768 too")
    if arguments.beside and not all(map(find_spec, ("datasets", "transformers"))):
        parser.error("argument --beside: datasets and transformers are not installed here")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments)
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    rows: Rows = [("command", "s", "CPU s", "MB a CPU s", "resident, MiB, all processes")]
    for one in found:
        numbers = (f"{one.wall_s:.0f}", f"{one.cpu_s:.0f}", f"{arguments.megabytes / one.cpu_s:.1f}")
        rows.append((one.name, *numbers, f"{one.resident_bytes / 2**20:.0f}"))
    print(format_table(f"{arguments.megabytes:,} MB of JSON lines", rows))


def measure(folder: Path, arguments: argparse.Namespace) -> list[Measured]:
    """Write the file into a folder, and run the commands there."""
    file, num_bytes = folder / "texts.jsonl", arguments.megabytes * 1_000_000
    out = ["--out", str(folder / "out"), "--shard-mib", str(arguments.shard_mib)]
    write_lines(file, num_bytes)
    trellax = [sys.executable, "-c", COMMAND, "data"]
    tokenizer: list[str] = []
    if arguments.tokenizer:
        tokenizer = ["--tokenizer", str(folder / "tokenizer")]
        write_lines(folder / "sample.jsonl", min(TOKENIZER_BYTES, num_bytes))
        size = ["--vocab-size", str(arguments.tokenizer), "--out", tokenizer[1]]
        subprocess.run(
            [*trellax, "train-tokenizer", str(folder / "sample.jsonl"), *size], check=True, env=environment()
        )
    found = [run("trellax data prepare", [*trellax, "prepare", str(file), *tokenizer, *out])]
    if arguments.beside:
        worker = Path(__file__).with_name("with_datasets.py")
        words = [sys.executable, str(worker), str(file), tokenizer[1], str(folder)]
        found.append(run("datasets, map in two processes", words))
    return found


def write_lines(file: Path, num_bytes: int) -> None:
    """Write documents of different lengths, the same each time, until the file has so many bytes."""
    draw = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    text = "".join(path.read_text("utf-8", errors="replace") for path in sources)
    words, done, number = text.split(), 0, 0
    with file.open("w", encoding="utf-8") as out:
        while done < num_bytes:
            start = draw.randrange(len(text))
            own = [str(draw.getrandbits(24)) if i % 7 == 0 else draw.choice(words) for i in range(20)]
            body = f"{' '.join(own)}\n{text[start : start + 50 + int(draw.lognormvariate(7.3, 1.0))]}"
            line = json.dumps({"id": number, "text": body}, ensure_ascii=False) + "\n"
            out.write(line)
            done, number = done + len(line.encode()), number + 1


def run(name: str, words: Sequence[str]) -> Measured:
    """Run a command, and read the memory of its processes meanwhile.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    before, start_s, most = cpu_seconds(), time.perf_counter(), 0
    with subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, sum(resident_bytes(pid) for pid in processes_of(process.pid)))
            time.sleep(SAMPLE_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(words))
    wall_s = time.perf_counter() - start_s
    return Measured(name=name, wall_s=wall_s, cpu_s=cpu_seconds() - before, resident_bytes=most)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / ".src"), os.environ.get("PYTHONPATH", "")])}


def cpu_seconds() -> float:
    """Return the CPU seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def processes_of(root: int) -> list[int]:
    """Return the ids of a process and of all that it and they have started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, left = [], [root]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process, 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main()
