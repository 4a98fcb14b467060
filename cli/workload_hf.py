"""transformers' engines for workloads: generate() on padded batches, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.cli.measure import left_padded, neutral_generation, up_to_end
from specdec.cli.saved import neutral_config
from specdec.cli.workload_options import EngineSpec
from specdec.cli.workload_runs import Asked, Queue, Run, in_batches
from specdec.records.workloads import Request

_TIMEOUT_S = 60.0  # without any result of transformers' continuous batching


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
            queue = Queue(asked)
            num_left = len(asked)
            last = time.perf_counter()
            while num_left:
                ready = queue.ready()
                queue.take(ready)
                for each in ready:
                    running.add_request(
                        list(each.ids), each.id, each.request.max_new_tokens, record_timestamps=True,
                    )  # fmt: skip
                result = running.get_result(timeout=queue.wait_s if queue else 1)
                if result is not None and result.is_finished():
                    self._take(result, queue)
                    num_left, last = num_left - 1, time.perf_counter()
                elif not running.is_running() or time.perf_counter() - last > _TIMEOUT_S:
                    raise RuntimeError(f"transformers' continuous batching ended with {num_left} requests unanswered")
        return queue.run

    def _take(self, result: Any, queue: Queue) -> None:
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
