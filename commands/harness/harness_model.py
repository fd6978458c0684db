"""A model as lm-evaluation-harness asks for one: log-likelihoods, rolling log-likelihoods, and generated text.

Texts become tokens as in the harness' own Hugging Face back end, so its scores are the same up to rounding. Importing
this needs the package `lm_eval`; `run_tasks.py` says so where it is missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...hub.chat.template import load_chat_template
from ...hub.model_folder import ModelSource, open_model
from ...hub.tokenizer import ModelTokenizer
from ...meshes import DataError, MeshSpec, ServeError
from ...train.perplexity.score_sequences import Scored, SequenceScorer
from .generate import Generator, Prompt

_LINE_END = 10
"""The byte before a text of a model that reads bytes: such a corpus has a line end between texts."""

_MAX_GEN_TOKENS = 256
"""Tokens of an answer where a task names no limit, as in the harness' own back ends."""


class HarnessModel(TemplateLM):
    """A model in a folder, for `lm_eval.simple_evaluate(model=...)`.

    Weights are read when they are first needed: once for log-likelihoods, and once for generated text.

    >>> model = HarnessModel("runs/quickstart", mesh=MeshSpec(tensor=2))
    >>> lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])["results"]

    Args:
        folder: run folder or Hugging Face folder.
        mesh: sizes of the mesh; one device if left out.
        batch_size: sequences at a time, rounded up to what the mesh needs.
        max_length: most tokens that the model is given; all that it reads if left out.
        dtype: dtype to compute in, that of the model if left out.

    Raises:
        TrellaxError: the model cannot be read, or `max_length` is longer than it reads.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        mesh: MeshSpec | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.source: ModelSource = open_model(folder)
        self.folder, self.batch_size = Path(folder), batch_size
        self.max_length = max_length or self.source.config.max_tokens
        """Most tokens that the model is given at a time."""
        if self.max_length > self.source.config.max_tokens:
            raise DataError(
                f"max_length={max_length} is longer than the model reads, {self.source.config.max_tokens} tokens.",
                fix="leave it out, or give less.",
            )
        self._settings: dict[str, Any] = {"mesh": mesh or MeshSpec(), "batch_size": batch_size, "dtype": dtype}
        self._scorer: SequenceScorer | None = None
        self._generator: Generator | None = None

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        tokenizer = self.source.tokenizer
        end_id = tokenizer.special.end_id if isinstance(tokenizer, ModelTokenizer) else _LINE_END
        return self.prefix_token_id if end_id is None else end_id

    @property
    def prefix_token_id(self) -> int:
        """The id before the first token of a text without a context: the one that begins texts, or that ends them.

        Raises:
            DataError: the model names neither.
        """
        tokenizer = self.source.tokenizer
        if not isinstance(tokenizer, ModelTokenizer):
            return _LINE_END
        known = (*self.source.begin_ids, *([] if tokenizer.special.end_id is None else [tokenizer.special.end_id]))
        if not known:
            raise DataError(
                f"{self.folder} names no token that begins or ends a text, to put before one without a context.",
                fix='write "bos_token" into its tokenizer_config.json.',
            )
        return known[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Return the ids of a text, with the special tokens before it unless it begins with one."""
        tokenizer = self.source.tokenizer
        if not isinstance(tokenizer, ModelTokenizer):
            return tokenizer.encode(string)
        if add_special_tokens is None:
            begin = "".join(map(tokenizer.tokenizer.id_to_token, self.source.begin_ids))
            add_special_tokens = not (begin and string.startswith(begin))
        return tokenizer.encode_prompt(string) if add_special_tokens else tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_options: Any) -> list[tuple[float, bool]]:
        """Return log-likelihood and whether it is greedy, of (texts, tokens of the context, those to score)."""
        asked = []
        for texts, context, tokens in requests:
            if not 0 < len(tokens) <= self.max_length:
                raise DataError(
                    f"a task asks for the log-likelihood of {len(tokens)} tokens; the model reads {self.max_length}.",
                    fix="take another task, or a longer --seq-len.",
                )
            # What is too long loses its beginning. A context of spaces alone has no token.
            whole = [*(context or [self.prefix_token_id]), *tokens][-self.max_length - 1 :]
            asked.append((texts, Scored(tokens=tuple(whole), count=len(tokens))))
        self._scorer = self._scorer or SequenceScorer(self.source, **self._settings)
        found = [(one.logprob, one.is_greedy) for one in self._scorer.score([own for _, own in asked])]
        for (texts, _), answer in zip(asked, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **_options: Any) -> list[float]:
        """Return the log-likelihood of each text, its windows as the harness cuts them."""
        owners, windows = list[int](), list[Any]()
        for number, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(pair)) for pair in cut]
            owners += [number] * len(found)
            windows += found
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], **_options: Any) -> list[str]:
        """Return the answer to each context, up to a stop text, the end of the text, or the limit of tokens."""
        self._generator = self._generator or Generator(self.source, max_length=self.max_length, **self._settings)
        prompts, stops = list[Prompt](), list[list[str]]()
        for request in requests:
            context, given = request.args
            settings = normalize_gen_kwargs(given, _MAX_GEN_TOKENS)
            stops.append(handle_stop_sequences(settings.pop("until", None), eos=self._text_of_end()))
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ServeError(
                    f"a task asks for {settings['max_gen_toks']} tokens, of a model that reads {self.max_length}.",
                    fix="write a smaller max_gen_toks into generation_kwargs of the task.",
                )
            prompts.append((tuple(self.tok_encode(context)[-room:]), settings))
        answers = self._generator.answer(prompts, stops)
        texts = [
            postprocess_generated_text(answer, stop=stop, think_end_token=None)
            for answer, stop in zip(answers, stops, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _text_of_end(self) -> str | None:
        tokenizer = self.source.tokenizer
        if not isinstance(tokenizer, ModelTokenizer) or tokenizer.special.end_id is None:
            return None
        return tokenizer.tokenizer.id_to_token(tokenizer.special.end_id)

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness keeps requests: that of the folder."""
        return self.folder.resolve().name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the model's chat template, None if it has none."""
        found = load_chat_template(self.folder) if chat_template else None
        return None if found is None else found.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of messages by the model's chat template.

        Raises:
            ServeError: it has none, or it refuses the messages.
        """
        template = load_chat_template(self.folder)
        if template is None:
            raise ServeError(f"{self.folder} has no chat template.", fix="leave --apply-chat-template out.")
        return template.render(chat_history, ends="prompt" if add_generation_prompt else "message")
