"""Recorded drafts, decided on by an adaptive budget that begins as one does: it knows what passes cost and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specdec.budget.adaptive import AdaptiveBudget
from specdec.interfaces import Limit, Row, Verdict
from specdec.tree import TokenTree
from specdec.tune.recording import Record
from specdec.tune.replay import Replayed, StepSeconds
from specdec.tune.setting import Answer, Draft, Pass

_ENDLESS = 1 << 40


@dataclass(frozen=True, slots=True)
class AdaptiveReplay:
    """Plays ``record`` through ``budget``, all answers in turn.

    A step in which the budget drafts nothing yields one token a row; the recorded step stays until such steps have
    yielded as many tokens as it did.
    """

    record: Record
    seconds: StepSeconds
    plain: StepSeconds
    budget: AdaptiveBudget

    def run(self) -> list[Replayed]:
        return [self._answer(answer) for answer in self.record.answers]

    def _answer(self, answer: Answer) -> Replayed:
        rows = [Row(i, [0] * length, _ENDLESS) for i, length in enumerate(answer.prompt_lens)]
        first, _, _ = self._step(answer.passes[0], rows)
        tokens, seconds = 0, 0.0
        for step in answer.passes[1:]:
            present, rested = [rows[draft.row] for draft in step.drafts], 0
            while rested < step.num_tokens:
                num_tokens, step_s, is_rest = self._step(step, present)
                tokens, seconds = tokens + num_tokens, seconds + step_s
                if not is_rest:
                    break
                rested += num_tokens
        return Replayed(first, tokens, seconds)

    def _step(self, step: Pass, rows: Sequence[Row]) -> tuple[int, float, bool]:
        """Tokens, seconds, and whether nothing was drafted."""
        limits = self.budget.limits(rows, False)
        is_rest = all(limit.depth < 1 or limit.nodes < 1 for limit in limits)
        proposed = [self._within(*pair) for pair in zip(step.drafts, limits, strict=True)]
        trees = self.budget.cut(rows, proposed)
        verdicts = [_verdict(*pair) for pair in zip(step.drafts, trees, strict=True)]
        num_columns = max(map(len, trees))
        model = self.plain if is_rest else self.seconds
        saved_s = 0.0 if is_rest else self._saved_s(step, proposed)
        step_s = max(model.of(len(rows), num_columns) - saved_s, 0.0)
        draft_s = 0.0 if is_rest else min(max(self.record.draft_s - saved_s, 0.0), step_s)
        for row, verdict in zip(rows, verdicts, strict=True):
            row.tokens += verdict.tokens
            row.num_steps += 1
            row.num_new = len(verdict.tokens)
        self.budget.learn(rows, trees, verdicts, draft_s, step_s - draft_s)
        return sum(len(verdict.tokens) for verdict in verdicts), step_s, is_rest

    def _within(self, draft: Draft, limit: Limit) -> TokenTree:
        """What the drafter would have proposed within ``limit``: levels are advice that others than networks ignore."""
        tree = draft.tree
        depth = limit.num_levels if self.record.drafts_by_level else limit.depth
        depths = tree.depths()
        nodes = [node for node in range(len(tree)) if depths[node] <= depth][: limit.nodes + 1 if depth > 0 else 1]
        if len(nodes) == len(tree):
            return tree
        place = {node: i for i, node in enumerate(nodes)}
        return replace(
            tree,
            tokens=tuple(tree.tokens[node] for node in nodes),
            parents=tuple(place.get(tree.parents[node], -1) for node in nodes),
            sources=tuple(tree.sources[node] for node in nodes) if tree.sources else (),
            estimates=tuple(tree.estimates[node] for node in nodes) if tree.estimates else (),
        )

    def _saved_s(self, step: Pass, proposed: Sequence[TokenTree]) -> float:
        """Seconds of drafting that fewer levels save."""
        most = max(max(draft.tree.depths()) for draft in step.drafts)
        if not self.record.drafts_by_level or not most:
            return 0.0
        return self.record.draft_s * (1 - max(max(tree.depths()) for tree in proposed) / most)


def _verdict(draft: Draft, tree: TokenTree) -> Verdict:
    """What becomes of the part ``tree`` of a recorded draft."""
    if len(tree) == len(draft.tree):
        nodes = tuple(sorted(draft.accepted))
    else:
        accepted = {tuple(draft.tree.path_tokens(node)) for node in draft.accepted}
        nodes = tuple(node for node in range(len(tree)) if tuple(tree.path_tokens(node)) in accepted)
    return Verdict(nodes, (0,) * len(nodes))
