"""What serves a workload: each engine behind one call, from requests with their token ids to tokens and times.

Times are seconds of one clock, ``time.perf_counter``, which transformers' continuous batching uses, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.cli.bench_config import BenchConfig
from specdec.cli.loading import Loaded
from specdec.cli.measure import left_padded, neutral_generation, up_to_end
from specdec.cli.saved import neutral_config
from specdec.cli.workload_options import HF, PAGED, RAGGED, EngineSpec
from specdec.interfaces import Row, Step
from specdec.records.workloads import Request
from specdec.rng import PhiloxRng
from specdec.runtime import as_verifier
from specdec.sampling import SamplingParams
from specdec.serving.engine import Engine
from specdec.serving.handle import Handle
from specdec.serving.pass_record import PassRecord
from specdec.serving.per_request import (
    EachForItself,
    PerRequest,
    RequestDrafter,
    RequestRng,
    RequestTransform,
    RowSettings,
    transform_for,
)
from specdec.serving.request import RequestSettings

_POLL_S = 0.002  # how often it is looked whether the answer that a request follows is complete
_TIMEOUT_S = 60.0  # without any result of transformers' continuous batching


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as engines get it."""

    request: Request
    ids: tuple[int, ...]  # (p,)

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def num_most(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.ids) + self.request.max_new_tokens


@dataclass(slots=True)
class Served:
    """What became of a request."""

    arrival_s: float  # on the engine's clock, as are ``times``
    tokens: tuple[int, ...] = ()
    times: list[float] = field(default_factory=list)  # when each token came; tokens of one pass come together
    steps: tuple[Step, ...] = ()  # of our own engines
    num_cached: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class Run:
    """One run of one engine over a whole workload."""

    started_s: float
    served: dict[str, Served] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    pass_times: list[float] = field(default_factory=list)
    num_blocks: int = 0
    num_passes: int | None = None

    @property
    def wall_s(self) -> float:
        """From the start to the last token."""
        return max(each.times[-1] for each in self.served.values() if each.times) - self.started_s


class WorkloadEngine(Protocol):
    """Something that serves workloads."""

    @property
    def spec(self) -> EngineSpec: ...
    @property
    def drafter(self) -> str | None: ...
    @property
    def max_rows(self) -> int: ...
    def run(self, asked: Sequence[Asked]) -> Run: ...


def make_engines(
    specs: Sequence[EngineSpec], config: BenchConfig, drafters: Sequence[str], loaded: Loaded, ends: frozenset[int]
) -> list[WorkloadEngine]:
    """Every engine with every number of rows, ours with every drafter."""
    engines: list[WorkloadEngine] = []
    for max_rows in config.serving.max_rows or (16,):
        for spec in specs:
            if spec.name == PAGED:
                engines += [Paged(spec, drafter, max_rows, config, loaded, ends) for drafter in drafters]
            elif spec.name == RAGGED:
                engines += [own_batches(spec, drafter, max_rows, config, loaded, ends) for drafter in drafters]
            elif spec.name == HF:
                engines.append(HfBatches(spec, max_rows, loaded.model, ends))
            else:
                engines.append(HfContinuous(spec, max_rows, loaded.model, ends))
    return engines


class _Queue:
    """Which requests may begin: those that have arrived, and whose earlier answer is complete."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.run = Run(time.perf_counter())
        self._waiting = list(asked)
        self._ended: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def end(self, request_id: str, at: float) -> None:
        """The answer to a request is complete."""
        self._ended[request_id] = at

    def ready(self) -> list[Asked]:
        """What has arrived by now, the earliest first; it stays until it is taken."""
        now = time.perf_counter()
        due = [(at, i) for i, each in enumerate(self._waiting) if (at := self._arrival(each)) is not None and at <= now]
        return [self._waiting[i] for _, i in sorted(due)]

    def take(self, asked: Sequence[Asked]) -> None:
        """These begin now."""
        for each in asked:
            arrival = self._arrival(each)
            assert arrival is not None
            self.run.served[each.id] = Served(arrival)
        taken = {each.id for each in asked}
        self._waiting = [each for each in self._waiting if each.id not in taken]

    def sleep(self, most: float | None = None) -> None:
        """Until the next request arrives; at most ``most`` seconds."""
        arrivals = [at for each in self._waiting if (at := self._arrival(each)) is not None]
        wait = max(min(arrivals, default=0.0) - time.perf_counter(), 0.0) if arrivals else _POLL_S
        time.sleep(wait if most is None else min(wait, most) or 0.0)

    def _arrival(self, asked: Asked) -> float | None:
        follows = asked.request.follows
        begin = self.run.started_s if follows is None else self._ended.get(follows)
        return None if begin is None else begin + asked.request.arrival_s


@dataclass(frozen=True, slots=True)
class Paged:
    """Our engine for many requests. Each run gets a new one: nothing is known of the run before."""

    spec: EngineSpec
    drafter: str
    max_rows: int
    config: BenchConfig
    loaded: Loaded
    ends: frozenset[int]

    def run(self, asked: Sequence[Asked]) -> Run:
        passes: list[tuple[float, PassRecord]] = []
        handles: dict[str, Handle] = {}
        with self._engine(lambda record: passes.append((time.perf_counter(), record))) as engine:
            queue = _Queue(asked)
            while queue:
                for request_id in [key for key, handle in handles.items() if handle.done]:
                    queue.end(request_id, time.perf_counter())
                ready = queue.ready()
                queue.take(ready)
                for each in ready:
                    handles[each.id] = engine.submit(each.ids, self._settings(each.request), request_id=each.id)
                if queue:
                    queue.sleep(_POLL_S)
            for handle in handles.values():
                handle.result()
            run, metrics = queue.run, engine.metrics()
        run.num_blocks, run.num_passes = metrics.kv_blocks_total, metrics.passes
        run.pass_times, run.passes = [at for at, _ in passes], [record for _, record in passes]
        for at, record in passes:
            for row in record.rows:
                run.served[row.request_id].times += [at] * row.num_emitted
        for request_id, handle in handles.items():
            served, completion = run.served[request_id], handle.result()
            served.tokens = tuple(completion.tokens)
            served.num_cached, served.num_preemptions = completion.num_cached, completion.num_preemptions
            served.steps = tuple(delta.step for delta in handle if delta.step is not None)
        return run

    def _settings(self, request: Request) -> RequestSettings:
        return RequestSettings(
            max_new_tokens=request.max_new_tokens, temperature=request.temperature, seed=request.seed,
            stop_token_ids=sorted(self.ends),
        )  # fmt: skip

    def _engine(self, on_pass: Callable[[PassRecord], None]) -> Engine:
        options = {name: self.spec.option(name) for name in ("prefix_sharing", "block_size", "token_budget")}
        return Engine(
            self.loaded.model, drafter=self.drafter, draft_model=list(self.loaded.draft_models) or None,
            verifier=self.config.verifier, max_nodes=self.config.max_nodes, adaptive=self.config.adaptive,
            accelerate=self.config.accelerate, kv_memory=self.config.serving.kv_memory, max_rows=self.max_rows,
            on_pass=on_pass, **options,
        )  # fmt: skip


def in_batches(
    asked: Sequence[Asked], max_rows: int, run_batch: Callable[[Sequence[Asked], Run], None], *, alike: bool = False
) -> Run:
    """Serve what has arrived in batches of ``max_rows``, each to its end; ``alike``: of one temperature."""
    queue = _Queue(asked)
    while queue:
        ready = queue.ready()
        if not ready:
            queue.sleep()
            continue
        if alike:
            ready = [each for each in ready if each.request.temperature == ready[0].request.temperature]
        batch = ready[:max_rows]
        queue.take(batch)
        run_batch(batch, queue.run)
        ended = time.perf_counter()
        for each in batch:
            queue.end(each.id, ended)
    return queue.run


@dataclass(frozen=True, slots=True)
class OwnBatches:
    """Our loop on padded batches; with one row and no drafts it is plain decoding, one request after another."""

    spec: EngineSpec
    drafter: str
    max_rows: int
    ends: frozenset[int]
    decoder: Any
    requests: PerRequest

    def run(self, asked: Sequence[Asked]) -> Run:
        return in_batches(asked, self.max_rows, self._run_batch)

    def _run_batch(self, batch: Sequence[Asked], run: Run) -> None:
        rows = [Row(i, list(each.ids), each.num_most) for i, each in enumerate(batch)]
        steps: list[list[Step]] = [[] for _ in batch]
        for row, each in zip(rows, batch, strict=True):
            transform = transform_for(SamplingParams(each.request.temperature), ())
            settings = RowSettings(
                transform, PhiloxRng(each.request.seed), True, lambda row: row.tokens[-1] in self.ends
            )
            self.requests.add(row, settings)
        try:
            for emission in self.decoder.run(rows):
                now, step = time.perf_counter(), emission.step
                steps[step.row].append(step)
                run.served[batch[step.row].id].times += [now] * len(step.tokens)
        finally:
            for row in rows:
                self.requests.remove(row)
        for row, each, own in zip(rows, batch, steps, strict=True):
            run.served[each.id].tokens, run.served[each.id].steps = tuple(row.tokens[row.num_prompt :]), tuple(own)


def own_batches(
    spec: EngineSpec, drafter: str, max_rows: int, config: BenchConfig, loaded: Loaded, ends: frozenset[int]
) -> OwnBatches:
    """Our loop, in which each request has its own temperature and noise."""
    requests = PerRequest()
    rng, verifier = RequestRng(requests), as_verifier(config.verifier)
    decoder = loaded.runtime.decoder(
        config.settings(drafter=drafter),
        RequestTransform(requests),
        requests.stop,
        drafter=RequestDrafter(loaded.runtime.drafter(drafter, verifier), requests),
        rng=rng,
        decide=lambda verifier, _: EachForItself(verifier, rng),
        num_rows=max_rows,
    )
    return OwnBatches(spec, drafter, max_rows, ends, decoder, requests)


@dataclass(frozen=True, slots=True)
class HfBatches:
    """transformers' generate() on padded batches, each of which runs to its longest answer."""

    spec: EngineSpec
    max_rows: int
    model: Any
    ends: frozenset[int]
    drafter: str | None = None

    def run(self, asked: Sequence[Asked]) -> Run:
        return in_batches(asked, self.max_rows, self._run_batch, alike=True)

    def _run_batch(self, batch: Sequence[Asked], run: Run) -> None:
        input_ids, mask = left_padded([each.ids for each in batch], self.model.device)
        streamer = _Times()
        options: dict[str, Any] = {"max_new_tokens": max(each.request.max_new_tokens for each in batch)}
        options |= _sampling(batch[0].request)
        devices = [input_ids.device] if input_ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices), neutral_generation(self.model, self.ends):
            torch.manual_seed(batch[0].request.seed)
            ids = self.model.generate(input_ids, attention_mask=mask, streamer=streamer, **options)
        for each, row in zip(batch, ids[:, input_ids.shape[1] :].tolist(), strict=True):
            served = run.served[each.id]
            served.tokens = up_to_end(row, self.ends)[: each.request.max_new_tokens]
            served.times = streamer.times[: len(served.tokens)]


@dataclass(frozen=True, slots=True)
class HfContinuous:
    """transformers' continuous batching, with a cache of what the workload can need and no switch to flash attention."""

    spec: EngineSpec
    max_rows: int
    model: Any
    ends: frozenset[int]
    drafter: str | None = None

    def run(self, asked: Sequence[Asked]) -> Run:
        if len({each.request.temperature for each in asked}) > 1:
            raise ValueError("hf-batch serves requests of one temperature; give all of the workload the same")
        config = neutral_config(self.model.generation_config, self.ends)
        config.update(**_sampling(asked[0].request), max_new_tokens=max(each.request.max_new_tokens for each in asked))
        config.eos_token_id = sorted(self.ends) or -1  # -1: none, said so that it is not warned of
        manager = self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=self._config(asked), timeout=5
        )
        with manager as running:
            queue = _Queue(asked)
            num_left = len(asked)
            last = time.perf_counter()
            while num_left:
                ready = queue.ready()
                queue.take(ready)
                for each in ready:
                    running.add_request(
                        list(each.ids), each.id, each.request.max_new_tokens, record_timestamps=True,
                    )  # fmt: skip
                result = running.get_result(timeout=_POLL_S if queue else 1)
                if result is not None and result.is_finished():
                    self._take(result, queue)
                    num_left, last = num_left - 1, time.perf_counter()
                elif not running.is_running() or time.perf_counter() - last > _TIMEOUT_S:
                    raise RuntimeError(f"transformers' continuous batching ended with {num_left} requests unanswered")
        return queue.run

    def _take(self, result: Any, queue: _Queue) -> None:
        """One result, checked: it drops requests that it cannot serve without an error."""
        if result.error is not None or not result.generated_tokens:
            raise RuntimeError(f"transformers' continuous batching failed on {result.request_id}: {result.error}")
        served = queue.run.served[result.request_id]
        served.tokens, served.times = tuple(result.generated_tokens), list(result.timestamps)
        queue.end(result.request_id, time.perf_counter())

    def _config(self, asked: Sequence[Asked]) -> Any:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        size, budget = self.spec.option("page_size"), self.spec.option("max_batch_tokens")
        most = sorted((each.num_most for each in asked), reverse=True)[: self.max_rows]
        return ContinuousBatchingConfig(
            page_size=size, num_blocks=sum(-(-length // size) + 1 for length in most), max_batch_tokens=budget,
            max_requests_per_batch=self.max_rows, auto_switch_to_flash=False, drop_unsupported_processors=False,
            seed=asked[0].request.seed % 2**63,
        )  # fmt: skip


def _sampling(request: Request) -> dict[str, Any]:
    """What generate() is told of sampling: the model's own distribution at the request's temperature."""
    if request.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}


@dataclass(slots=True)
class _Times:
    """A streamer that only looks at the clock when tokens come."""

    times: list[float] = field(default_factory=list)
    _has_prompt: bool = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self.times.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None: ...
