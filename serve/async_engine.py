"""Stream tokens to many coroutines from one engine, which a thread of its own steps.

The event loop sends the thread requests and cancellations; after every step the thread sends the loop the new tokens.
Only the thread touches the engine, and only the loop touches the streams, so neither waits for the other:

    event loop  submit, cancel ->  inbox  -> thread: step, step, ...
    TokenStream <- call_soon_threadsafe <-  new tokens, finish reason

A consumer that reads slowly delays nobody: its tokens wait in its stream. `http/app.py` serves them over HTTP.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from ..meshes import ServeError
from ..meshes.arguments import check_count
from .constraints.constraint import Constraint
from .engine import Engine
from .processes.channel import StepSender
from .processes.events import Event
from .requests import FinishReason, Request, ServedSequence, TokenLogprobs

COMPILE_S = 2.0
"""Most seconds in which the constraint of a request must compile."""

_COMPILING_THREADS = 2


class EngineStoppedError(ServeError):
    """The engine has stopped, so this answer will not end and no other can begin."""


class TokenStream:
    """The answer to one request, an async iterator of its tokens; `finish_reason` is None until it has ended.

    `logprobs` has an entry for each token that has arrived, if the request wants them; with the first token comes
    `num_shared`, the number of tokens of the prompt that were in the cache. `num_guessed` and `num_accepted` are the
    numbers of tokens that speculation has guessed, and of those that were right.

    Raises:
        ServeError: while iterating: logits are not finite, or the engine has stopped.
    """

    def __init__(self, request: Request, *, send: Callable[..., None]) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.num_shared = self.num_guessed = self.num_accepted = 0
        self.error: ServeError | None = None
        self._send = send
        self._tokens: deque[int] = deque()
        self._changed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        await self._wait()
        if not self._tokens:
            raise StopAsyncIteration
        return self._tokens.popleft()

    async def take(self) -> tuple[int, ...]:
        """Wait for a token, and return all that are there; none at the end of the answer.

        Raises:
            ServeError: as while iterating.
        """
        await self._wait()
        tokens = tuple(self._tokens)
        self._tokens.clear()
        return tokens

    def cancel(self) -> None:
        """End the answer with "cancelled", and free its slot; an ended answer stays as it is."""
        if self.finish_reason is None:
            self._send(self)
            self.receive(StreamUpdate(reason="cancelled"))

    def receive(self, update: "StreamUpdate") -> None:
        """Add tokens that the engine has decoded; those of a cancelled answer come too late."""
        if self.finish_reason is None:
            self._tokens += update.tokens
            self.logprobs += update.logprobs
            self.num_shared = update.num_shared
            self.num_guessed, self.num_accepted = update.num_guessed, update.num_accepted
            self.finish_reason, self.error = update.reason, update.error
            self._changed.set()

    async def _wait(self) -> None:
        while not self._tokens and self.finish_reason is None:
            self._changed.clear()
            await self._changed.wait()
        if not self._tokens and self.error:
            raise self.error


@dataclass(frozen=True, kw_only=True)
class StreamUpdate:
    """What a step adds to a stream: tokens with their log probabilities, if it has ended the reason, and an error."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_shared: int = 0
    num_guessed: int = 0
    num_accepted: int = 0
    reason: FinishReason | None = None
    error: ServeError | None = None


@dataclass(eq=False, kw_only=True)
class _Progress:
    """A stream on the thread's side: its sequence, and the number of its tokens that the stream has."""

    sequence: ServedSequence
    num_sent: int = 0

    def take(self, problem: ServeError | None) -> StreamUpdate:
        """Return what is new since the last call."""
        own, first = self.sequence, self.num_sent
        self.num_sent = len(own.tokens)
        return StreamUpdate(
            tokens=tuple(own.tokens[first:]),
            logprobs=tuple(own.logprobs[first:]),
            num_shared=own.num_shared,
            num_guessed=own.num_guessed,
            num_accepted=own.num_accepted,
            reason=own.finish_reason,
            error=own.error or problem if own.finish_reason == "error" else None,
        )


class AsyncEngine:
    """An engine for one event loop: `submit` returns a stream of tokens, and a thread steps the engine.

    >>> async with AsyncEngine(engine) as served:
    ...     async for token in served.submit(Request(prompt=(72, 105))):
    ...         print(token)

    Leaving the context cancels what has not ended; call `drain` before for what was begun to end.

    Args:
        max_waiting: most requests in the queue, besides those in slots.
        others: the way to the processes that serve the same model with this one, if there are any.
        on_failure: what the thread does with an error that ends it; `fail` with its text if left out.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 64,
        others: StepSender | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        check_count("max_waiting", max_waiting, error=ServeError, least=0)
        self.engine, self.max_waiting, self._others = engine, max_waiting, others
        self._on_failure = on_failure or (lambda error: self.fail(f"{type(error).__name__}: {error}"))
        self.error: EngineStoppedError | None = None
        self._streams: set[TokenStream] = set()
        self._idle = asyncio.Event()
        self._inbox: list[tuple[str, TokenStream]] = []
        self._has_work = threading.Condition()
        self._is_closing = False
        self._progress: dict[TokenStream, _Progress] = {}
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="constraints")

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._idle.set()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in tuple(self._streams):
            stream.cancel()
        with self._has_work:
            self._is_closing = True
            self._has_work.notify()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join)

    @property
    def num_open(self) -> int:
        """Number of requests that have not ended, in slots and in the queue."""
        return len(self._streams)

    @property
    def num_free(self) -> int:
        """Number of requests that `submit` accepts before one ends."""
        return self.engine.sizes.slots + self.max_waiting - len(self._streams)

    def submit(self, request: Request) -> TokenStream:
        """Put a request in the queue, and return the stream of its tokens; call it on the event loop.

        Raises:
            ServeError: the request does not fit the engine, the queue is full, or the engine has stopped.
        """
        if self.error:
            raise self.error
        if self.num_free <= 0:
            raise ServeError(
                f"{self.num_open} requests are in progress, all that {self.engine.sizes.slots} slots and a queue of "
                f"{self.max_waiting} take.",
                fix="try again later, or raise max_waiting.",
            )
        self.engine.check(request)
        stream = TokenStream(request, send=self._cancel)
        self._streams.add(stream)
        self._idle.clear()
        self._post("submit", stream)
        return stream

    async def compile(self, constraint: Constraint) -> None:
        """Compile a constraint on a thread, so that no answer waits; `submit` would compile it at once.

        Raises:
            ServeError: it does not compile, or not within `COMPILE_S`.
        """
        run = self._loop.run_in_executor
        # Once, and as long as it takes: the texts of all tokens.
        await run(self._compiling, self.engine.constraints.open)
        try:
            await asyncio.wait_for(run(self._compiling, self.engine.constraints.compile, constraint), COMPILE_S)
        except TimeoutError:
            raise ServeError(
                f"the form of the answer did not compile within {COMPILE_S:g} s.", fix="give a simpler one."
            ) from None

    async def drain(self) -> None:
        """Wait until every request has ended."""
        await self._idle.wait()

    def _cancel(self, stream: TokenStream) -> None:
        self._forget(stream)
        self._post("cancel", stream)

    def _forget(self, stream: TokenStream) -> None:
        self._streams.discard(stream)
        if not self._streams:
            self._idle.set()

    def _post(self, verb: str, stream: TokenStream) -> None:
        with self._has_work:
            self._inbox.append((verb, stream))
            self._has_work.notify()

    def _deliver(self, updates: list[tuple[TokenStream, StreamUpdate]]) -> None:
        """Hand new tokens to their streams; on the loop."""
        for stream, update in updates:
            stream.receive(update)
            if update.reason:
                self._forget(stream)

    def fail(self, why: str) -> None:
        """End all answers with an error, and accept no more; from any thread."""
        self._call(self._stop, EngineStoppedError(f"the engine has stopped: {why}", fix="restart the server."))

    def _stop(self, error: EngineStoppedError) -> None:
        """End all streams; on the loop."""
        self.error = error
        self._deliver([(stream, StreamUpdate(reason="error", error=error)) for stream in tuple(self._streams)])

    def _run(self) -> None:
        """Step the engine while there is work, and sleep while there is none; on the thread."""
        try:
            while (inbox := self._wait_for_work()) is not None:
                events = [event for verb, stream in inbox if (event := self._obey(verb, stream)) is not None]
                if self._others:
                    self._others.send(events)
                self._step()
            if self._others:
                self._others.end()
        except BaseException as error:
            # Whatever it is, those who wait must hear of it: this thread has no caller.
            self._on_failure(error)
            raise

    def _wait_for_work(self) -> list[tuple[str, TokenStream]] | None:
        """Return what was posted; None when closing with nothing left, cancelled slots included."""
        with self._has_work:
            while not self._inbox and self.engine.scheduler.is_idle:
                if self._is_closing:
                    return None
                self._has_work.wait()
            inbox, self._inbox = self._inbox, []
        return inbox

    def _obey(self, verb: str, stream: TokenStream) -> Event | None:
        """Submit or cancel a request, and return what other processes must hear."""
        if verb == "submit":
            self._progress[stream] = _Progress(sequence=self.engine.submit(stream.request))
            return stream.request
        if progress := self._progress.pop(stream, None):
            self.engine.cancel(progress.sequence)
            return progress.sequence.id
        return None

    def _step(self) -> None:
        """Run one step, and send the new tokens of every stream."""
        problem = None
        try:
            self.engine.step()
        except ServeError as error:
            problem = error
        updates = []
        for stream, progress in tuple(self._progress.items()):
            update = progress.take(problem)
            if update.tokens or update.reason:
                updates.append((stream, update))
            if update.reason:
                del self._progress[stream]
        if updates:
            self._call(self._deliver, updates)

    def _call(self, function: Callable[..., None], value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, value)
        except RuntimeError:  # the loop is closed, and nobody listens
            return
