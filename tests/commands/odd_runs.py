"""A command line run in this process up to where work would begin, and what is wrong with how it ended."""

import contextlib
import io
import math
import re
import time
from typing import Any, NoReturn

import pytest
from trellax.commands import (
    bench_decode as bench_decode_command,
)
from trellax.commands import (
    cli,
)
from trellax.commands import (
    generate as generate_command,
)
from trellax.commands import (
    inspect as inspect_command,
)
from trellax.commands import (
    serve as serve_command,
)
from trellax.configs import RunConfig, check_run
from trellax.meshes import abstract_mesh
from trellax.train.state import Setup

LONGEST_S = 10
LONGEST_BYTES = 2_000


class ReachedError(Exception):
    """Everything was checked, and the work would begin."""


def stop_before_work(patch: pytest.MonkeyPatch) -> None:
    """Let each command end where its checks do: before devices are asked for, weights read, programs compiled."""
    patch.setattr("trellax.commands.train.train", _check_on_any_machine)
    patch.setattr("trellax.commands.describe.prepare", _check_on_any_machine)
    patch.setattr(inspect_command, "compile_step", _reach)
    patch.setattr(generate_command, "Engine", _reach)
    patch.setattr(serve_command, "bind", _reach)
    patch.setattr(bench_decode_command._Trial, "measure", _reach)


def find_problem(words: list[str], *, wanted: str) -> str:
    """Return what is wrong with how `trellax` takes these words, or nothing.

    Args:
        wanted: what a refusal must name, as a regular expression.
    """
    out, err = io.StringIO(), io.StringIO()
    # Of this process: other tests may keep the machine busy.
    start_s = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: Any = cli.main(words)
    except ReachedError:
        return ""
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    seconds, text = time.process_time() - start_s, err.getvalue()
    if seconds > LONGEST_S:
        return f"took {seconds:.0f} s of CPU"
    if code == 0:
        return ""
    if code != 2:
        return f"exit code {code}: {text[:300]}"
    return _find_fault(text, wanted=wanted)


def _find_fault(text: str, *, wanted: str) -> str:
    if len(text.encode("utf-8", "backslashreplace")) > LONGEST_BYTES:
        return f"{len(text)} characters: {text[:300]}"
    if not text.replace("\n", "").isprintable():
        return f"a terminal would obey {text[:300]!r}"
    return "" if re.search(wanted, text) else f"does not name {wanted[:300]}: {text[:300]}"


def _check_on_any_machine(config: RunConfig, **_: object) -> NoReturn:
    # As many devices as it asks for: how many there are is not the config's mistake.
    spec = check_run(config, num_devices=math.prod(abs(size) for size in config.mesh.sizes.values()))
    mesh: Any = abstract_mesh(spec)
    setup = Setup(config, mesh)
    assert setup.model.params
    assert setup.schedule.num_ranks
    raise ReachedError


def _reach(*_: object, **__: object) -> NoReturn:
    raise ReachedError
