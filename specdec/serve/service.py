"""Requests become texts of the engine: prompts, settings, limits and defaults."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specdec.serve.backend import Answer, Backend
from specdec.serve.bodies import Body, ChatBody, TextBody
from specdec.serve.constraints import constraint_of
from specdec.serve.errors import ApiError, bad, blame, queue_full, shutting_down, timed_out
from specdec.serve.formats import ChatFormat, Format, TextFormat
from specdec.serve.jobs import Job
from specdec.serve.limits import UNBOUNDED_NEW_TOKENS, Limits
from specdec.serve.penalties import processors_of
from specdec.serve.pieces import Vocabulary
from specdec.serve.prompts import Prompts
from specdec.serving.engine import QueueFullError
from specdec.serving.request import RequestSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What holds where a request does not say; sampling as in OpenAI's interface, unless the model's config says more."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    end_ids: tuple[int, ...] = ()  # tokens that end a text


@dataclass(frozen=True, slots=True)
class Started:
    """A request that runs: its texts, how to write them, and its prompts."""

    job: Job
    format: Format
    prompts: list[list[int]]


class Service:
    """The model called ``name``, ready to be asked."""

    def __init__(self, backend: Backend, name: str, defaults: Defaults, limits: Limits) -> None:
        self.backend, self.name, self.limits = backend, name, limits
        self.words = Vocabulary(backend.tokenizer)
        self.is_stopping = False
        self._num_starting = 0
        self._timers: dict[Job, asyncio.TimerHandle] = {}  # of the requests that run
        self._defaults = defaults
        longest = backend.max_length - 1  # one token must fit behind a prompt
        if limits.max_prompt_tokens is not None:
            longest = min(longest, limits.max_prompt_tokens)
        self.prompts = Prompts(backend.tokenizer, backend.vocab_size, longest)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) if ``name`` is another model than the one that is served."""
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def start_chat(self, body: ChatBody) -> Started:
        """Start the answers to a conversation. Raises ApiError."""
        with self._admitted(body):
            prompts = [await self.prompts.chat(body)]
            return await self._start(body, prompts, ChatFormat(self.name, self.words))

    async def start_text(self, body: TextBody) -> Started:
        """Start the continuations of texts. Raises ApiError."""
        with self._admitted(body):
            return await self._start(body, await self.prompts.text(body), TextFormat(self.name, self.words))

    def finish(self, job: Job) -> None:
        """Forget a request, whose rows are free from now on."""
        job.cancel()
        if (timer := self._timers.pop(job, None)) is not None:
            timer.cancel()

    def stop(self) -> None:
        """No new requests."""
        self.is_stopping = True

    def cut_short(self) -> None:
        """End those that run."""
        for job in tuple(self._timers):
            job.stop(shutting_down())

    def close(self) -> None:
        """End the thread that tokenizes; nothing can be asked any more."""
        self.stop()
        self.prompts.close()

    @contextmanager
    def _admitted(self, body: Body) -> Iterator[None]:
        if self.is_stopping:
            raise shutting_down()
        self.check_model(body.model)
        self._check_choices(body)
        if self._num_starting >= self.limits.max_starting:
            raise queue_full(f"{self._num_starting} requests are being read")
        self._num_starting += 1
        try:
            yield
        finally:
            self._num_starting -= 1

    def _check_choices(self, body: Body) -> None:
        number = body.num_prompts * body.num_choices
        if number > self.limits.max_choices:
            field = "n" if body.num_prompts == 1 else "prompt"
            raise bad(field, f"{field} asks for {number} texts, and a request may have {self.limits.max_choices}")

    async def _start(self, body: Body, prompts: list[list[int]], form: Format) -> Started:
        constraint = constraint_of(body)
        grammar = None if constraint is None else await asyncio.to_thread(constraint.build)
        if self.is_stopping:
            raise shutting_down()
        asked = [
            (prompt, self._settings(body, len(prompt), choice, grammar))
            for prompt in prompts
            for choice in range(body.num_choices)
        ]
        try:
            job = Job(self._submit(asked, form.id))
        except ApiError as error:
            # Prompt and settings were checked: what the engine still cannot use is the grammar, which it compiles.
            if constraint is not None and error.status == 400 and error.param is None:
                raise bad(constraint.field, f"{constraint.field}: {error.message}") from None
            raise
        seconds = self.limits.request_timeout_s
        self._timers[job] = asyncio.get_running_loop().call_later(seconds, job.stop, timed_out(seconds))
        return Started(job, form, prompts)

    def _submit(self, asked: Sequence[tuple[list[int], RequestSettings]], name: str) -> list[Answer]:
        """All of ``asked`` or none."""
        answers: list[Answer] = []
        try:
            for i, (prompt, settings) in enumerate(asked):
                answers.append(self.backend.submit(prompt, settings, request_id=f"{name}-{i}"))
        except BaseException as error:
            for answer in answers:
                answer.cancel()
            raise _as_answer(error) from error
        return answers

    def _settings(self, body: Body, num_prompt: int, choice: int, grammar: Any | None) -> RequestSettings:
        default = self._defaults

        def either(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        top_k = either(body.top_k, default.top_k)
        try:
            return RequestSettings(
                max_new_tokens=self._new_tokens(body, num_prompt),
                temperature=either(body.temperature, default.temperature),
                top_k=None if top_k in (-1, 0) else top_k,
                top_p=either(body.top_p, default.top_p),
                min_p=either(body.min_p, default.min_p),
                seed=None if body.seed is None else (body.seed + choice) % 2**64,
                stop=tuple(body.stop_strings),
                stop_token_ids=self._ends(body),
                logits_processors=processors_of(
                    body,
                    either(body.repetition_penalty, default.repetition_penalty),
                    num_prompt,
                    self.backend.vocab_size,
                ),
                draft=body.draft is not False,
                logprobs=body.num_logprobs,
                **({} if grammar is None else {"grammar": grammar}),
            )
        except ValueError as error:
            raise blame(error, type(body).model_fields) from None

    def _ends(self, body: Body) -> tuple[int, ...] | None:
        """The tokens that end a text, None for those of the model; what is asked for comes on top of the model's."""
        asked = tuple(body.stop_token_ids or ())
        if any(not 0 <= token < self.backend.vocab_size for token in asked):
            raise bad("stop_token_ids", f"stop_token_ids must be in [0, {self.backend.vocab_size}), got {list(asked)}")
        if body.ignore_eos:
            return asked
        return (*self._defaults.end_ids, *asked) if asked else None

    def _new_tokens(self, body: Body, num_prompt: int) -> int:
        field, asked = body.new_tokens
        limit, room = self.limits.max_new_tokens, self.backend.max_length - num_prompt
        if asked is None:
            endless = UNBOUNDED_NEW_TOKENS if self.backend.context_length is None else None
            return min(each for each in (body.default_new_tokens, limit, endless, room) if each is not None)
        if limit is not None and asked > limit:
            raise bad(field, f"{field} may be at most {limit} on this server, got {asked}")
        if asked > room:
            raise bad(
                field,
                f"{field} is {asked}, but the {self.backend.max_length} tokens of this model and its cache leave room for "
                f"{room} behind {num_prompt} prompt tokens",
                code="context_length_exceeded",
            )
        return asked


def _as_answer(error: BaseException) -> BaseException:
    """What a failed ``submit`` means to the client."""
    if isinstance(error, QueueFullError):
        return queue_full(str(error))
    if isinstance(error, ValueError | ImportError):  # what cannot be used, or only with a package that is not here
        return blame(error, ("prompt", "messages"))
    if isinstance(error, RuntimeError):
        return shutting_down()
    return error
