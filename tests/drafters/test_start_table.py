"""The start table of Token Recycling: averages by the book, kept whole on disk, and drafts that stay exact."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onerow import VOCAB, batch, make_model, propose
from safetensors.torch import load_file, save_file

import specdec
from specdec.drafters import make_drafter
from specdec.drafters.lookup.start_table import Order, StartTable
from specdec.drafters.lookup.successors import classes_of, hashed, keys_of
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.training.start_table import gather, judge
from specdec.engine.causal_lm import CausalLM
from specdec.errors import CheckpointError
from specdec.interfaces import DraftContext, Row
from specdec.verifiers import make_verifier

IDS = 12


class Shards:
    """Stands for a store: shards of texts with made-up distributions of 5 tokens behind each place."""

    def __init__(self, num_shards: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.texts: list[list[np.ndarray]] = [
            [rng.choice(IDS, rng.integers(1, 30), p=np.arange(1, IDS + 1) / 78) for _ in range(6)]
            for _ in range(num_shards)
        ]
        self.tops: list[tuple[torch.Tensor, torch.Tensor]] = []
        for texts in self.texts:
            logits = torch.from_numpy(rng.normal(size=(sum(map(len, texts)), IDS)) * 2).float()
            best = logits.log_softmax(-1).topk(5)
            self.tops.append((best.indices, best.values))

    def predictions(self, number: int, count: int) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, logprobs = self.tops[number]
        tokens = torch.from_numpy(np.concatenate(self.texts[number]))
        return [len(text) for text in self.texts[number]], tokens, ids[:, :count], logprobs[:, :count]


def by_the_book(store: Shards, shards: range) -> dict[tuple[int, ...], dict[int, float]]:
    """Every context's smoothed distribution, by its definition, over all that it and its shorter forms know."""
    places: dict[tuple[int, ...], list[dict[int, float]]] = defaultdict(list)
    for shard in shards:
        ids, logprobs = store.tops[shard]
        start = 0
        for text in store.texts[shard]:
            for i in range(len(text)):
                seen = dict(zip(ids[start + i].tolist(), logprobs[start + i].exp().tolist(), strict=True))
                for order in range(1, min(3, i + 1) + 1):
                    places[tuple(text[i + 1 - order : i + 1].tolist())].append(seen)
            start += len(text)
    smoothed: dict[tuple[int, ...], dict[int, float]] = {}
    for context in sorted(places, key=len):
        total: dict[int, float] = defaultdict(float)
        for seen in places[context]:
            for token, prob in seen.items():
                total[token] += prob
        for token, prob in smoothed.get(context[1:], {}).items():
            total[token] += prob
        smoothed[context] = {token: value / (len(places[context]) + 1) for token, value in total.items()}
    return smoothed


def test_averages_are_those_of_the_definition() -> None:
    store: Any = Shards(5, 0)
    expected = by_the_book(store, range(4))
    table = gather(store, range(4), IDS, 10_000, {})
    assert table.num_contexts == len(expected)
    for order in table.orders:
        for context, tokens, probs in zip(order.contexts, order.successors, order.probs, strict=True):
            known = expected[tuple(context.tolist())]
            found = {int(t): float(p) for t, p in zip(tokens, probs, strict=True) if t >= 0}
            best = sorted(known.values(), reverse=True)[:8]
            assert sorted(found.values(), reverse=True) == pytest.approx(best, rel=1e-5)
            assert all(value == pytest.approx(known[token], rel=1e-5) for token, value in found.items())
            assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_most_frequent_contexts_are_kept_and_each_rests_on_a_shorter_one() -> None:
    store: Any = Shards(4, 1)
    whole, some = (gather(store, range(4), IDS, size, {}) for size in (10_000, 60))
    assert some.num_contexts == 60 < whole.num_contexts
    kept = [set(map(tuple, order.contexts.tolist())) for order in some.orders]
    assert len(kept[0]) == IDS
    assert all(context[1:] in shorter for shorter, longer in pairwise(kept) for context in longer)


def test_the_judge_counts_what_the_longest_known_context_says() -> None:
    store: Any = Shards(3, 2)
    table = gather(store, range(2), IDS, 40, {})
    hits = {1: 0, 4: 0, 8: 0}
    total = start = 0
    for text in store.texts[2]:
        for i in range(2, len(text)):
            _, known, _ = table.find(keys_of(tuple(text[i - 2 : i + 1].tolist())))
            best = int(store.tops[2][0][start + i, 0])
            total += 1
            for limit in hits:
                hits[limit] += best in known[:limit]
        start += len(text)
    assert judge(table, store, range(2, 3)) == {f"top{k}": [round(n / total, 4)] for k, n in hits.items()}


@pytest.mark.parametrize("options", [{"num_contexts": 0}, {"vocab_size": 1 << 21}])
def test_what_cannot_be_gathered_is_refused(options: dict[str, int]) -> None:
    store: Any = Shards(1, 0)
    with pytest.raises(ValueError, match="start table"):
        gather(store, range(1), **({"vocab_size": IDS, "num_contexts": 5, "facts": {}} | options))


def table(vocab_size: int = VOCAB, width: int = 2) -> StartTable:
    """After 5 come 9 and, less often, 7; after 5 9 comes 12."""
    one = Order(
        np.array([[5], [9]]), np.array([[9, 7], [30, -1]], np.int32), np.array([[0.8, 0.1], [0.6, 0.0]], np.float32)
    )
    two = Order(np.array([[5, 9]]), np.array([[12, -1]], np.int32), np.array([[0.85, 0.0]], np.float32))
    return StartTable(vocab_size, [one, two], {"hidden_size": 3})


def test_the_hash_is_the_same_for_one_context_and_for_many() -> None:
    contexts = np.random.default_rng(0).integers(-1, 10**6, (50, 3))
    assert hashed(contexts).tolist() == [keys_of(tuple(context.tolist()))[-1] for context in contexts]


@pytest.mark.parametrize("vocab_size", [VOCAB, 2**16 - 1, 2**16, 150_000])
def test_a_table_on_disk_is_the_one_that_was_saved(tmp_path: Path, vocab_size: int) -> None:
    saved = table(vocab_size)
    saved.save(tmp_path / "t", {"more": 1})
    found = StartTable.load(tmp_path / "t", vocab_size)
    assert found.facts == {"hidden_size": 3}
    for a, b in zip(saved.orders, found.orders, strict=True):
        assert np.array_equal(a.contexts, b.contexts)
        assert np.array_equal(a.successors, b.successors)
        assert np.allclose(a.probs, b.probs, atol=0.004)
        assert np.array_equal(classes_of(a.probs), classes_of(b.probs))
    assert found.find(keys_of((3, 5, 9))) == (2, [12], [2])
    assert found.find(keys_of((3, 4, 9))) == (1, [30], [3])
    assert found.find(keys_of((3, 4, 10))) == (0, [], [])


def _config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "successors.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another drafter's": (lambda f: _config(f, drafter="eagle"), "no start table"),
    "no sizes": (lambda f: _config(f, num_contexts=None), "no start table"),
    "sizes that are none": (lambda f: _config(f, num_contexts=[2, "1"]), "no start table"),
    "a later format": (lambda f: _config(f, format=99), "format 99"),
    "another vocabulary": (lambda f: _config(f, vocab_size=7), "made for 7 token ids"),
    "fewer rows": (lambda f: _tensor(f, "roots.1", lambda t: t[:1].clone()), "must have shape"),
    "ids outside": (lambda f: _tensor(f, "successors.1", lambda t: torch.full_like(t, VOCAB + 1)), "damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "is missing"),
    "a cut file": (lambda f: (f / "successors.safetensors").write_bytes(b"x"), "damaged"),
    "no file": (lambda f: (f / "successors.safetensors").unlink(), "holds none of"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_table_is_refused(tmp_path: Path, what: str) -> None:
    table().save(tmp_path)
    damage, says = DAMAGE[what]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        StartTable.load(tmp_path, VOCAB)


def test_what_was_gathered_ahead_is_drafted_before_anything_was_seen() -> None:
    d = RecyclingDrafter(VOCAB, start=table(), min_gain=0.0)
    row = Row(0, [3, 5], 50)
    d.begin([row])
    tree = propose(d, row, depth=3, nodes=8)
    assert {tuple(tree.path_tokens(node)) for node in range(1, len(tree))} == {(9,), (7,), (9, 12)}


def test_of_a_token_that_both_tables_know_the_higher_rate_counts() -> None:
    d = RecyclingDrafter(VOCAB, start=table(), min_gain=0.0)
    row = Row(0, [5, 7, 3, 5], 50)  # 7 came after 5 here
    d.begin([row])
    tree = propose(d, row, depth=1, nodes=8)
    seen = dict(zip(tree.tokens, tree.estimates, strict=True))
    order, _, (kind,) = d.table.find(keys_of((3, 5)))
    start_order, _, kinds = d.start.find(keys_of((3, 5))) if d.start else (0, [], [])
    assert seen[7] == max(d.rates.values()[order][kind], d.start_rates.values()[start_order][kinds[1]])
    assert seen[9] == d.start_rates.values()[start_order][kinds[0]]


def test_rates_of_the_two_tables_are_learned_apart() -> None:
    d = RecyclingDrafter(VOCAB, start=table(), min_gain=0.0)
    before = d.start_rates.values(), d.rates.values()
    d.start_rates.learn((1, [9, 7], [2, 6]), 9)
    assert d.start_rates.values()[1][2] > before[0][1][2]
    assert d.start_rates.values()[1][6] < before[0][1][6]
    assert d.rates.values() == before[1]


@pytest.mark.parametrize("order", [1, 3])
def test_text_stays_that_of_generate(tmp_path: Path, order: int) -> None:
    """Whatever the table holds, and whether its contexts are longer or shorter than those that are seen."""
    model = make_model()
    rng = np.random.default_rng(0)
    orders = [
        Order(
            rng.integers(0, VOCAB, (300, o)),
            rng.integers(-1, VOCAB, (300, 4)).astype(np.int32),
            rng.random((300, 4), np.float32),
        )
        for o in (1, 2)
    ]
    StartTable(VOCAB, orders).save(tmp_path)
    inputs = batch([5, 9, 12, 7], [30])
    expected = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    spec = f"recycling:start={tmp_path},max_order={order},min_gain=0.0"
    found = specdec.generate(model, **inputs, max_new_tokens=32, do_sample=False, drafter=spec, adaptive=False)
    assert torch.equal(found, expected)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    context = DraftContext(CausalLM(make_model()), make_verifier("match"))
    with pytest.raises(CheckpointError, match="nowhere"):
        make_drafter(f"recycling:start={tmp_path / 'nowhere'}", context)
