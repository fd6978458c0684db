"""Tokenize a corpus once into a folder of memory-mapped shards with an index, in parallel, and go on after a stop.

The shards and their order follow from the files alone, not from the number of processes. `../../../configs/
corpora/prepared.py` has the layout of the folder.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....configs.corpora.prepared import FORMAT, INDEX, JOB, read_object
from ....hub.tokenizer import load_tokenizer
from ....hub.tokenizer_files import keep_tokenizer
from ....meshes import DataError
from ....meshes.files.own_file import replace_file
from ..records.damage import Damage
from ..records.extra import import_extra
from ..records.tables import Holds
from .units import Unit, cut_units
from .write_shard import BYTES, ShardJob, entry_path, write_shard

if TYPE_CHECKING:
    from ....hub.chat.template import ChatTemplate

_FILES = ("tokens", "documents", "mask")
"""Files of a shard in its entry; a mask is there for chats alone."""

_MEANT = {
    "sources": "the files (their names, sizes, times or --shard-mib)",
    "tokenizer": "--tokenizer",
    "end_id": "the tokenizer's end token",
    "field": "--text-field",
    "template": "the chat template",
}
"""What keys of the description of a folder are about."""

Report = Callable[[int, int], object]
"""Called with bytes done and bytes in all, whenever a shard is finished."""


def prepare_tokens(
    files: Sequence[Path],
    *,
    out: Path,
    tokenizer: str = BYTES,
    field: str = "text",
    holds: Holds = "text",
    shard_bytes: int = 64 << 20,
    num_processes: int = 1,
    max_damaged: float = 1e-3,
    report: Report = lambda _done, _all: None,
) -> dict[str, Any]:
    """Write the shards of a corpus and their index, and return the index; a finished folder is left as it is.

    Args:
        tokenizer: a tokenizer.json, a folder with one, or "bytes".
        field: field of a record that holds its text, or messages.
        holds: what records hold; of messages, the answers alone count as targets.
        shard_bytes: bytes of plain lines, or of text files, that become one shard.
        max_damaged: share of damaged records from which the corpus is refused.

    Raises:
        DataError: a file cannot be read, too many records are damaged, or the folder holds other tokens.
        OSError: the folder cannot be written.
    """
    units = cut_units(files, unit_bytes=shard_bytes)
    description = _describe(units, tokenizer=tokenizer, field=field, holds=holds)
    if (finished := _open_folder(out, description)) is not None:
        return finished
    keep_tokenizer(tokenizer, out)
    job = ShardJob(folder=out, tokenizer=tokenizer, field=field, holds=holds, made_of=repr(description))
    damage, entries = Damage(), {}
    done, total = 0, sum(unit.num_bytes for unit in units)
    for number, entry in _find_and_write(job, units, num_processes=num_processes):
        entries[number] = entry
        damage.merge(**{name: entry[name] for name in ("num_records", "num_damaged", "places")})
        damage.check(most=max_damaged)
        done += units[number].num_bytes
        report(done, total)
    return _write_index(out, description, [entries[number] for number in sorted(entries)], damage)


def _find_and_write(
    job: ShardJob, units: Sequence[Unit], *, num_processes: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and entry of each shard: first those that an earlier call finished."""
    left = {}
    for number, unit in enumerate(units):
        if entry := _read_entry(job.folder, number):
            yield number, entry
        else:
            left[number] = unit
    yield from _write_shards(job, left, num_processes=num_processes)


def _read_template(tokenizer: str) -> "ChatTemplate":
    """Return the chat template beside a tokenizer.

    Raises:
        DataError: there is none.
    """
    if tokenizer == BYTES:
        raise DataError(
            "chats need a chat template, which is beside a model's tokenizer; bytes have none.",
            fix="name the folder of a model that chats: --tokenizer DIR.",
        )
    loaded = load_tokenizer(tokenizer)
    import_extra("jinja2", loaded.file)
    from ..chats import read_template

    return read_template(loaded)


def _describe(units: Sequence[Unit], *, tokenizer: str, field: str, holds: Holds) -> dict[str, Any]:
    """Return what the tokens follow from, by which a folder is recognised: files, their cuts, tokenizer and field."""
    files = {file: file.stat() for unit in units for file in unit.files}
    known = [[str(file.absolute()), found.st_size, found.st_mtime_ns] for file, found in files.items()]
    cuts = [[len(unit.files), unit.span and unit.span.start, unit.span and unit.span.stop] for unit in units]
    loaded = None if tokenizer == BYTES else load_tokenizer(tokenizer)
    name = BYTES if loaded is None else hashlib.sha256(loaded.file.read_bytes()).hexdigest()
    # The token that ends a text may end each message of a chat.
    end_id = None if loaded is None or holds == "messages" else loaded.special.end_id
    sources = hashlib.sha256(json.dumps([known, cuts]).encode()).hexdigest()
    found = {"format": FORMAT, "tokenizer": name, "end_id": end_id, "field": field, "sources": sources}
    if holds == "text":
        return found
    return found | {"template": hashlib.sha256(_read_template(tokenizer).source.encode()).hexdigest()}


def _open_folder(out: Path, description: Mapping[str, Any]) -> dict[str, Any] | None:
    """Create the folder, or go on in it; return its index if it is finished.

    Raises:
        DataError: it holds something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = read_object(out / INDEX) or read_object(out / JOB)
    if found is None and not any(out.iterdir()):
        replace_file(out / JOB, json.dumps(description).encode())
        return None
    if found is None:
        raise DataError(f"{out} is not empty, and holds no tokens.", fix="name another folder for --out.")
    differ = [_MEANT.get(key, key) for key, value in description.items() if found.get(key) != value]
    if differ:
        raise DataError(
            f"{out} holds the tokens of another corpus: these have changed: {', '.join(differ)}.",
            fix="name another folder for --out, or remove this one.",
        )
    return found if "shards" in found else None


def _read_entry(out: Path, number: int) -> dict[str, Any] | None:
    """Return the entry of a shard that an earlier call finished."""
    entry = read_object(entry_path(out, number))
    names = [entry[name] for name in _FILES if name in entry] if entry else []
    return entry if names and all((out / name).is_file() for name in names) else None


def _write_shards(
    job: ShardJob, units: Mapping[int, Unit], *, num_processes: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and entry of each shard when it is finished."""
    if num_processes == 1 or len(units) < 2:
        for number, unit in units.items():
            yield number, write_shard(job, number, unit)
        return
    # Spawned: a fork would copy the threads' locks of a process that has started jax or a tokenizer.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_process) as pool:
        futures = {pool.submit(write_shard, job, number, unit): number for number, unit in units.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenizes was killed, for want of memory maybe.",
                fix="give the command again with a smaller --processes: it goes on where it stopped.",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The first process decides: after Ctrl-C each of the others finishes its shard.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    """End this process when the first one has ended: of a killed one it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_index(
    out: Path, description: Mapping[str, Any], entries: Sequence[dict[str, Any]], damage: Damage
) -> dict[str, Any]:
    """Write the index, and remove what was needed without it."""
    names = (*_FILES, "num_tokens", "num_documents", "sha256", "mask_sha256")
    digest = hashlib.sha256(" ".join(entry["sha256"] for entry in entries).encode()).hexdigest()
    sums = {key: sum(entry[key] for entry in entries) for key in ("num_tokens", "num_documents", "text_bytes")}
    index = {
        **description,
        **sums,
        "vocab_size_needed": 1 + max((entry["largest_id"] for entry in entries), default=-1),
        "sha256": digest,
        "num_damaged": damage.num_damaged,
        "damaged": damage.places,
        "shards": [{name: entry[name] for name in names if name in entry} for entry in entries if entry["num_tokens"]],
    }
    replace_file(out / INDEX, json.dumps(index, indent=1).encode())
    for name in [JOB, *(entry_path(out, number).name for number in range(len(entries)))]:
        (out / name).unlink(missing_ok=True)
    return index
