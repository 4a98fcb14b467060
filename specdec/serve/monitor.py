"""Metrics in Prometheus' form, under the names that vLLM gives them, so that its dashboards show this server too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specdec.serving.engine import EngineMetrics
from specdec.serving.request import Completion, Delta

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper ends of the bars, in seconds and in tokens: vLLM's.
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
                  160.0, 640.0, 2560.0)  # fmt: skip
_PER_TOKEN_S = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
              1920.0, 7680.0)  # fmt: skip
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_LABELS = ("engine", "model_name")
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}  # ours, vLLM's


class Monitor:
    """Everything that is measured: the engine's counts when they are asked for, times as requests go by."""

    def __init__(self, snapshot: Callable[[], EngineMetrics], model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(snapshot, model))
        self._labels = ("0", model)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"vllm:{name}", what, _LABELS, registry=self._registry, buckets=buckets)
            return metric.labels(*self._labels)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"vllm:{name}", what, _LABELS, registry=self._registry).labels(*self._labels)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S)
        self.between = histogram(
            "inter_token_latency_seconds", "Between two passes that emitted tokens for one request.", _PER_TOKEN_S
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time of a token behind the first.", _PER_TOKEN_S
        )
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end of the answer.", _REQUEST_S)
        self.queued = histogram("request_queue_time_seconds", "Waiting for a row.", _REQUEST_S)
        self.inference = histogram("request_inference_time_seconds", "From getting a row to the end.", _REQUEST_S)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.drafts = counter("spec_decode_num_drafts", "Verified drafts: passes of one request that had one.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens in them: nodes of their trees.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self._accepted_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts of which the token at this depth was accepted.",
            (*_LABELS, "position"),
            registry=self._registry,
        )

    def clock(self) -> Clock:
        """To follow one text with."""
        return Clock(self)

    def accept(self, position: int) -> None:
        """The token at ``position`` below the root of a draft was accepted."""
        self._accepted_per_pos.labels(*self._labels, str(position)).inc()

    def exposition(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self._registry)


class Clock:
    """One text's share of the metrics."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._last: float | None = None  # when the last pass emitted

    def tick(self, delta: Delta) -> None:
        """A pass emitted ``delta``."""
        now, monitor = time.monotonic(), self._monitor
        if self._last is not None and delta.tokens:
            monitor.between.observe(now - self._last)
        self._last = now
        if delta.step is not None and delta.step.num_drafted:
            monitor.drafts.inc()
            monitor.draft_tokens.inc(delta.step.num_drafted)
            monitor.accepted_tokens.inc(delta.step.num_accepted)
            for position in range(delta.step.num_accepted):
                monitor.accept(position)

    def finish(self, completion: Completion) -> None:
        """The text is complete."""
        monitor, num_tokens = self._monitor, len(completion.tokens)
        monitor.first_token.observe(completion.first_token_s)
        monitor.whole.observe(completion.total_s)
        monitor.queued.observe(completion.queued_s)
        monitor.inference.observe(completion.total_s - completion.queued_s)
        monitor.prompt_tokens.observe(len(completion.prompt_tokens))
        monitor.generation_tokens.observe(num_tokens)
        if num_tokens > 1:
            monitor.per_token.observe((completion.total_s - completion.first_token_s) / (num_tokens - 1))


class _EngineCollector(Collector):
    """What the engine counts, read when Prometheus asks: one consistent snapshot."""

    def __init__(self, snapshot: Callable[[], EngineMetrics], model: str) -> None:
        self._snapshot, self._labels = snapshot, ("0", model)

    def describe(self) -> list[Metric]:
        return []  # so that registering does not ask the engine

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        for name, what, value in (
            ("vllm:num_requests_running", "Requests that have a row.", now.running),
            ("vllm:num_requests_waiting", "Requests that wait for one.", now.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the cache's blocks in use, 1 is all of them.",
                now.kv_blocks_used / max(now.kv_blocks_total, 1),
            ),
            (
                "specdec:kv_cache_utilisation",
                "Share of the slots in used blocks that hold a token.",
                now.kv_utilisation,
            ),
        ):
            gauge = GaugeMetricFamily(name, what, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, what, count in (
            ("vllm:prompt_tokens", "Tokens of prompts.", now.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", now.generated_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked for among shared prefixes.", now.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", now.cached_tokens),
            ("vllm:num_preemptions", "Times a request lost its row to another.", now.preemptions),
            ("specdec:passes", "Forward passes of the target.", now.passes),
        ):
            counter = CounterMetricFamily(name, what, labels=_LABELS)
            counter.add_metric(self._labels, count)
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that ended.", labels=(*_LABELS, "finished_reason")
        )
        for reason, name in _REASONS.items():
            finished.add_metric((*self._labels, name), (now.requests_finished or {}).get(reason, 0))
        yield finished
