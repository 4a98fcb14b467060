"""Random acts on one engine: submit, cancel, preempt, evict, failures of allocation and of processors.

After each step every block has as many holders as it counts; in the end nothing is held and every answer is right.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

from crowd import SEED, Case, alone, crowd, engine
from pool_checks import check_pool

from specdec.errors import OutOfBlocksError
from specdec.paging.pool import BlockPool
from specdec.serving.job import Job
from specdec.serving.request import RequestSettings
from specdec.serving.scheduler import Scheduler

NUM_ACTS = int(os.environ.get("SPECDEC_SOAK_ACTS", "2500"))


def settings(rng: random.Random) -> RequestSettings:
    def fails(ids: Any, scores: Any) -> Any:
        if rng.random() < 0.05:
            raise RuntimeError("by design")
        return scores

    temperature = rng.choice((0.0, 1.0))
    return RequestSettings(
        max_new_tokens=rng.randrange(1, 25), stop_token_ids=(), temperature=temperature, draft=rng.random() < 0.8,
        seed=SEED if temperature else None, priority=rng.randrange(3), logits_processors=[fails] * (rng.random() < 0.05),
    )  # fmt: skip


def check(job: Job) -> None:
    """What the job has is the beginning of what it would get alone."""
    row = job.row
    expected = alone(tuple(row.tokens[: row.num_prompt]), float(job.settings.temperature))
    assert row.tokens[row.num_prompt :] == expected[: row.num_emitted]


def test_nothing_leaks_and_nothing_changes() -> None:
    rng = random.Random(0)
    prompts = crowd()
    turns = [prompt + alone(tuple(prompt), 0.0)[:9] + [3] for prompt in prompts]
    with engine(Case("hybrid:parts=ngram+model", 4, 60), max_rows=6) as made:
        scheduler: Scheduler = made._scheduler
        pool, tables = scheduler.tables.pool, scheduler.tables
        true_allocate = pool.allocate
        acts: Counter[str] = Counter()

        def allocate(num_blocks: int, behind: int | None = None) -> list[int]:
            if rng.random() < 0.01:
                acts["refused"] += 1
                raise OutOfBlocksError("by chance")
            return true_allocate(num_blocks, behind)

        pool.allocate = allocate  # type: ignore[method-assign]
        for _ in range(NUM_ACTS):
            act = rng.choices(("step", "submit", "cancel", "preempt", "evict"), (70, 20, 3, 5, 2))[0]
            if act == "submit" and len(scheduler.waiting) < 5:
                scheduler.add(made._job(list(rng.choice(prompts + turns)), settings(rng), None))
            elif act == "cancel" and (jobs := [*scheduler.waiting, *scheduler.running]):
                scheduler.remove(rng.choice(jobs))
            elif act == "preempt" and scheduler.running:
                scheduler._preempt(rng.choice(scheduler.running))
            elif act == "evict" and tables.tree is not None:
                tables.tree.evict(rng.randrange(20))
            elif act == "step":
                act = step(scheduler)
            acts[act] += 1
            rows = [job.row for job in scheduler.running]
            check_pool(pool, [tables[row].blocks for row in rows], tables.tree)
        pool.allocate = true_allocate  # type: ignore[method-assign]
        while scheduler.running or scheduler.waiting:
            step(scheduler)
        assert pool.num_held == (0 if tables.tree is None else tables.tree.num_blocks)
        assert isinstance(pool, BlockPool)
    assert (
        min(acts[name] for name in ("submit", "cancel", "preempt", "evict", "refused", "failed")) >= NUM_ACTS // 1000
    ), acts
    assert acts["finished"] > NUM_ACTS // 20, acts


def step(scheduler: Scheduler) -> str:
    outcome = scheduler.step()
    for job, _ in outcome.emissions:
        check(job)
    if outcome.failures:
        return "failed"
    return "finished" if any(emission.step.finished for _, emission in outcome.emissions) else "step"
