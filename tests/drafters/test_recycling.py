"""Token Recycling: exact, within its limits, bounded, and the same after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onerow import VOCAB, batch, make_model, propose
from torch import Tensor
from transformers import LlamaForCausalLM

import specdec
from specdec.drafters import make_drafter
from specdec.drafters.lookup.successors import SuccessorTable
from specdec.drafters.lookup.top_tokens import top_tokens
from specdec.drafters.recycling import RecyclingDrafter
from specdec.interfaces import DraftContext, Row, Scores, Step, Verdict
from specdec.tree import TokenTree


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


def drafter(**options: Any) -> RecyclingDrafter:
    return RecyclingDrafter(VOCAB, **options)


def emit(d: RecyclingDrafter, row: Row, tree: TokenTree, nodes: Sequence[int], bonus: int, logits: Tensor) -> None:
    """One step's outcome: ``nodes`` accepted, then ``bonus``."""
    tokens = (*(tree.tokens[node] for node in nodes[1:]), bonus)
    row.tokens += tokens
    row.num_new = len(tokens)
    d.observe([row], [tree], [Verdict(tuple(nodes), tokens)], [Scores(logits)])


def known(d: RecyclingDrafter, context: tuple[int, ...]) -> tuple[int, list[int]]:
    return d.table.lookup(context)[:2]


def ranked(*best: Sequence[int]) -> Tensor:
    """Logits (n, V) whose best tokens are ``best[node]``, in that order."""
    logits = torch.zeros(len(best), VOCAB)
    for node, tokens in enumerate(best):
        logits[node, list(tokens)] = torch.arange(len(tokens), 0, -1).float()
    return logits


# ----- exactness -----


@pytest.mark.parametrize("rows", [[[5, 9, 12, 7]], [[5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30]]], ids=["1", "3"])
def test_greedy_text_is_that_of_generate(model: LlamaForCausalLM, rows: list[list[int]]) -> None:
    inputs = batch(*rows)
    expected = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    steps: list[Step] = []
    d = drafter(min_prob=0.001, min_gain=0.0)
    for _ in range(2):  # the second time it knows everything
        found = specdec.generate(
            model, **inputs, max_new_tokens=48, do_sample=False, drafter=d, adaptive=False, on_step=steps.append
        )
        assert torch.equal(found, expected)
    assert sum(step.num_accepted for step in steps) > len(steps) / 2
    assert max(step.num_drafted for step in steps) > 8
    assert not d._rows


@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_sampled_text_of_a_seed_does_not_depend_on_what_is_remembered(model: LlamaForCausalLM, verifier: str) -> None:
    """With `match` the text is that of plain decoding; every verifier takes certain trees."""
    inputs = batch([5, 9, 12, 7], [30])
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": True,
        "seed": 3,
        "verifier": verifier,
        "adaptive": False,
    }
    found = specdec.generate(model, **inputs, drafter="recycling", **options)
    if verifier == "match":
        assert torch.equal(found, specdec.generate(model, **inputs, drafter="none", **options))


# ----- trees -----


def test_runners_up_of_accepted_and_of_rejected_nodes_are_remembered() -> None:
    d = drafter(max_order=1, min_prob=0.0, min_gain=0.0, num_successors=2)
    row = Row(0, [3], 50)
    d.begin([row])
    tree = TokenTree((3, 4, 5), (-1, 0, 0))
    emit(d, row, tree, [0, 1], 6, ranked([4, 5], [6, 7], [8, 9]))
    assert known(d, (3,)) == (1, [4, 5])
    assert known(d, (4,)) == (1, [6, 7])
    assert known(d, (5,)) == (1, [8, 9])  # rejected
    assert known(d, (6,)) == (0, [])


def test_the_accepted_of_two_equal_contexts_counts() -> None:
    """A rejected branch often repeats a token of the path, after another one that is wrong."""
    d = drafter(max_order=1, num_successors=2)
    row = Row(0, [3], 50)
    d.begin([row])
    tree = TokenTree((3, 4, 5, 4), (-1, 0, 0, 2))
    emit(d, row, tree, [0, 1], 6, ranked([4, 5], [6, 7], [8, 9], [10, 11]))
    assert known(d, (4,)) == (1, [6, 7])


def test_longer_contexts_are_preferred() -> None:
    d = drafter(max_order=2, min_prob=0.0, min_gain=0.0)
    row = Row(0, [1, 2, 3, 4, 2, 5, 9, 2], 50)
    d.begin([row])
    assert known(d, (1, 2)) == (2, [3])
    assert known(d, (4, 2)) == (2, [5])
    assert known(d, (9, 2)) == (1, [5, 3])  # the latest first
    assert propose(d, row).tokens[:3] == (2, 5, 9)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("nodes", [0, 1, 5, 30])
@pytest.mark.parametrize("chain_only", [False, True])
def test_trees_keep_within_the_limit(depth: int, nodes: int, chain_only: bool) -> None:
    d = drafter(min_prob=0.0, min_gain=0.0)
    row = Row(0, [7, *range(10), 7, *range(20), 7], 500)
    d.begin([row])
    tree = propose(d, row, depth, nodes, chain_only)
    assert len(tree) - 1 <= nodes
    assert max(tree.depths()) <= depth
    assert tree.is_certain
    assert not chain_only or tree.is_chain
    assert len(tree) > 1 or not depth or not nodes
    assert len(tree.estimates) == len(tree)
    assert all(tree.estimates[i] <= tree.estimates[p] for i, p in enumerate(tree.parents) if p >= 0)


def test_nothing_is_proposed_where_little_is_to_be_gained() -> None:
    d = drafter(min_gain=9.0)
    row = Row(0, [1, 2, 3, 1, 2, 3, 1], 50)
    d.begin([row])
    assert len(propose(d, row)) == 1


def test_rates_follow_what_comes() -> None:
    """Successors that the target held for equally likely share a rate, which is that of what came."""
    d = drafter(max_order=1, num_successors=2)
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, [40, 41]] = torch.tensor([0.62, 0.38]).log()
    row = Row(0, [1, 2, 40], 500)
    d.begin([row])
    emit(d, row, TokenTree.root(40), [0], 40, logits)
    _, tokens, (likely, unlikely) = d.table.lookup((40,))
    assert tokens == [40, 41]
    assert likely < unlikely < 8  # likelier classes come first
    before = d.rates.values()[1]
    for _ in range(40):
        emit(d, row, TokenTree.root(40), [0], 40, logits)
    after = d.rates.values()[1]
    assert after[likely] > 0.85 > before[likely]
    assert after[unlikely] < 0.1 < before[unlikely]
    assert [rate for i, rate in enumerate(after) if i not in (likely, unlikely)] == [
        rate for i, rate in enumerate(before) if i not in (likely, unlikely)
    ]


def test_what_the_target_was_sure_of_is_drafted_first() -> None:
    """Two branches: below a sure token a deep chain is worth more than a second guess."""
    d = drafter(max_order=1, num_successors=2)
    row = Row(0, [3], 50)
    d.begin([row])
    logits = torch.full((3, VOCAB), -20.0)
    logits[0, [4, 5]] = torch.tensor([0.75, 0.25]).log()
    logits[1, [6, 7]] = torch.tensor([0.995, 0.005]).log()  # after 4
    logits[2, [8, 9]] = torch.tensor([0.5, 0.5]).log()  # after 5
    emit(d, row, TokenTree((3, 4, 5), (-1, 0, 0)), [0], 3, logits)
    tree = propose(d, row, depth=2, nodes=3)
    assert tree.tokens == (3, 4, 6, 5)
    assert tree.parents == (-1, 0, 1, 0)


def test_followers_in_a_text_have_classes_of_their_own() -> None:
    d = drafter(max_order=1, num_successors=4)
    row = Row(0, [1, 2, 1, 3, 1, 4, 1, 5, 1], 50)
    d.begin([row])
    _, tokens, classes = d.table.lookup((1,))
    assert tokens == [5, 4, 3, 2]
    assert classes == [9, 10, 11, 11]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 30, 60])
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 1000])
def test_a_text_is_read_as_if_token_by_token(num_tokens: int, vocab_size: int) -> None:
    """The latest different followers come first, then what was known before; of another text, and of none."""
    rng = np.random.default_rng(num_tokens)
    table, known = SuccessorTable(3, 4, 2**18), dict[tuple[int, ...], tuple[list[int], list[int]]]()
    for _ in range(3):
        text = rng.integers(0, vocab_size, num_tokens).tolist()
        table.read_text(text)
        after: dict[tuple[int, ...], list[int]] = {}
        for order in (1, 2, 3):
            for i in range(order, len(text)):
                followers = after.setdefault(tuple(text[i - order : i]), [])
                followers[:] = [text[i], *(token for token in followers if token != text[i])]
        for context, followers in after.items():
            classes = [9, 10, *[11] * len(followers)][: len(followers)]
            for token, kind in zip(*known.get(context, ([], [])), strict=True):
                if token not in followers:
                    followers.append(token)
                    classes.append(kind)
            known[context] = followers[:4], classes[:4]
        for context, (followers, classes) in known.items():
            assert table.lookup(context) == (len(context), followers, classes)


def test_a_long_text_is_read_in_one_write_for_each_length_of_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look-up for each context, in Python, took a second for a prompt of 32,000 tokens."""
    writes: list[int] = []
    store = SuccessorTable._store
    monkeypatch.setattr(
        SuccessorTable, "_store", lambda self, order, *rest: writes.append(order) or store(self, order, *rest)
    )
    monkeypatch.setattr(SuccessorTable, "find", None)
    SuccessorTable(3, 8, 1024).read_text(list(range(5000)))
    assert writes == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [500, 8 * 4 * 256, 10_001, 49_152])
def test_the_top_tokens_are_those_of_a_sort(vocab_size: int, dtype: torch.dtype) -> None:
    """In the blocks of the vocabulary and in what is left over behind them; with ties and excluded tokens."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator).to(dtype)
    logits[0, -3:] = 9.0
    logits[1, :] = float("-inf")
    logits[1, [3, vocab_size - 1]] = torch.tensor([1.0, 2.0], dtype=dtype)
    logits[2, :] = 0.0
    logits[3, 300:310] = 7.0  # more than eight in one block
    found = top_tokens(logits, 8)
    assert torch.equal(logits.gather(1, found), logits.sort(-1, descending=True).values[:, :8])
    assert all(len(set(row)) == 8 for row in found.tolist())


def test_contexts_of_all_lengths_are_written_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.integers(-1, VOCAB, (40, 4))
    successors, classes = rng.integers(0, VOCAB, (40, 2)).astype(np.int32), rng.integers(0, 9, (40, 2)).astype(np.uint8)
    one, other = (SuccessorTable(3, 2, 64) for _ in range(2))
    one.write_parts(contexts, successors, classes)
    for order in (1, 2, 3):
        other.write(contexts[:, -order:], successors, classes)
    for name in ("keys", "successors", "classes"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_excluded_tokens_and_broken_logits_teach_nothing() -> None:
    d = drafter(max_order=1, num_successors=3)
    row = Row(0, [3], 50)
    d.begin([row])
    logits = torch.full((3, VOCAB), -torch.inf)
    logits[0, [4, 5]] = torch.tensor([1.0, 2.0])
    logits[2] = torch.nan
    emit(d, row, TokenTree((3, 4, 5), (-1, 0, 0)), [0], 5, logits)
    assert known(d, (3,)) == (1, [5, 4])
    assert known(d, (4,)) == known(d, (5,)) == (0, [])


# ----- state -----


def test_memory_does_not_grow() -> None:
    table = SuccessorTable(2, 3, 16)
    size = table.keys.nbytes + table.successors.nbytes + table.classes.nbytes
    rng = np.random.default_rng(0)
    for _ in range(20):
        contexts = rng.integers(0, 1000, (50, 2))
        table.write(contexts, rng.integers(0, 1000, (50, 3)).astype(np.int32), np.zeros((50, 3), np.uint8))
    assert table.keys.nbytes + table.successors.nbytes + table.classes.nbytes == size
    assert (table.keys[1] != 0).all()
    assert (table.keys[0] == 0).all()


def test_hashes_of_the_two_ways_agree() -> None:
    """Writing is vectorised and looking up is not: they must find the same slot, also where the text has just begun."""
    table = SuccessorTable(3, 1, 4096)
    rng = np.random.default_rng(0)
    contexts = np.concatenate([rng.integers(0, 200000, (100, 3)), [[-1, -1, 5], [-1, 5, 5]]])
    for i, context in enumerate(contexts):
        table.write(context[None], np.array([[i]], np.int32), np.array([[i % 9]], np.uint8))
        assert table.lookup(tuple(context.tolist())) == (3, [i], [i % 9])


def test_rows_leave_and_strangers_are_ignored() -> None:
    d = drafter()
    rows = [Row(0, [1, 2], 9), Row(1, [3, 4], 9)]
    d.begin(rows[:1])
    d.end(rows)
    assert not d._rows


def test_a_table_is_kept_on_disk(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    inputs = batch([5, 9, 12, 7])
    lengths = []
    for _ in range(2):
        steps: list[Step] = []
        specdec.generate(
            model,
            **inputs,
            max_new_tokens=32,
            do_sample=False,
            drafter=f"recycling:path={path}",
            adaptive=False,
            on_step=steps.append,
        )
        lengths.append(len(steps))
    assert lengths[1] < 0.75 * lengths[0]  # it has been here before
    assert [file.name for file in tmp_path.iterdir()] == ["table.npz"]
    first, second = drafter(path=path), drafter(path=path)
    first.save()
    assert np.array_equal(first.table.keys, second.table.keys)
    assert np.array_equal(first.table.successors, second.table.successors)
    assert np.array_equal(first.table.classes, second.table.classes)
    assert first.rates.values() == second.rates.values()


def test_a_file_is_saved_when_the_last_row_ends(tmp_path: Path) -> None:
    d = drafter(path=tmp_path / "t")
    rows = [Row(0, [1, 2], 9), Row(1, [3, 4], 9)]
    d.begin(rows)
    d.end(rows[:1])
    assert not (tmp_path / "t").exists()
    d.end(rows)
    assert (tmp_path / "t").exists()


@pytest.mark.parametrize("option", [{"num_successors": 4}, {"max_order": 1}, {"capacity": 99}], ids=str)
def test_a_table_of_other_options_is_refused(tmp_path: Path, option: dict[str, int]) -> None:
    drafter(path=tmp_path / "t").save()
    with pytest.raises(ValueError, match=r"num_successors=|max_order=|capacity="):
        drafter(path=tmp_path / "t", **option)


def test_a_table_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    drafter(path=tmp_path / "t").save()
    with pytest.raises(ValueError, match=r"vocab_size=61, and this one has .*vocab_size=62"):
        RecyclingDrafter(62, path=tmp_path / "t")


def whole(path: Path) -> bytes:
    d = drafter(path=path)
    d.table.read_text([1, 2, 3, 4])
    d.save()
    return path.read_bytes()


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    """A table with token ids that do not exist would crash the target."""
    path = tmp_path / "t"
    data = whole(path)
    for broken in (b"", b"hello", data[:-30], data[: len(data) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole table"):
            drafter(path=path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("successors", 61),
        ("successors", -2),
        ("slots", -1),
        ("slots", 10**7),
        ("classes", 12),
        ("rates", 0),
        ("rates", np.nan),
    ],
)
def test_a_forged_file_is_refused(tmp_path: Path, name: str, value: float) -> None:
    path = tmp_path / "t.npz"
    whole(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays[name] = np.full_like(arrays[name], value)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="not a whole table"):
        drafter(path=path)


@pytest.mark.parametrize("option", [{"max_order": 0}, {"capacity": 0}, {"num_successors": 0}, {"num_successors": 62}])
def test_values_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        drafter(**option)


def test_a_path_in_no_folder_and_saving_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder that exists"):
        drafter(path=tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="path="):
        drafter().save()


def test_unknown_options_are_named(model: LlamaForCausalLM) -> None:
    context = DraftContext(specdec.engine.causal_lm.CausalLM(model), specdec.verifiers.make_verifier("match"))
    with pytest.raises(ValueError, match="num_successors"):
        make_drafter("recycling:k=3", context)
