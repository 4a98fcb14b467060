"""Which rows run in the next pass: continuous batching (Yu et al., 2022, "Orca") with prompts in chunks.

Each step lets waiting rows in as far as there is room, processes a piece of the prompts that are not complete beside
one speculative step of all others, and lets finished rows go. Where the cache is full a row is preempted: its blocks
go to the tree of prefixes, and later it goes on behind what is left of them, with the same tokens, because its noise
hangs on positions alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec.budget.adaptive import Budget
from specdec.decode import Decoder, Emission
from specdec.engine.causal_lm import CausalLM
from specdec.errors import OutOfBlocksError
from specdec.interfaces import Limit, Row, Verdict
from specdec.paging.prefixes import num_shared
from specdec.paging.tables import BlockTables
from specdec.serving.job import Job
from specdec.serving.pass_record import PassRecord, record_pass
from specdec.serving.per_request import PerRequest, RowFailedError
from specdec.tree import TokenTree


@dataclass(slots=True)
class Outcome:
    """What one step brought."""

    emissions: list[tuple[Job, Emission]] = field(default_factory=list)
    failures: list[tuple[Job, BaseException]] = field(default_factory=list)


@dataclass(slots=True)
class UsualPasses(Budget):
    """Lets ``budget`` learn from passes without prompt tokens alone: the others take longer for other reasons."""

    budget: Budget
    is_usual: Callable[[], bool] = lambda: True

    def limits(self, rows: Sequence[Row], chain_only: bool) -> list[Limit]:
        return self.budget.limits(rows, chain_only)

    def cut(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[TokenTree]:
        return self.budget.cut(rows, trees)

    def learn(
        self,
        rows: Sequence[Row],
        trees: Sequence[TokenTree],
        verdicts: Sequence[Verdict],
        draft_s: float,
        pass_s: float,
    ) -> None:
        if self.is_usual():
            self.budget.learn(rows, trees, verdicts, draft_s, pass_s)


@dataclass(slots=True)
class Scheduler:
    """Runs jobs; not thread-safe.

    Args:
        decoder: its target is ``target`` and its rows are asked about through ``requests``.
        max_rows: rows that run at a time.
        max_nodes: the largest tree, for which room is kept.
        token_budget: columns of a pass up to which prompts fill it.
        on_pass: told of each pass, in the engine's thread.
    """

    decoder: Decoder
    target: CausalLM
    tables: BlockTables
    requests: PerRequest
    max_rows: int
    max_nodes: int
    token_budget: int
    on_pass: Callable[[PassRecord], None] | None = None
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)  # in the order in which they were let in
    num_preemptions: int = 0
    has_chunks: bool = False  # whether the pass that runs holds pieces of prompts beside trees
    has_prompts: bool = False  # whether it holds any prompt token
    num_told: int = 0  # blocks of the tree of prefixes when ``on_pass`` last got it
    margin: int = 0  # slots behind a row's tokens for the nodes of one step; grows if a draft model needs more

    def __post_init__(self) -> None:
        self.margin = self.margin or self.max_nodes + 1

    def add(self, job: Job) -> None:
        """Let ``job`` wait for its turn."""
        self.waiting.append(job)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a row of ``num_tokens`` needs in a step, its tree and those of draft models included."""
        return self.tables.pool.blocks_for(num_tokens + self.margin)

    def step(self) -> Outcome:
        """One pass, with whoever can take part."""
        num_before = len(self.waiting)
        self._admit()
        has_joined = len(self.waiting) < num_before
        outcome = Outcome()
        if not self.running:
            return outcome
        decoding = self._plan()
        try:
            if decoding:
                emissions = self.decoder.step([job.row for job in decoding])
            elif self.has_chunks:
                self.target.score([], [])
                emissions = []
            else:
                return outcome
        except RowFailedError as failed:
            guilty = next(job for job in self.running if job.row is failed.row)
            self._leave(guilty)
            self._restart(list(self.running))
            outcome.failures.append((guilty, failed.__cause__ or failed))
            return outcome
        except OutOfBlocksError:  # a draft model grew more than there was room for
            self.margin *= 2
            self._restart(list(self.running))
            return outcome
        outcome.emissions = list(zip(decoding, emissions, strict=True))
        if self.on_pass is not None:
            self.on_pass(self._record(outcome, has_joined))
        self._after_step(outcome.emissions)
        return outcome

    def remove(self, job: Job) -> None:
        """Take ``job`` out, wherever it is."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.running:
            self._leave(job)

    def abandon(self, error: BaseException) -> list[Job]:
        """Drop everything after ``error``; the jobs that were running."""
        jobs, self.running = self.running, []
        self.decoder.leave([job.row for job in jobs], during=error)
        for job in jobs:
            self.requests.remove(job.row)
        return jobs

    def _admit(self) -> None:
        for job in sorted(self.waiting, key=lambda job: job.rank):
            if len(self.running) >= self.max_rows:
                return
            known = self.tables.num_known(job.row.tokens[:-1])
            if self._shares_a_prompt_in_work(job, known):
                continue  # it will find more of its text in the tree in a moment
            needed = self.blocks_for(len(job.row.tokens)) - known // self._size
            others = len(self.running) * (self.tables.pool.blocks_for(self.margin) + 1)
            if not self.tables.pool.make_room(needed + others) and self.running:
                return  # nobody overtakes: room is for the first
            try:
                self._join(job)
            except OutOfBlocksError:
                return

    def _join(self, job: Job) -> None:
        self.requests.add(job.row, job.row_settings())
        try:
            self.decoder.join([job.row])
        except BaseException:
            self.requests.remove(job.row)
            raise
        self.waiting.remove(job)
        self.running.append(job)
        if not job.has_run:
            job.has_run = True
            job.completion.queued_s = time.perf_counter() - job.submitted_at
            job.completion.num_cached = self.target.num_kept(job.row)
        for other in self.waiting:
            other.num_passed += other.row.key < job.row.key

    def _shares_a_prompt_in_work(self, job: Job, num_known: int) -> bool:
        """Whether a running row is about to fill a block of this job's text, of which ``num_known`` tokens are known."""
        if self.tables.tree is None:
            return False
        tokens = job.row.tokens[:-1]
        others = filter(self._is_prompt_in_work, self.running)
        return any(num_shared(tokens, other.row.tokens) - num_known >= self._size for other in others)

    def _is_prompt_in_work(self, job: Job) -> bool:
        return self.target.num_pending(job.row) > 0

    @property
    def _size(self) -> int:
        return self.tables.pool.block_size

    def _plan(self) -> list[Job]:
        """See that there is room, hand out prompt tokens; the jobs that take a step."""
        self.has_chunks = self.has_prompts = False
        while True:
            decoding, chunks = self._split()
            try:
                for job, count in chunks:
                    self.tables.reserve(job.row, self.target.num_kept(job.row) + count + 1)
                for job in decoding:
                    self.tables.reserve(job.row, len(job.row.tokens) + (self.margin if job.drafts else 1))
            except OutOfBlocksError:
                last = max(self.running, key=lambda job: job.rank)
                if len(self.running) > 1:
                    self._preempt(last)
                    continue
                last.drafts = False  # alone there is room for its tokens, if not for its trees
                self._restart([last])
                return []
            for job, count in chunks:
                self.target.queue_prefill(job.row, count)
            self.has_chunks = bool(chunks)
            self.has_prompts = self.has_chunks or any(map(self._is_prompt_in_work, decoding))
            return decoding

    def _split(self) -> tuple[list[Job], list[tuple[Job, int]]]:
        """The rows whose trees are scored, and how many prompt tokens others process beside them."""
        in_work = [job for job in self.running if self._is_prompt_in_work(job)]
        decoding = [job for job in self.running if job not in in_work]
        room = max(self.token_budget - len(decoding) * (1 + self.max_nodes), self.token_budget // 4, self._size)
        chunks: list[tuple[Job, int]] = []
        for job in in_work:
            num_pending = self.target.num_pending(job.row)
            if num_pending <= room:
                decoding.append(job)
            elif room > 0:
                chunks.append((job, room))
            room -= min(num_pending, room)
        return decoding, chunks

    def _record(self, outcome: Outcome, has_joined: bool) -> PassRecord:
        """What the pass did; with the tree of prefixes if a row was let in, or the tree is an eighth larger."""
        num_known = 0 if self.tables.tree is None else self.tables.tree.num_blocks
        is_news = has_joined or num_known > self.num_told + self.num_told // 8
        if is_news:
            self.num_told = num_known
        return record_pass(
            self.running,
            outcome.emissions,
            self.target,
            self.tables,
            num_waiting=len(self.waiting),
            num_preemptions=self.num_preemptions,
            with_prefixes=is_news,
        )

    def _after_step(self, emissions: Sequence[tuple[Job, Emission]]) -> None:
        finished = [job for job, emission in emissions if emission.step.finished]
        for job in finished:
            self._leave(job)
        self._share()
        for job in self.running:
            self.tables.trim(job.row, self.target.num_kept(job.row) + 1)

    def _share(self) -> None:
        """Let others use what is complete of the texts in work."""
        for job in self.running:
            self.tables.share(job.row, min(self.target.num_kept(job.row), len(job.row.tokens) - 1))

    def _leave(self, job: Job) -> None:
        self.running.remove(job)
        try:
            self.decoder.leave([job.row])
        finally:
            self.requests.remove(job.row)

    def _preempt(self, job: Job) -> None:
        self._leave(job)
        self.waiting.append(job)
        job.completion.num_preemptions += 1
        self.num_preemptions += 1

    def _restart(self, jobs: Sequence[Job]) -> None:
        """Let ``jobs`` join anew: what a broken step left in drafters is gone then, and their prefixes are known."""
        for job in jobs:
            self._leave(job)
            self.waiting.append(job)
