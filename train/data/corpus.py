"""Load a corpus of text or of token arrays as one array of tokens, split into a training and a held-out part.

The default corpus is the source code of Python's standard library, so nothing is downloaded. It differs between Python
versions, so a run prints the SHA-256 of its corpus. Read `batches.py` next.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...configs.corpora.paths import find_files, of_validation
from ...configs.corpora.prepared import read_prepared
from ...configs.run_config import DataSection
from ...hub.tokenized_text import tokenize
from ...hub.tokenizer import ModelTokenizer, load_tokenizer
from ...meshes import DataError
from ...meshes.arguments import check_count
from .batches import TokenSource
from .documents import Documents
from .hashed_file import HashedFile
from .joined_tokens import Tokens, join_tokens
from .loss_mask import Mask, is_mask, map_masks
from .preferences.pairs import LoadedPairs, load_pairs
from .prepared import check_shards, prepared_documents
from .records.damage import Damage
from .records.extra import import_extra
from .records.records import record_kind
from .texts import check_total, read_texts
from .token_files import map_files, scan_tokens

_ALL = 1.0
"""`val_fraction` of a corpus that is held out whole, which no config can say."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The token ids of a corpus for training and for validation, each [num_tokens], uint8, uint16 or uint32.

    `vocab_size_needed` is the smallest vocabulary that has an id for every token. `mapped` are the memory-mapped files,
    which are read during the whole run and must not change; the content of all other files is in memory. `documents`
    says where they end, counted from the start of `train`, if sequences are to be cut there. `mask`, counted alike,
    says which tokens count as targets, if not all do; `shuffled` where the documents end that are to be shuffled. A
    blend has its corpora in `blend`, with their weights; `train` and `validation` are then theirs joined. Pairs of
    answers are in `preferences`. `sets` are the further validation sets by name, each held out whole; `sha256` and
    `vocab_size_needed` are without them.
    """

    train: Tokens
    validation: Tokens
    sha256: str
    description: str
    vocab_size_needed: int
    mapped: tuple[HashedFile, ...] = ()
    documents: Documents | None = None
    mask: Tokens | None = None
    shuffled: Documents | None = None
    blend: tuple[tuple["Corpus", float], ...] = ()
    preferences: LoadedPairs | None = None
    sets: tuple[tuple[str, "Corpus"], ...] = ()

    @property
    def train_sources(self) -> tuple[TokenSource, ...]:
        """The tokens to train on, with the weight of each source."""
        if self.blend:
            return tuple(replace(part.train_sources[0], weight=weight) for part, weight in self.blend)
        mask = None if self.mask is None else self.mask[: self.train.size]
        return (TokenSource(tokens=self.train, documents=self.documents, mask=mask),)

    @property
    def validation_sources(self) -> tuple[TokenSource, ...]:
        """The tokens to validate on, with the weight of each source."""
        if self.blend:
            return tuple(replace(part.validation_sources[0], weight=weight) for part, weight in self.blend)
        held_out = self.documents and self.documents.behind(self.train.size)
        mask = None if self.mask is None else self.mask[self.train.size :]
        return (TokenSource(tokens=self.validation, documents=held_out, mask=mask),)

    def check_files(self) -> None:
        """Raise if a memory-mapped file is lost or has changed since it was hashed.

        Raises:
            DataError: a file is lost or changed.
        """
        for file in self.mapped:
            file.check()


def load_corpus(data: DataSection, *, vocab_size: int | None = None, cache: Path | None = None) -> Corpus:
    """Load the corpus that a config names, and hold out its last `val_fraction` for validation.

    Token files are memory-mapped; they are read through once, for their hashes and their largest id. With
    `data.weights` each path is a corpus of its own, which holds out its own last part.

    Args:
        vocab_size: the model's, so that tokenizing stops at the first text with a larger id.
        cache: run folder, in which token ids of text are cached; None caches nothing.

    Raises:
        DataError: a file is missing or empty, a glob matches nothing, an array has another type, a part is shorter
            than one sequence, or the tokenizer cannot be read or gives an id that the model does not have.
    """
    if vocab_size is not None:
        check_count("vocab_size", vocab_size, error=DataError)
    read = partial(_load, vocab_size=vocab_size, cache=cache)
    corpus = _blend([read(part) for part in _split_paths(data)], data.weights) if data.weights else read(data)
    sets = [(name, _load_set(name, paths, data, read)) for name, paths in data.validation_paths.items()]
    mapped = [file for _, own in sets for file in own.mapped]
    return replace(corpus, sets=tuple(sets), mapped=(*corpus.mapped, *mapped))


def _load_set(name: str, paths: tuple[str, ...], data: DataSection, read: Callable[[DataSection], Corpus]) -> Corpus:
    """Load a set of `data.validation`, of which all is held out."""
    source = "text" if data.source == "stdlib" else data.source
    whole = {"source": source, "paths": paths, "weights": (), "val_fraction": _ALL, "shuffle": "sequences"}
    try:
        return read(data.model_copy(update=whole))
    except DataError as error:
        problem = error.problem if "data.paths" in error.problem else f"validation set {name}: {error.problem}"
        raise DataError(of_validation(problem, name), fix=error.fix and of_validation(error.fix, name)) from None


def _split_paths(data: DataSection) -> list[DataSection]:
    """Return a section for each path of a blend."""
    if len(data.weights) != len(data.paths):
        raise DataError(
            f"data.weights has {_count(len(data.weights), 'number')} for {_count(len(data.paths), 'path')}.",
            fix="give each path in data.paths one weight.",
        )
    parts = [data.model_copy(update={"paths": (path,), "weights": ()}) for path in data.paths]
    seen: dict[Path, str] = {}
    for part in parts:
        for file in find_files(part.paths):
            if (other := seen.setdefault(file.resolve(), part.paths[0])) != part.paths[0]:
                raise DataError(
                    f"{file} is of two paths of the blend, {other!r} and {part.paths[0]!r}.",
                    fix="name each file by one path of data.paths.",
                )
    return parts


def _blend(parts: Sequence[Corpus], weights: Sequence[float]) -> Corpus:
    total = sum(weights)
    shares = [f"{weight / total:.1%} {part.description}" for part, weight in zip(parts, weights, strict=True)]
    return Corpus(
        train=join_tokens([part.train for part in parts]),
        validation=join_tokens([part.validation for part in parts]),
        sha256=hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest(),
        description="a blend of " + "; ".join(shares),
        vocab_size_needed=max(part.vocab_size_needed for part in parts),
        mapped=tuple(file for part in parts for file in part.mapped),
        blend=tuple(zip(parts, weights, strict=True)),
    )


def _load(data: DataSection, *, vocab_size: int | None, cache: Path | None) -> Corpus:
    """Load a corpus that is no blend."""
    if data.source == "pairs":
        return _of_pairs(load_pairs(data))
    if data.source == "tokens":
        return _load_tokens(data)
    if data.tokenizer == "bytes":
        documents, what = _read_documents(data)
        texts = _end_texts([text for _, text in documents])
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64) - 1
        return _cut(np.frombuffer(b"".join(texts), np.uint8), f"bytes of {what}", Documents(ends=ends), data=data)
    tokenizer = load_tokenizer(data.tokenizer)
    if data.source == "chat":
        return _load_chats(data, tokenizer)
    documents, what = _read_documents(data)
    tokens = tokenize(documents, tokenizer, cache=cache, vocab_size=vocab_size)
    mapped = [HashedFile(Path(str(tokens.filename)))] if isinstance(tokens, np.memmap) else []
    return _cut(tokens, f"{what} by {tokenizer.file}", _end_of(tokenizer, data), data=data, mapped=mapped)


def _of_pairs(loaded: LoadedPairs) -> Corpus:
    first = loaded.pairs.starts[loaded.pairs.num_rows - 2 * loaded.num_held_out]
    return Corpus(
        train=loaded.pairs.tokens[:first],
        validation=loaded.pairs.tokens[first:],
        sha256=loaded.sha256,
        description=loaded.description,
        vocab_size_needed=loaded.vocab_size_needed,
        preferences=loaded,
    )


def _load_tokens(data: DataSection) -> Corpus:
    files = [file for file in find_files(data.paths) if not is_mask(file)]
    folders = [folder for path in data.paths if (folder := read_prepared(Path(path)))]
    mapped = [HashedFile(file) for file in files]
    tokens = map_files(files, dtype=np.dtype(data.token_dtype))
    documents = Documents(end_id=data.end_id)
    if data.needs_documents and data.end_id < 0:
        if len(folders) < len(data.paths):
            raise DataError(
                f"{data.needs_documents} takes the ends of documents, which arrays of token ids do not say.",
                fix="set data.end_id, or prepare the tokens with `trellax data prepare`.",
            )
        documents = prepared_documents(folders)
    corpus = _cut(tokens, f"tokens of {_count(len(files), 'array')}", documents, data=data, mapped=mapped)
    mask = map_masks(files, dtype=np.dtype(data.token_dtype))
    corpus = corpus if mask is None else _with_mask(corpus, mask)
    check_shards(corpus.mapped, folders)
    return corpus


def _with_mask(corpus: Corpus, mask: Mask) -> Corpus:
    """Return the corpus with a mask of the tokens that count; another mask is another corpus."""
    sha256 = hashlib.sha256(f"{corpus.sha256} {mask.sha256}".encode()).hexdigest()
    return replace(corpus, mask=mask.counts, sha256=sha256, mapped=(*corpus.mapped, *mask.mapped))


def _load_chats(data: DataSection, tokenizer: ModelTokenizer) -> Corpus:
    import_extra("jinja2", tokenizer.file)
    from .chats import load_chats

    files, damage = find_files(data.paths), Damage()
    chats = load_chats(files, field=data.record_field, tokenizer=tokenizer, damage=damage)
    damage.check()
    answers = f"{chats.mask.mean():.0%} of them in answers" if chats.mask.size else "no answers"
    note = f", {damage}" if damage.num_damaged else ""
    what = f"{_count(len(chats.ends), 'chat')} in {_count(len(files), 'file')}{note} by {tokenizer.file}, {answers}"
    corpus = _cut(chats.tokens, what, Documents(ends=chats.ends), data=data)
    return _with_mask(corpus, Mask(counts=chats.mask, sha256=scan_tokens(chats.mask).sha256))


def check_vocabulary(corpus: Corpus, *, vocab_size: int) -> None:
    """Raise unless the model has an embedding for every token of the corpus.

    Raises:
        DataError: a token id is at or above `vocab_size`.
    """
    largest = max(own.vocab_size_needed for own in (corpus, *(own for _, own in corpus.sets))) - 1
    if largest >= vocab_size:
        raise DataError(
            f"the corpus holds token id {largest}, but model.vocab_size={vocab_size} knows ids 0 to {vocab_size - 1}.",
            fix=f"set model.vocab_size={largest + 1} or more, or check data.token_dtype.",
        )


def _read_documents(data: DataSection) -> tuple[list[tuple[str, bytes]], str]:
    """Return the names and contents of all files, and a description of them."""
    if data.source == "stdlib":
        return _read_stdlib()
    files = find_files(data.paths)
    damage = Damage()
    documents = _read_text(files, field=data.record_field, damage=damage)
    damage.check()
    if not damage.num_records:
        return documents, _count(len(files), "text file")
    note = f", {damage}" if damage.num_damaged else ""
    return documents, f"{_count(len(documents), 'document')} in {_count(len(files), 'file')}{note}"


def _end_of(tokenizer: ModelTokenizer, data: DataSection) -> Documents:
    """Return that documents end with the id that the config or the tokenizer names."""
    end_id = data.end_id if data.end_id >= 0 else tokenizer.special.end_id
    if data.needs_documents and end_id is None:
        raise DataError(
            f"{data.needs_documents} takes the ends of documents, and no file beside {tokenizer.file} names the "
            "token that ends one.",
            fix="name it: data.end_id=0, say.",
        )
    return Documents(end_id=end_id)


def _end_texts(texts: Sequence[bytes]) -> list[bytes]:
    """Return the texts that are not empty, with a line break after each that does not end with one but the last."""
    texts = [text for text in texts if text]
    return [*(text if text.endswith(b"\n") else text + b"\n" for text in texts[:-1]), *texts[-1:]]


def _read_stdlib() -> tuple[list[tuple[str, bytes]], str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root).as_posix() for file in root.rglob("*.py") if _is_library(file.relative_to(root))]
    # In the order of the names' hashes the held-out tail is a random sample, not the modules from u to z.
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    if not names:
        raise DataError(
            f"this Python has no sources of its standard library in {root}.",
            fix="set data.source='text' and data.paths.",
        )
    documents = [(name, (root / name).read_bytes()) for name in names]
    return documents, f"Python {sysconfig.get_python_version()}'s standard library, {_count(len(names), 'file')}"


def _is_library(name: Path) -> bool:
    # Build files (sysconfig data) hold paths of the machine, so they differ between equal Python versions.
    built = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
    return not built and _SKIPPED_FOLDERS.isdisjoint(name.parts)


def _read_text(files: Sequence[Path], *, field: str, damage: Damage) -> list[tuple[str, bytes]]:
    """Read documents and return places and contents; since all are in memory at once, too many bytes are refused."""
    try:
        sizes = {file: file.stat().st_size for file in files if not record_kind(file)}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    check_total(sum(sizes.values()), files, largest=max(sizes, key=lambda file: sizes[file], default=files[0]))
    documents, total = [], 0
    for name, text in read_texts(files, field=field, damage=damage):
        total += len(text)
        check_total(total, files, largest=Path(name))
        documents.append((name, text))
    return documents


def _cut(
    tokens: Tokens,
    description: str,
    documents: Documents,
    *,
    data: DataSection,
    mapped: Sequence[HashedFile] = (),
) -> Corpus:
    if not tokens.size:
        raise DataError(
            f"the corpus is empty: {description}, 0 tokens.", fix="name files that hold something in data.paths."
        )
    held_out = round(tokens.size * data.val_fraction)
    parts = {"training": tokens[: tokens.size - held_out], "validation": tokens[tokens.size - held_out :]}
    for name, part in parts.items():
        if part.size < data.seq_len + 1 and not (name == "training" and data.val_fraction == _ALL):
            raise DataError(
                f"the {name} part of the corpus has {part.size} of {tokens.size} tokens, but one sequence needs "
                f"data.seq_len + 1 = {data.seq_len + 1}.",
                fix=f"use more text, another data.val_fraction than {data.val_fraction:g}, or a shorter data.seq_len.",
            )
    scan = scan_tokens(tokens, files=mapped)
    return Corpus(
        train=parts["training"],
        validation=parts["validation"],
        sha256=scan.sha256,
        description=f"{description}, {tokens.size:,} tokens, {held_out:,} held out",
        vocab_size_needed=256 if tokens.dtype == np.uint8 else scan.largest + 1,
        mapped=scan.mapped,
        documents=documents if data.packing == "on" else None,
        shuffled=documents if data.shuffle == "documents" else None,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
