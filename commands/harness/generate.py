"""Answer prompts until a stop text, with an engine that is made for them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...hub.model_folder import ModelSource
from ...meshes import MeshSpec
from ...serve import Engine, Request, param_shapes
from ...serve.state import MAX_STOPS
from ..engine import open_mesh

_SEED = 1234

Prompt = tuple[tuple[int, ...], Mapping[str, Any]]
"""Token ids, and the settings of the harness: `max_gen_toks`, `temperature` and others."""


class Generator:
    """Answer prompts with a model on a mesh; its engine is made anew only for longer ones."""

    def __init__(
        self, source: ModelSource, *, mesh: MeshSpec, batch_size: int, max_length: int, dtype: str | None
    ) -> None:
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        self._source = replace(source, config=replace(source.config, **given))
        self._spec, self._batch_size, self._max_length = mesh, batch_size, max_length
        self._engine: Engine | None = None

    def answer(self, prompts: Sequence[Prompt], stops: Sequence[Sequence[str]]) -> list[str]:
        """Return the text of each answer, which may go on behind the first of its stop texts.

        Raises:
            ServeError: a prompt does not fit the model.
        """
        requests = [self._request(tokens, settings) for tokens, settings in prompts]
        needed = max((len(request.prompt) + request.max_new_tokens for request in requests), default=0)
        if self._engine is None or self._engine.sizes.max_tokens < needed:
            self._engine = None  # its memory is free before the next one is made
            self._engine = self._open(needed)
        engine, decode = self._engine, self._source.tokenizer.decode
        sequences = [engine.submit(request) for request in requests]
        running = dict(zip(sequences, stops, strict=True))
        while not engine.scheduler.is_idle:
            engine.step()
            running = {one: own for one, own in running.items() if one.finish_reason is None}
            for sequence, own in running.items():
                if _has_stopped(decode(sequence.tokens), own):
                    engine.cancel(sequence)
        return [decode(sequence.tokens) for sequence in sequences]

    def _request(self, tokens: tuple[int, ...], settings: Mapping[str, Any]) -> Request:
        drawn: dict[str, Any] = {"temperature": 0.0}
        if settings.get("do_sample"):
            drawn = {name: settings[name] for name in ("top_k", "top_p", "min_p") if name in settings}
            drawn["temperature"] = float(settings.get("temperature") or 1.0)
        return Request(
            prompt=tokens or self._source.begin_ids,
            max_new_tokens=settings["max_gen_toks"],
            stop=self._source.end_ids,
            seed=_SEED,
            **drawn,
        )

    def _open(self, needed: int) -> Engine:
        config, spec, mesh = self._source.config, self._spec, open_mesh(self._spec)
        params = self._source.read(param_shapes(config, mesh=mesh, axes=spec.roles))
        parts = spec.data * spec.pipe
        return Engine(
            config,
            params,
            mesh=mesh,
            axes=spec.roles,
            slots=-(-self._batch_size // parts) * parts,
            # A power of two, so that somewhat longer prompts need no new engine.
            max_tokens=min(1 << (needed - 1).bit_length(), max(needed, self._max_length)),
            max_stops=max(MAX_STOPS, len(self._source.end_ids)),
        )


def _has_stopped(text: str, stops: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in stops)
