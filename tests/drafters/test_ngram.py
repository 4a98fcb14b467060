"""The index of prompt lookup: what it counts, and that no text makes it large or slow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice

import pytest
from onerow import propose

from specdec.drafters.ngram import MAX_SUCCESSORS, Context, ContextIndex, NgramDrafter
from specdec.interfaces import Row, Verdict

LENGTH = 1500
PERIOD = [(i * 7919) % 1000 for i in range(400)]


def rows_of_a_table() -> list[int]:
    numbers = random.Random(0)
    return [token for _ in range(LENGTH // 3) for token in (numbers.randrange(9000), 11, numbers.randrange(9000))]


TEXTS = {
    "one token": [5] * LENGTH,
    "two tokens": random.Random(1).choices(range(2), k=LENGTH),
    "all tokens differ": list(range(LENGTH)),
    "random": random.Random(2).choices(range(9000), k=LENGTH),
    "one separator": [token for i in range(LENGTH // 2) for token in (11, 20 + i)],
    "three separators": [token for i in range(LENGTH // 4) for token in (11, 11, 11, 20 + i)],
    "table": rows_of_a_table(),
    "long period": list(islice(cycle(PERIOD), LENGTH)),
}


def faded_counts(tokens: Sequence[int], order: int) -> dict[Context, dict[int, float]]:
    """By definition: each time that the context occurs again, what came after it before counts 0.7 times as much."""
    counts: dict[Context, dict[int, float]] = {}
    for i in range(order, len(tokens)):
        known = counts.setdefault(tuple(tokens[i - order : i]), {})
        for token in known:
            known[token] *= 0.7
        known[tokens[i]] = known.get(tokens[i], 0.0) + 1.0
    return counts


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_no_context_keeps_more_than_its_latest_successors(text: list[int]) -> None:
    """A separator is followed by everything: fading and weighing all of that at each token took time without end."""
    index = ContextIndex(4)
    index.extend(text)
    for order in range(1, 5):
        contexts = index.successors[order]
        assert len(contexts) <= len(text) - order  # one at most for each token
        assert max(map(len, contexts.values())) <= MAX_SUCCESSORS


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_what_is_kept_are_the_faded_counts_of_the_latest(text: list[int]) -> None:
    index = ContextIndex(3)
    index.extend(text[:700])
    for token in text[700:]:  # token by token as in one go
        index.extend([token])
    for order in range(1, 4):
        exact = faded_counts(text, order)
        assert index.successors[order].keys() == exact.keys()
        for context, known in index.successors[order].items():
            assert {token: exact[context][token] for token in known} == pytest.approx(known)
            dropped = sum(count for token, count in exact[context].items() if token not in known)
            assert dropped < 1e-4 * sum(known.values())


def test_the_successor_not_seen_for_longest_is_dropped() -> None:
    index = ContextIndex(1)
    index.extend([0, 1, 0, 2, 0, 1])
    for token in range(3, 3 + MAX_SUCCESSORS - 1):
        index.extend([0, token])
    known = index.successors[1][(0,)]
    assert 2 not in known
    assert list(known) == [1, *range(3, 3 + MAX_SUCCESSORS - 1)]


def test_counts_that_faded_to_nothing_are_no_probability() -> None:
    """After thousands of the same token what came once before it is 0 in floating point, or nearly: nothing divides by it."""
    d = NgramDrafter(min_prob=0.0, min_gain=0.0)
    row = Row(0, [5, 6, *[5] * 2200], 9000)
    d.begin([row])
    for _ in range(20):
        tree = propose(d, row)
        assert all(0 <= estimate <= 1 for estimate in tree.estimates)
        row.tokens += [5] * 25
        row.num_new = 25
        d.observe([row], [tree], [Verdict((0,), (5,))], [])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_step_looks_at_a_bounded_number_of_successors(text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of n nodes asks for the successors of each node once, at most those of ``max_order`` contexts."""
    seen: list[int] = []
    lookup = ContextIndex.lookup

    def counted(self: ContextIndex, context: Context):  # type: ignore[no-untyped-def]
        for order, known in lookup(self, context):
            seen.append(len(known))
            yield order, known

    monkeypatch.setattr(ContextIndex, "lookup", counted)
    d = NgramDrafter(min_prob=0.0, min_gain=0.0)
    row = Row(0, list(text), 9000)
    d.begin([row])
    tree = propose(d, row, depth=16, nodes=16)
    assert len(seen) <= 4 * len(tree)
    assert sum(seen) <= 4 * len(tree) * MAX_SUCCESSORS
