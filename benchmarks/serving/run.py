"""Send a server thousands of requests of mixed lengths, a tenth of which are broken off, and look for what leaks.

Command:  python benchmarks/serving/run.py [--quick] [--requests N] [--clients 8,4,8] [--json] [-- words of the server]
Time: 2 minutes on two idle cores.

`trellax serve` runs in a process of its own with a tiny Llama of 1,024 tokens and random weights. Clients send
completions over loopback, each on a connection of its own, streaming: prompts of 1 to 500 tokens, a third of which
begin alike, answers of 1 to 64 tokens. A tenth of the clients leave after 0 to 3 tokens; one more reads nothing, and
another one a line every half second. Each number of clients sends an equal share of the requests, one after another;
the last number is the first one, so that their memories can be compared. A phase before the first one, which is not
reported, fills caches.

Tables go to stdout, progress to stderr. If a target is missed, the exit code is 1, and stderr has what the server said.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from trellax.configs import load_config
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve.measure import draw_params
from trellax.train.checkpoints.initial_weights import save_params

from benchmarks.arguments import make_parser, parse_count
from benchmarks.rounds import tell
from benchmarks.tables import MIB, format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json

ROOT = Path(__file__).parents[2]
MAX_PROMPT, MAX_ANSWER, WARM_UP = 500, 64, 200
COMPILED = "Finished XLA compilation"
OPTIONS = ["--slots", "8", "--queue", "64", "--max-tokens", "640", "--name", "tiny", "--json", "--port", "0"]


@dataclass
class Phase:
    """What happened to the requests of so many clients."""

    clients: int
    first_token_s: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    load: float = 0.0


class Server:
    """The server's process, its address, and the lines on its stderr."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / ".src"), "JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
        self._log = (folder.parent / "stderr.txt").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "trellax", "serve", str(folder), *OPTIONS, *words]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8"
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self.log())
        self.url = json.loads(line)["url"]
        self.host, _, self.port = self.url.removeprefix("http://").partition(":")

    def log(self) -> str:
        """Return what the server has said so far."""
        return Path(self._log.name).read_text(encoding="utf-8")

    def memory_bytes(self) -> int:
        """Return the resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return 1024 * int(found[1])

    def gauges(self) -> dict[str, float]:
        """Return the numbers of /metrics that have no labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            text = answer.read().decode()
        return {name: float(value) for name, value in re.findall(r"^trellax_(\w+) (\S+)$", text, re.MULTILINE)}

    def stop(self) -> int:
        """Ask the server to stop, and return its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)


def main() -> int:
    parser = make_parser(__doc__, quick="400 requests instead of 10,000")
    parser.add_argument("--requests", type=parse_count, default=10_000, help="number of requests (default 10,000)")
    parser.add_argument("--clients", default="32,4,8,16,32", help="numbers of clients at a time (default 32,4,8,16,32)")
    parser.add_argument("words", nargs="*", help="further words for `trellax serve`, after --")
    arguments = parser.parse_args()
    count = 400 if arguments.quick else arguments.requests
    with tempfile.TemporaryDirectory() as folder:
        server = Server(make_model(Path(folder) / "run"), arguments.words)
        try:
            report = asyncio.run(soak(server, [int(word) for word in arguments.clients.split(",")], count))
        finally:
            code = server.stop()
        targets = judge(report, code)
        if exit_code(targets):
            tell("\n".join(line for line in server.log().splitlines() if not line.startswith("WARNING:jax")))
    if arguments.json:
        print_json(report, targets)
    else:
        print_report(report, targets)
    return exit_code(targets)


def make_model(folder: Path) -> Path:
    """Write a run folder of a tiny Llama with random weights."""
    config = load_config("tiny-llama", ["--model.max_tokens", "1024"])
    save_params(folder, draw_params(config.model, build_mesh(MeshSpec(), devices=jax.devices()[:1])), config)
    return folder


async def soak(server: Server, clients: list[int], count: int) -> dict[str, Any]:
    """Run all phases beside a client that reads nothing, and return what was measured."""
    rng = random.Random(0)
    await run_phase(server, Phase(max(clients)), rng, WARM_UP)
    compiled, start = server.log().count(COMPILED), server.memory_bytes()
    dead = await send(server, {**draw_body(rng), "max_tokens": MAX_ANSWER})
    slow = asyncio.create_task(read_slowly(server, random.Random(1)))
    phases = []
    for number in clients:
        phase = Phase(number)
        await run_phase(server, phase, rng, count // len(clients))
        tell(f"{number} clients: {dict(phase.outcomes)} in {phase.seconds:.0f} s")
        phases.append(phase)
    dead[1].close()
    slow.cancel()
    gauges = await settle(server)
    return {
        "about": {"requests": count, "cpu_cores": os.cpu_count(), "jax": jax.__version__},
        "phases": [describe(phase) for phase in phases],
        "compiled": server.log().count(COMPILED) - compiled,
        "compiled_at_start": compiled,
        "tracebacks": server.log().count("Traceback"),
        "memory_at_start_mib": start / MIB,
        "slots_used": gauges["slots_used"],
        "pages_missing": (gauges["cache_tokens"] - gauges["cache_tokens_free"]) / 16,
        "answers_open": gauges["answers_open"],
        "metrics": gauges,
    }


async def run_phase(server: Server, phase: Phase, rng: random.Random, count: int) -> None:
    """Send `count` requests by so many clients, each one after another."""
    bodies = iter([(draw_body(rng), rng.randrange(4) if rng.random() < 0.1 else None) for _ in range(count)])
    start_s = time.perf_counter()

    async def client() -> None:
        for body, leave_after in bodies:
            await ask(server, phase, body, leave_after)

    await asyncio.gather(*(client() for _ in range(phase.clients)))
    phase.seconds, phase.memory_bytes = time.perf_counter() - start_s, server.memory_bytes()
    phase.load = os.getloadavg()[0]


def draw_body(rng: random.Random) -> dict[str, Any]:
    """Return a completion of random lengths and settings."""
    prompt = list(range(64)) if rng.random() < 1 / 3 else []
    prompt += [rng.randrange(256) for _ in range(rng.randint(1, MAX_PROMPT - len(prompt)))]
    how = rng.choice([{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"presence_penalty": 0.5, "logprobs": 2}])
    return {"model": "tiny", "prompt": prompt, "max_tokens": rng.randint(1, MAX_ANSWER), "stream": True, **how}


async def send(server: Server, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection and send a request."""
    reader, writer = await asyncio.open_connection(server.host, int(server.port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def ask(server: Server, phase: Phase, body: dict[str, Any], leave_after: int | None) -> None:
    """Send a request, and read its answer to the end, or leave after some events."""
    start_s, events, finished = time.perf_counter(), 0, False
    reader, writer = await send(server, body)
    try:
        first = (await reader.readline()).decode()
    except ConnectionError:
        first = ""
    if not first:
        phase.outcomes[f"refused by closing after {time.perf_counter() - start_s:.1f} s"] += 1
        return
    status = first.split()[1]
    while leave_after is None or events < leave_after:
        line = await reader.readline()
        if not line:
            break
        if line.startswith(b"data: {"):
            if not events:
                phase.first_token_s.append(time.perf_counter() - start_s)
            events += 1
            finished |= json.loads(line[6:])["choices"][0]["finish_reason"] is not None
    writer.close()
    phase.num_tokens += events
    left = leave_after is not None and not finished
    phase.outcomes["left" if left else "ended" if finished else f"refused {status}"] += 1


async def read_slowly(server: Server, rng: random.Random) -> None:
    """Ask again and again, and read a line every half second."""
    while True:
        reader, writer = await send(server, draw_body(rng))
        try:
            while await reader.readline():
                await asyncio.sleep(0.5)
        finally:
            writer.close()


async def settle(server: Server) -> dict[str, float]:
    """Wait until the server has nothing left to do, and return its numbers."""
    for _ in range(100):
        gauges = server.gauges()
        if not gauges["answers_open"] and not gauges["slots_used"]:
            break
        await asyncio.sleep(0.2)
    return gauges


def describe(phase: Phase) -> dict[str, Any]:
    """Return the numbers of a phase."""
    times = sorted(phase.first_token_s)
    count = sum(phase.outcomes.values())
    return {
        "clients": phase.clients,
        "outcomes": dict(phase.outcomes),
        "requests_per_s": count / phase.seconds,
        "events_per_s": phase.num_tokens / phase.seconds,
        "first_token_p50_ms": 1e3 * times[len(times) // 2],
        "first_token_p99_ms": 1e3 * times[int(0.99 * len(times))],
        "first_token_longest_ms": 1e3 * times[-1],
        "memory_mib": phase.memory_bytes / MIB,
        "machine_load": phase.load,
    }


def judge(report: dict[str, Any], code: int) -> list[Target]:
    """Compare what was measured with what a server without leaks would show."""
    refused = sum(n for one in report["phases"] for name, n in one["outcomes"].items() if name.startswith("refused"))
    # The first phase has as many clients as the last, and fills pools of threads and of memory: what C libraries free
    # stays in glibc's arenas, which grow to the most that is in use at a time, and no further.
    growth = report["phases"][-1]["memory_mib"] / report["phases"][0]["memory_mib"]
    assert report["compiled_at_start"], "the server does not say what it compiles"
    return [
        Target.at_most("programs compiled after the first 200 requests", report["compiled"], 0),
        Target.at_most("pages that nobody has given back", report["pages_missing"], 0),
        Target.at_most("slots that nobody has given back", report["slots_used"], 0),
        Target.at_most("answers that have not ended", report["answers_open"], 0),
        Target.at_most("requests refused", refused, 0),
        Target.at_most("tracebacks", report["tracebacks"], 0),
        Target.at_most("memory after the last phase over that after the first", growth, 1.005),
        Target.at_most("exit code after SIGTERM", code, 0),
    ]


def print_report(report: dict[str, Any], targets: list[Target]) -> None:
    """Print the measurements and the verdicts in Markdown."""
    about = report["about"]
    print(f"jax {about['jax']}, {about['cpu_cores']} cores, {about['requests']} requests")
    names = {
        "requests_per_s": "requests/s",
        "events_per_s": "events/s",
        "first_token_p50_ms": "first token, p50 ms",
        "first_token_p99_ms": "first token, p99 ms",
        "first_token_longest_ms": "first token, longest ms",
        "memory_mib": "memory, MiB",
        "machine_load": "load of the machine",
    }
    phases = report["phases"]
    table = [("what", *(f"{one['clients']} clients" for one in phases))]
    table += [(name, *(f"{one[key]:,.1f}" for one in phases)) for key, name in names.items()]
    start, compiled = report["memory_at_start_mib"], report["compiled_at_start"]
    title = f"After {WARM_UP} requests, with {start:.1f} MiB and {compiled} compiled programs"
    outcomes = sorted({name for one in phases for name in one["outcomes"]})
    table += [(name, *(str(one["outcomes"].get(name, 0)) for one in phases)) for name in outcomes]
    print(format_table(title, table))
    print(format_targets(targets))


if __name__ == "__main__":
    sys.exit(main())
