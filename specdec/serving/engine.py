"""The engine: submit requests from any thread, and one thread of its own runs them all."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from specdec.budget.adaptive import make_budget
from specdec.checks import whole_number
from specdec.decode import Decoder
from specdec.drafters.grammar import guided
from specdec.engine.kv_memory import make_tables
from specdec.grammar.compiler import end_tokens
from specdec.grammar.row import RowGrammar
from specdec.interfaces import Drafter, Row, Verifier
from specdec.runtime import Runtime, as_verifier
from specdec.serving.grammars import Grammars
from specdec.serving.handle import Handle
from specdec.serving.job import Job
from specdec.serving.pass_record import PassRecord
from specdec.serving.per_request import EachForItself, PerRequest, RequestDrafter, RequestRng, RequestTransform
from specdec.serving.request import Completion, Delta, FinishReason, RequestSettings
from specdec.serving.scheduler import Scheduler, UsualPasses
from specdec.serving.text import AnswerText
from specdec.settings import DEFAULTS, Settings


class QueueFullError(RuntimeError):
    """More requests wait than ``max_waiting`` allows."""


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """What an engine holds now, and has done since it was made."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0  # by requests; what is kept of ended ones is free for whoever needs it
    kv_blocks_total: int = 0
    kv_utilisation: float = 1.0  # tokens held / slots of the blocks that hold them
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, spared by a shared prefix
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    passes: int = 0  # of the target
    row_passes: int = 0  # rows that took a step, over all passes
    preemptions: int = 0
    requests_finished: Mapping[str, int] | None = None  # by reason


class Engine:
    """Answers many requests at once: rows join and leave at any pass, share prefixes, and speculate.

    Each request's tokens are those that it would get alone: in float32 those of ``generate()``, with verifier
    ``match`` also when sampling with the same seed.

    Args:
        model: any causal LM of transformers; it is not modified.
        tokenizer: for prompts and stop strings that are text, for the text of answers, and for grammars.
        drafter, verifier, draft_model, max_nodes, adaptive, accelerate: as for ``specdec.generate``.
        kv_memory: for keys and values of the target and its draft models, in bytes or as "2GB"; None: a quarter of
            what is free, at most 4 GB.
        block_size: tokens of a block.
        max_rows: requests that run at a time.
        max_waiting: requests that may wait; more are refused. None: any number.
        token_budget: columns of a pass up to which prompts fill it: smaller ones delay other rows less.
        prefix_sharing: whether texts that begin alike share what is computed for their beginnings.
        on_pass: told of each pass, in the engine's thread; what it takes delays all rows, and an error of its ends them.

    Raises:
        UnsupportedModelError: the model cannot be verified.
        ValueError: an argument outside its range; the message names it.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any | None = None,
        drafter: str | Path | Drafter = DEFAULTS.drafter,
        verifier: str | Verifier = DEFAULTS.verifier,
        draft_model: Any | None = None,
        max_nodes: int = DEFAULTS.max_nodes,
        adaptive: bool = DEFAULTS.adaptive,
        accelerate: bool = True,
        kv_memory: int | str | None = None,
        block_size: int = 16,
        max_rows: int = 16,
        max_waiting: int | None = None,
        token_budget: int = 512,
        prefix_sharing: bool = True,
        on_pass: Callable[[PassRecord], None] | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("block_size", block_size), ("token_budget", token_budget)):
            if whole_number(name, value) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        draft_models = (
            [] if draft_model is None else draft_model if isinstance(draft_model, list | tuple) else [draft_model]
        )
        self.tokenizer, self.max_waiting = tokenizer, max_waiting
        tables = make_tables([model, *draft_models], kv_memory, block_size, prefix_sharing)
        runtime = Runtime(model, draft_models, accelerate=accelerate, tables=tables)
        settings = Settings(verifier=verifier, max_nodes=max_nodes, adaptive=adaptive, drafter=drafter)
        plan = runtime.plan(settings, max_rows)
        rule = as_verifier(verifier)
        self.drafter = guided(runtime.drafter(plan.drafter, rule), rule, is_growing=plan.drafter == "auto")
        budget = UsualPasses(make_budget(plan.max_nodes, plan.adaptive, plan.costs, runtime.target.in_line))
        self._requests = PerRequest()
        rng = RequestRng(self._requests)
        self._target = runtime.target
        self._grammars = Grammars(tokenizer, runtime.target.vocab_size)
        decoder: Decoder = runtime.decoder(
            settings,
            RequestTransform(self._requests),
            self._requests.stop,
            drafter=RequestDrafter(self.drafter, self._requests),
            budget=budget,
            rng=rng,
            decide=lambda verifier, _: EachForItself(verifier, rng),
            num_rows=max_rows,
        )
        self._scheduler = Scheduler(
            decoder, runtime.target, tables, self._requests, max_rows, plan.max_nodes, token_budget, on_pass
        )
        budget.is_usual = lambda: not self._scheduler.has_prompts
        config = runtime.target.model.generation_config
        self._default_stops = frozenset(end_tokens(config.eos_token_id) if config else ())
        self._keys = count()
        self._inbox: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = self._must_end = False
        self._finished: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._metrics = self._measured()

    @property
    def context_length(self) -> int | None:
        """The positions that the model has; None: its config does not say."""
        return self._target.context_length

    @property
    def vocab_size(self) -> int:
        """Token ids are in [0, vocab_size)."""
        return self._target.vocab_size

    @property
    def max_length(self) -> int:
        """The most tokens of one request, prompt included: the cache, or the model's positions if these are fewer."""
        pool = self._scheduler.tables.pool
        slots = pool.num_blocks * pool.block_size - 1
        return slots if self.context_length is None else min(slots, self.context_length)

    def submit(
        self, prompt: str | Sequence[int], settings: RequestSettings | None = None, *, request_id: str | None = None
    ) -> Handle:
        """Ask for an answer to ``prompt``, text or token ids; from any thread, without waiting.

        Raises:
            ValueError: the prompt or the settings do not fit the model or the cache.
            GrammarError: the grammar cannot be kept to with this tokenizer.
            QueueFullError: too many requests wait.
            RuntimeError: the engine is closed.
        """
        job = self._job(self._tokens(prompt), settings or RequestSettings(), request_id)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if self.max_waiting is not None and waiting >= self.max_waiting:
                raise QueueFullError(f"{waiting} requests wait, and max_waiting is {self.max_waiting}; try again later")
            self._inbox.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="specdec engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job.handle

    def run(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: RequestSettings | Sequence[RequestSettings] | None = None,
    ) -> list[Completion]:
        """The answers to all ``prompts``, in their order; ``settings`` for all, or one each.

        Raises:
            ValueError: as ``submit``; then none of them runs.
            Exception: what ended one of the requests.
        """
        each = list(settings) if isinstance(settings, Sequence) else [settings] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"settings must be one, or one for each of {len(prompts)} prompts, got {len(each)}")
        handles: list[Handle] = []
        try:
            handles += [self.submit(prompt, own) for prompt, own in zip(prompts, each, strict=True)]
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def metrics(self) -> EngineMetrics:
        """What the engine holds and has done, after the latest pass."""
        return self._metrics

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, let those that run and wait finish for ``timeout`` seconds (None: to their end), and
        cancel what is left."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout)
        with self._changed:
            self._must_end = True
            self._changed.notify_all()
        thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(None if kind is None else 0)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt of text needs a tokenizer: Engine(model, tokenizer=...), or pass token ids")
            return list(self.tokenizer(prompt).input_ids)
        return [whole_number("a token id of the prompt", token) for token in prompt]

    def _job(self, tokens: list[int], settings: RequestSettings, request_id: str | None) -> Job:
        if settings.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer=...)")
        key = next(self._keys)
        row = Row(key, tokens, len(tokens) + settings.max_new_tokens)
        self._target.check(row)
        pool = self._scheduler.tables.pool
        if pool.blocks_for(row.max_tokens + 1) > pool.num_blocks:
            raise ValueError(
                f"the prompt and max_new_tokens make {row.max_tokens} tokens, and the key-value cache holds "
                f"{pool.num_blocks * pool.block_size - 1}; ask for fewer, or give the engine more kv_memory"
            )
        seed = int(torch.randint(2**62, ()).item()) if settings.seed is None else settings.seed
        completion = Completion(request_id or f"request-{key}", tuple(tokens), seed)
        stops = self._default_stops if settings.stop_token_ids is None else frozenset(settings.stop_token_ids)
        if settings.grammar is not None:
            row.grammar = RowGrammar(self._grammars.start(settings.grammar, stops), row.num_prompt)
        text = AnswerText(self.tokenizer, tuple(settings.stop))
        cancel = partial(self._cancel, key)
        return Job(row, settings, completion, Handle(completion, cancel), text, stops, time.perf_counter())

    def _cancel(self, key: int) -> None:
        with self._changed:
            for job in (*self._inbox, *self._scheduler.waiting, *self._scheduler.running):
                if job.row.key == key:
                    job.is_cancelled = True
            self._changed.notify_all()

    def _run(self) -> None:
        """The engine's thread."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                while not (self._inbox or scheduler.waiting or scheduler.running or self._is_closed):
                    self._changed.wait()
                while self._inbox:
                    scheduler.add(self._inbox.popleft())
                jobs = (*scheduler.waiting, *scheduler.running)
                if not jobs:
                    return  # closed, and nothing is left to do
                dropped = [job for job in jobs if job.is_cancelled or self._must_end]
                for job in dropped:
                    scheduler.remove(job)
            for job in dropped:
                self._end(job, FinishReason.CANCELLED)
            try:
                outcome = scheduler.step()
            except BaseException as error:  # of the model or a drafter: nobody knows whose
                for job in scheduler.abandon(error):
                    self._end(job, FinishReason.ERROR, error)
                self._metrics = self._measured()
                continue
            now = time.perf_counter()
            deltas = [(job, job.delta(emission, now)) for job, emission in outcome.emissions]
            self._count(deltas)
            self._metrics = self._measured()
            for job, delta in deltas:
                job.handle.push(delta)
            for job, failure in outcome.failures:
                self._end(job, FinishReason.ERROR, failure)

    def _end(self, job: Job, reason: FinishReason, error: BaseException | None = None) -> None:
        self._finished[reason] += 1
        job.completion.total_s = time.perf_counter() - job.submitted_at
        job.handle.push(Delta((), "", None, (), reason), error)

    def _count(self, deltas: Sequence[tuple[Job, Delta]]) -> None:
        for job, delta in deltas:
            assert delta.step is not None
            if job.completion.stats.num_drafts == 0:
                self._counts["prompt_tokens"] += len(job.completion.prompt_tokens)
                self._counts["cached_tokens"] += job.completion.num_cached
            self._counts["generated_tokens"] += len(delta.tokens)
            self._counts["drafted_tokens"] += delta.step.num_drafted
            self._counts["accepted_tokens"] += delta.step.num_accepted
            self._counts["row_passes"] += 1
            if delta.finish_reason is not None:
                self._finished[delta.finish_reason] += 1

    def _measured(self) -> EngineMetrics:
        scheduler, tables, filled = self._scheduler, self._scheduler.tables, self._filled()
        return EngineMetrics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            kv_blocks_used=len(filled),
            kv_blocks_total=tables.pool.num_blocks,
            kv_utilisation=sum(filled.values()) / (len(filled) * tables.pool.block_size) if filled else 1.0,
            passes=self._target.num_passes,
            preemptions=scheduler.num_preemptions,
            requests_finished=dict(self._finished),
            **self._counts,
        )

    def _filled(self) -> dict[int, int]:
        """The blocks of running rows, and how many slots of each hold a token."""
        tables, filled = self._scheduler.tables, dict[int, int]()
        size = tables.pool.block_size
        for row in (job.row for job in self._scheduler.running):
            kept = self._target.num_kept(row)
            for i, block in enumerate(tables[row].blocks):
                filled[block] = max(filled.get(block, 0), min(max(kept - i * size, 0), size))
        return filled
