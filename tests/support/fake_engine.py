"""A serving engine without a model: deterministic texts, passes of a chosen length, failures on demand.

It keeps what ``specdec.serve.backend`` promises and nothing more: rows, a queue, one thread that makes passes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any

from specdec.interfaces import Step
from specdec.serving.engine import EngineMetrics, QueueFullError
from specdec.serving.request import Completion, Delta, FinishReason, RequestSettings, TokenLogprobs
from specdec.stats import Stats

LETTERS = "abcdefghij "


class FakeAnswer:
    """One text: a row of the fake engine, and the handle its reader holds."""

    def __init__(self, engine: FakeEngine, name: str, prompt: Sequence[int], settings: RequestSettings) -> None:
        self.name, self.prompt, self.settings = name, tuple(prompt), settings
        self.tokens: list[int] = []
        self.text = ""
        self.stats = Stats()
        self.is_cancelled = False
        self.deltas: list[Delta] = []
        self.failure: Exception | None = None
        self.is_done = False
        self._engine = engine
        self._started = time.perf_counter()
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Delta]:
        event = asyncio.Event()
        with self._engine.lock:
            self._wakers.append((asyncio.get_running_loop(), event))
        seen = 0
        while True:
            with self._engine.lock:
                fresh, is_done = self.deltas[seen:], self.is_done
                event.clear()
            for delta in fresh:
                yield delta
            seen += len(fresh)
            if is_done:
                if self.failure is not None:
                    raise self.failure
                return
            await event.wait()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._whole().__await__()

    async def _whole(self) -> Completion:
        async for _ in self:
            pass
        seconds = time.perf_counter() - self._started
        return Completion(
            self.name, self.prompt, self.settings.seed or 0, self.tokens, self.text, self.deltas[-1].finish_reason,
            self.stats, num_cached=len(self.prompt) // 2, first_token_s=seconds / 2, total_s=seconds,
        )  # fmt: skip

    def cancel(self) -> None:
        self.is_cancelled = True

    def push(self, delta: Delta) -> None:
        """With the engine's lock held."""
        self.deltas.append(delta)
        for loop, event in self._wakers:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


class FakeEngine:
    """See above. ``pass_s`` is how long a pass takes, ``width`` how many tokens it emits for each row."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        pass_s: float = 0.0,
        width: int = 2,
        max_rows: int = 64,
        max_waiting: int | None = None,
        context_length: int | None = 4096,
        failure: Exception | None = None,
        padding: int = 0,
    ) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.vocab_size = len(tokenizer)
        self.max_length = context_length or 1 << 20
        self.lock = threading.RLock()
        self.running: list[FakeAnswer] = []
        self.asked: list[FakeAnswer] = []
        self._letters = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(each)[0]) for each in LETTERS]
        self._waiting: deque[FakeAnswer] = deque()
        self._finished: Counter[str] = Counter()
        self._passes = 0
        self._pass_s, self._width, self._max_rows, self._max_waiting = pass_s, width, max_rows, max_waiting
        self._failure, self._padding = failure, padding
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(
        self, prompt: str | Sequence[int], settings: RequestSettings | None = None, *, request_id: str | None = None
    ) -> FakeAnswer:
        assert not isinstance(prompt, str), "the server tokenizes"
        with self.lock:
            if self._closed.is_set():
                raise RuntimeError("the engine is closed")
            if self._max_waiting is not None and len(self._waiting) >= self._max_waiting > -1:
                raise QueueFullError(f"{len(self._waiting)} requests wait")
            answer = FakeAnswer(self, request_id or "", prompt, settings or RequestSettings())
            self._waiting.append(answer)
            self.asked.append(answer)
            return answer

    def metrics(self) -> EngineMetrics:
        with self.lock:
            tokens = [each.stats for each in self.asked]
            return EngineMetrics(
                running=len(self.running),
                waiting=len(self._waiting),
                kv_blocks_used=len(self.running),
                kv_blocks_total=self._max_rows,
                kv_utilisation=0.5,
                prompt_tokens=sum(len(each.prompt) for each in self.asked),
                generated_tokens=sum(each.num_tokens for each in tokens),
                passes=self._passes,
                requests_finished=dict(self._finished),
            )

    def close(self, timeout: float | None = None) -> None:
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed.is_set():
            with self.lock:
                while self._waiting and len(self.running) < self._max_rows:
                    self.running.append(self._waiting.popleft())
                is_idle = not self.running
            time.sleep(max(self._pass_s, 0.001 if is_idle else 0.0))
            with self.lock:
                self._passes += not is_idle
                for row in tuple(self.running):
                    self._advance(row)

    def _advance(self, row: FakeAnswer) -> None:
        if self._failure is not None and row.tokens:
            row.failure, row.is_done = self._failure, True
            self.running.remove(row)
            row.push(Delta((), "", None, (), FinishReason.ERROR))
            return
        delta = self._delta(row)
        if delta.finish_reason is not None:
            row.is_done = True
            self.running.remove(row)
            self._finished[delta.finish_reason] += 1
        row.push(delta)

    def _delta(self, row: FakeAnswer) -> Delta:
        if row.is_cancelled:
            return Delta((), "", None, (), FinishReason.CANCELLED)
        settings = row.settings
        room = settings.max_new_tokens - len(row.tokens)
        start, number = len(row.tokens), min(self._width, room)
        seed = sum(row.prompt) + (settings.seed or 0)
        fresh = [self._letters[(seed + (start + i) ** 2) % len(self._letters)] for i in range(number)]
        row.tokens += fresh
        text = self.tokenizer.decode(fresh) + " " * self._padding
        reason = FinishReason.LENGTH if len(row.tokens) >= settings.max_new_tokens else None
        for stop in settings.stop:
            if stop in row.text + text:
                text, reason = (row.text + text).partition(stop)[0][len(row.text) :], FinishReason.STOP
        row.text += text
        root = (row.tokens or [0])[start - 1]
        tree = (root, *fresh[:-1], self._letters[0])
        parents, nodes = (-1, *range(len(fresh) - 1), 0), tuple(range(len(fresh)))
        step = Step(
            0, len(row.deltas), len(row.prompt) + start, tuple(fresh), nodes, tree, parents, len(self.running), 0.0,
            self._pass_s, 0.0, reason is not None,
        )  # fmt: skip
        row.stats.add(step)
        told = settings.logprobs
        logprobs = () if told is None else tuple(
            TokenLogprobs(-0.5, tuple((each, -float(i + 1)) for i, each in enumerate(self._letters[:told]))) for _ in fresh
        )  # fmt: skip
        return Delta(tuple(fresh), text, step, logprobs, reason)
