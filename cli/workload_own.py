"""Our own engines for workloads: the one for many requests, and our loop on padded batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.cli.bench_config import BenchConfig
from specdec.cli.loading import Loaded
from specdec.cli.workload_options import EngineSpec
from specdec.cli.workload_runs import Asked, Queue, Run, in_batches
from specdec.decode import Decoder
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
            queue = Queue(asked)
            while queue:
                for request_id in [key for key, handle in handles.items() if handle.done]:
                    queue.end(request_id, time.perf_counter())
                ready = queue.ready()
                queue.take(ready)
                for each in ready:
                    handles[each.id] = engine.submit(each.ids, self._settings(each.request), request_id=each.id)
                time.sleep(queue.wait_s)
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


@dataclass(frozen=True, slots=True)
class OwnBatches:
    """Our loop on padded batches; with one row and no drafts it is plain decoding, one request after another."""

    spec: EngineSpec
    drafter: str
    max_rows: int
    ends: frozenset[int]
    decoder: Decoder
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
