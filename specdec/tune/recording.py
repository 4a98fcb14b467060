"""Records what drafters do on real prompts, beside plain decoding of the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from specdec.budget.adaptive import FixedBudget
from specdec.tune.setting import Answer, Pass, Setting, Tokens

NONE = "none"
_MIN_VISITS = 5


@dataclass(frozen=True, slots=True)
class Record:
    """What one drafter did on the prompts at the largest size."""

    spec: str
    answers: list[Answer] = field(default_factory=list)  # of each batch
    drafts_by_level: bool = False

    @property
    def steps(self) -> list[Pass]:
        """All but the prompts' passes."""
        return [step for answer in self.answers for step in answer.passes[1:]]

    @property
    def draft_s(self) -> float:
        return median([step.draft_s for step in self.steps] or [0.0])

    def acceptance_table(self) -> list[list[float]]:
        """[depth][rank]: how often the child of that rank was accepted below an accepted node of that depth."""
        visits: dict[int, int] = {}
        hits: dict[int, dict[int, int]] = {}
        for step in self.steps:
            for draft in step.drafts:
                children, depths = draft.tree.children(), draft.tree.depths()
                for node in draft.accepted:
                    if children[node]:
                        visits[depths[node]] = visits.get(depths[node], 0) + 1
                    for rank, child in enumerate(children[node]):
                        if child in draft.accepted:
                            below = hits.setdefault(depths[node], {})
                            below[rank] = below.get(rank, 0) + 1
        table: list[list[float]] = []
        while visits.get(len(table), 0) >= _MIN_VISITS:
            rank_hits = hits.get(len(table), {})
            ranks = range(max(rank_hits, default=0) + 1)
            table.append([rank_hits.get(rank, 0) / visits[len(table)] for rank in ranks])
        return table


def record(
    setting: Setting,
    specs: Sequence[str],
    batches: Sequence[Sequence[Tokens]],
    max_nodes: int,
    is_over: Callable[[], bool] = lambda: False,
) -> list[Record]:
    """Decode each batch plainly and with each of ``specs`` at the largest size, in turn, until time runs out.

    Returns plain decoding first. All take turns on each batch, so that a machine that grows slower does so for all.
    """
    drafters = [setting.drafter(spec) for spec in (NONE, *specs)]
    records = [Record(s, [], d.drafts_by_level) for s, d in zip((NONE, *specs), drafters, strict=True)]
    decoders = [setting.decoder(drafter, FixedBudget(max_nodes)) for drafter in drafters]
    for number, prompts in enumerate(batches):
        for i in range(len(records)):
            turn = (number + i) % len(records)
            records[turn].answers.append(setting.answer(decoders[turn], prompts))
        if is_over():
            break
    return records
