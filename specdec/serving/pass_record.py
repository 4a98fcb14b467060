"""What one pass of the engine did, for whoever watches it: which rows ran, and who held which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.decode import Emission
from specdec.engine.causal_lm import CausalLM
from specdec.paging.prefixes import PrefixTree
from specdec.paging.tables import BlockTables
from specdec.serving.job import Job


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One row of a pass, after its verdict and before it gave back what only its tree needed."""

    request_id: str
    num_prompt: int  # tokens
    num_tokens: int  # of the text so far, prompt included
    num_kept: int  # slots that hold verified keys and values
    blocks: tuple[int, ...]  # of the pool, in the order of the text; the last ones were room for the tree
    num_emitted: int  # 0: the pass processed a part of its prompt
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class EdgeRecord:
    """One block of the tree of prefixes."""

    block: int
    parent: int  # the block above; -1: a text begins here
    tokens: tuple[int, ...]
    num_holders: int  # the tree itself and the rows that use it


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass."""

    rows: tuple[RowRecord, ...]  # in the order in which they were let in
    num_waiting: int
    num_held: int  # blocks with a holder, rows or the tree of prefixes
    num_known: int  # of these, blocks of the tree
    num_preemptions: int  # since the engine was made
    prefixes: tuple[EdgeRecord, ...] | None  # the tree, parents first; None: it is much as it was


def record_pass(
    running: Sequence[Job],
    emissions: Sequence[tuple[Job, Emission]],
    target: CausalLM,
    tables: BlockTables,
    *,
    num_waiting: int,
    num_preemptions: int,
    with_prefixes: bool,
) -> PassRecord:
    """What a pass did, while finished rows still hold their blocks."""
    steps = {job: emission.step for job, emission in emissions}
    rows = []
    for job in running:
        step = steps.get(job)
        emitted, drafted, accepted = (len(step.tokens), step.num_drafted, step.num_accepted) if step else (0, 0, 0)
        rows.append(
            RowRecord(
                job.completion.request_id, job.row.num_prompt, len(job.row.tokens), target.num_kept(job.row),
                tuple(tables[job.row].blocks), emitted, drafted, accepted,
            )
        )  # fmt: skip
    tree = tables.tree
    return PassRecord(
        rows=tuple(rows),
        num_waiting=num_waiting,
        num_held=tables.pool.num_held,
        num_known=0 if tree is None else tree.num_blocks,
        num_preemptions=num_preemptions,
        prefixes=None if tree is None or not with_prefixes else _edges(tree),
    )


def _edges(tree: PrefixTree) -> tuple[EdgeRecord, ...]:
    found, waiting = list[EdgeRecord](), [*tree.root.below()][::-1]
    while waiting:
        edge = waiting.pop()
        assert edge.parent is not None
        found.append(EdgeRecord(edge.block, edge.parent.block, edge.tokens, tree.pool.num_holders(edge.block)))
        waiting += [*edge.below()][::-1]
    return tuple(found)
