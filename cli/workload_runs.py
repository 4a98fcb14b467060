"""How a workload is served: what engines get and give, and when which request may begin.

Times are seconds of one clock, ``time.perf_counter``, which transformers' continuous batching uses, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specdec.cli.workload_options import EngineSpec
from specdec.interfaces import Step
from specdec.records.workloads import Request
from specdec.serving.pass_record import PassRecord

POLL_S = 0.002  # how often it is looked whether the answer that a request follows is complete


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


class Queue:
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

    @property
    def wait_s(self) -> float:
        """Seconds until something may begin that cannot yet: the next arrival, or a look at what others wait for."""
        arrivals = [self._arrival(each) for each in self._waiting]
        known = [at - time.perf_counter() for at in arrivals if at is not None]
        return max(min([*known, *([POLL_S] if None in arrivals else [])], default=0.0), 0.0)

    def _arrival(self, asked: Asked) -> float | None:
        follows = asked.request.follows
        begin = self.run.started_s if follows is None else self._ended.get(follows)
        return None if begin is None else begin + asked.request.arrival_s


def in_batches(
    asked: Sequence[Asked], max_rows: int, run_batch: Callable[[Sequence[Asked], Run], None], *, alike: bool = False
) -> Run:
    """Serve what has arrived in batches of ``max_rows``, each to its end; ``alike``: of one temperature."""
    queue = Queue(asked)
    while queue:
        ready = queue.ready()
        if not ready:
            time.sleep(queue.wait_s)
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
