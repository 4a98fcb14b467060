"""Each kernel but attention against its torch twin, under several thread schedules; twins against specdec's own rules."""

from __future__ import annotations

import math
import random

import pytest
import torch
from kernel_cases import ancestors, each_schedule, kernel_cache, noise_keys, random_parents, simulated  # noqa: F401
from simulator import schedule
from torch import Tensor

from specdec.distributions import NodeDistributions
from specdec.interfaces import Row
from specdec.kernels import pick
from specdec.kernels.commit import KVBuffers, commit_kv, commit_kv_torch
from specdec.kernels.pick import Filters, Grammar, PickedRows, pick_rows, pick_rows_torch
from specdec.kernels.reject import Drafts, DraftTree, reject_tree, reject_tree_torch
from specdec.kernels.rng import RngKeys
from specdec.kernels.walk import Walked, walk_tree, walk_tree_torch
from specdec.rng import PhiloxRng
from specdec.sampling import SamplingParams, sampling_probs
from specdec.tree import Draw, TokenTree
from specdec.verifiers.rejection import RejectionVerifier

pytestmark = pytest.mark.usefixtures("simulated")
FILTERS = [
    Filters(),
    Filters(1.0),
    Filters(0.7, top_k=40),
    Filters(0.9, top_p=0.9),
    Filters(1.3, top_k=100, top_p=0.8, min_p=0.02),
    Filters(1.0, min_p=0.05),
]


def some_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


# ----- pick_rows -----


@pytest.mark.parametrize("vocab", [5, 4097])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@each_schedule
def test_picked_tokens_and_sums_are_the_twins(vocab: int, filters: Filters, seed: int) -> None:
    """A vocabulary of 4097 has a last part of one token; bfloat16 rows are full of ties at the filters' borders."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, rng = some_logits(3, vocab, dtype), noise_keys(3)
        with schedule(seed):
            got = pick_rows(logits, filters, rng)
        assert_picked(got, pick_rows_torch(logits, filters, rng), logits)


def assert_picked(got: PickedRows, expected: PickedRows, logits: Tensor) -> None:
    assert got.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(got.lse, expected.lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.largest, expected.largest, rtol=0, atol=1e-5)
    raw = logits.double()
    assert torch.equal(pick.is_kept(raw, got.bounds, got.lasts), pick.is_kept(raw, expected.bounds, expected.lasts))


@each_schedule
def test_a_grammar_leaves_only_allowed_tokens(seed: int) -> None:
    """The second row has no grammar; the third allows nothing, which token -1 and lse -inf say."""
    logits = some_logits(3, 100, torch.float32)
    words = torch.zeros(2, 4, dtype=torch.int32)
    words[0, 0], words[0, 3] = -(2**31) + 5, 1  # tokens 0, 2, 31 and 96
    grammar = Grammar(words, torch.tensor([0, -1, 1], dtype=torch.int32))
    for filters in FILTERS:
        with schedule(seed):
            got = pick_rows(logits, filters, noise_keys(3), grammar)
        expected = pick_rows_torch(logits, filters, noise_keys(3), grammar)
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.tokens[0] in (0, 2, 31, 96)
        assert got.tokens[2] == -1
        assert got.lse[2] == -math.inf


def test_of_equal_logits_the_lowest_token_id_is_kept_and_picked() -> None:
    logits = torch.zeros(1, 5000)
    assert pick_rows(logits).tokens.item() == 0
    for p, last in ((0.5, 2499), (0.00019, 0), (0.00021, 1)):
        got = pick_rows(logits, Filters(1.0, top_p=p), noise_keys(1))
        assert got.lasts is not None
        assert got.lasts.item() == last


def test_nan_and_minus_zero() -> None:
    """NaN must show in the sum, and -0 tie with 0."""
    logits = torch.zeros(2, 40)
    logits[0, 7], logits[1, 0] = math.nan, -0.0
    got = pick_rows(logits, Filters(1.0, top_k=3), noise_keys(2))
    assert math.isnan(got.lse[0])
    assert pick_rows(logits[1:]).tokens.item() == 0
    assert math.isclose(got.lse[1].item(), math.log(40), abs_tol=1e-5)  # all tie with the third


@pytest.mark.parametrize("filters", FILTERS[1:], ids=str)
def test_the_twin_picks_what_specdec_draws(filters: Filters) -> None:
    """One stream everywhere: the same words, and so the same tokens as the verifier's draws."""
    logits, seed = some_logits(8, 300, torch.float32), 0x9ABCDEF012345678
    keys = noise_keys(8, seed)
    params = SamplingParams(filters.temperature, filters.top_k, filters.top_p, filters.min_p)
    expected = [
        PhiloxRng(seed).at(int(row), int(position)).draw(sampling_probs(each, params), 0)
        for each, row, position in zip(logits, keys.rows, keys.positions, strict=True)
    ]
    assert pick_rows_torch(logits, filters, keys).tokens.tolist() == expected
    assert pick_rows(logits, filters, keys).tokens.tolist() == expected


def test_wrong_arguments_of_pick_rows_are_named() -> None:
    logits = torch.zeros(2, 40)
    with pytest.raises(ValueError, match="needs noise"):
        pick_rows(logits, Filters(1.0))
    with pytest.raises(ValueError, match=r"noise.rows must have shape \(2,\), got \(3,\)"):
        pick_rows(logits, Filters(1.0), noise_keys(3))
    with pytest.raises(ValueError, match="logits must have dtype"):
        pick_rows(logits.double())
    with pytest.raises(ValueError, match="contiguous"):
        pick_rows(torch.zeros(40, 2).T)
    with pytest.raises(ValueError, match="top_p"):
        Filters(1.0, top_p=0.0)


# ----- walk_tree and reject_tree -----


def some_trees(rows: int, nodes: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and parents; siblings hold different tokens."""
    chance = random.Random(seed)
    all_tokens, all_parents = [], []
    for row in range(rows):
        parents = random_parents(nodes, seed * 10 + row)
        tokens = [chance.randrange(vocab)]
        for i in range(1, nodes):
            taken = {tokens[j] for j in range(1, i) if parents[j] == parents[i]}
            tokens.append(chance.choice([t for t in range(vocab) if t not in taken]))
        all_tokens.append(tokens)
        all_parents.append(parents)
    return torch.tensor(all_tokens), torch.tensor(all_parents, dtype=torch.int32)


@pytest.mark.parametrize("nodes", [1, 5, 33, 256])
@each_schedule
def test_the_walk_is_the_twins(nodes: int, seed: int) -> None:
    tokens, parents = some_trees(6, nodes, 6 + nodes // 8, 1)
    picked = tokens.clone()  # along a random path the picks are a child's token
    generator = torch.Generator().manual_seed(3)
    for row in range(6):
        for i in torch.randperm(nodes, generator=generator).tolist():
            if parents[row, i] >= 0:
                picked[row, parents[row, i]] = tokens[row, i]
    picked[0] = -1
    for limit in (nodes, 3):
        with schedule(seed):
            assert_walked(walk_tree(tokens, parents, picked, limit), walk_tree_torch(tokens, parents, picked, limit))


def assert_walked(got: Walked, expected: Walked) -> None:
    assert got.counts.tolist() == expected.counts.tolist()
    assert got.path.tolist() == expected.path.tolist()
    assert got.tokens.tolist() == expected.tokens.tolist()


def test_padding_nodes_are_never_reached() -> None:
    tokens = torch.tensor([[3, 4, 4, 5]])
    parents = torch.tensor([[-1, -1, 0, -1]], dtype=torch.int32)
    walked = walk_tree(tokens, parents, torch.tensor([[4, 5, 5, 5]]))
    assert walked.path.tolist() == [[0, 2, -1, -1]]
    assert walked.tokens.tolist() == [[4, 5, -1, -1]]


def drawn_tree(tokens: Tensor, parents: Tensor, logits: Tensor) -> DraftTree:
    """Children of each node: certain, drawn independently or without replacement, by turns, from blurred logits."""
    nodes = tokens.shape[1]
    rng = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    probs = (logits.float() * 0.8 + rng).softmax(-1)
    sources = torch.where((parents % 3 == 2) | (parents < 0), -1, parents)
    without = (parents.new_tensor(range(nodes)) % 3 == 1).int().repeat(len(tokens), 1)
    return DraftTree(tokens, parents, Drafts(sources, probs, without))


def judged(
    logits: Tensor, tree: DraftTree, filters: Filters, rng: RngKeys, grammar: Grammar | None = None
) -> PickedRows:
    """What pick_rows gives for all nodes, by the twin."""
    _, nodes, vocab = logits.shape
    depths = torch.stack([ancestors(parents.tolist()).sum(1) - 1 for parents in tree.parents])
    positions = (rng.positions[:, None] + depths).reshape(-1)
    keys = RngKeys(rng.seed, rng.rows.repeat_interleave(nodes), positions)
    return pick_rows_torch(logits.reshape(-1, vocab), filters, keys, grammar)


@pytest.mark.parametrize("is_drawn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_schedule
def test_rejection_is_the_twins(is_drawn: bool, dtype: torch.dtype, seed: int) -> None:
    """40 nodes, up to six siblings; the vocabulary needs two rounds of the inversion."""
    rows, nodes, vocab = 6, 40, 1111
    tokens, parents = some_trees(rows, nodes, 9, 5)
    logits = some_logits(rows * nodes, vocab, dtype, 7).view(rows, nodes, vocab)
    likely_children(logits, tokens, parents)
    tree = drawn_tree(tokens, parents, logits) if is_drawn else DraftTree(tokens, parents)
    for filters in (Filters(1.0), Filters(0.8, top_k=30, top_p=0.9)):
        rng = noise_keys(rows)
        picked = judged(logits, tree, filters, rng)
        with schedule(seed):
            got = reject_tree(logits, picked, tree, rng, filters.temperature, max_path=8)
        expected = reject_tree_torch(logits, picked, tree, rng, filters.temperature, None, 8)
        assert_walked(got, expected)
        assert expected.counts.max() > 2


@pytest.mark.parametrize("is_drawn", [False, True])
def test_rejection_is_the_verifiers(is_drawn: bool) -> None:
    """The same coins, residuals and draws as specdec.verifiers.rejection, token for token."""
    rows, nodes, vocab, seed = 12, 24, 9, 0x9ABCDEF012345678
    tokens, parents = some_trees(rows, nodes, vocab, 8)
    logits, rng = some_logits(rows * nodes, vocab, torch.float32, 10).view(rows, nodes, vocab), noise_keys(rows)
    tree = drawn_tree(tokens, parents, logits) if is_drawn else DraftTree(tokens, parents)
    got = reject_tree(logits, judged(logits, tree, Filters(1.0), rng), tree, rng, 1.0)
    for row in range(rows):
        shape = token_tree(tree, row)
        target = NodeDistributions(SamplingParams(), Row(row, [0], 99), shape, logits[row].double(), None)
        verdict = RejectionVerifier().verify(
            shape, target, PhiloxRng(seed).at(int(rng.rows[row]), int(rng.positions[row]))
        )
        count = int(got.counts[row])
        assert got.path[row, :count].tolist() == list(verdict.nodes)
        assert got.tokens[row, :count].tolist() == list(verdict.tokens)


def likely_children(logits: Tensor, tokens: Tensor, parents: Tensor) -> None:
    for row, (own, above) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        for token, parent in zip(own[1:], above[1:], strict=True):
            logits[row, parent, token] += 9


def token_tree(tree: DraftTree, row: int) -> TokenTree:
    tokens, parents = tuple(tree.tokens[row].tolist()), tuple(tree.parents[row].tolist())
    if tree.drafts is None:
        return TokenTree(tokens, parents)
    kinds = (Draw.INDEPENDENT, Draw.WITHOUT_REPLACEMENT)
    draws = tuple(kinds[kind] for kind in tree.drafts.without_replacement[row].tolist())
    probs = tree.drafts.probs[row].double()
    return TokenTree(tokens, parents, tuple(tree.drafts.sources[row].tolist()), probs, draws)


def test_rejection_respects_a_grammar() -> None:
    logits = some_logits(12, 40, torch.float32).view(2, 6, 40)
    tokens, parents = some_trees(2, 6, 40, 11)
    grammar = Grammar(torch.tensor([[0b1010, 0]], dtype=torch.int32), torch.zeros(12, dtype=torch.int32))
    tree, rng = DraftTree(tokens, parents), noise_keys(2)
    picked = judged(logits, tree, Filters(1.0), rng, grammar)
    got = reject_tree(logits, picked, tree, rng, 1.0, grammar)
    assert set(got.tokens[got.tokens >= 0].tolist()) <= {1, 3}
    assert_walked(got, reject_tree_torch(logits, picked, tree, rng, 1.0, grammar, 6))


def test_rejection_needs_a_temperature() -> None:
    tokens, parents = some_trees(1, 2, 5, 1)
    tree, rng, logits = DraftTree(tokens, parents), noise_keys(1), torch.zeros(1, 2, 5)
    picked = judged(logits, tree, Filters(1.0), rng)
    with pytest.raises(ValueError, match="walk_tree for greedy"):
        reject_tree(logits, picked, tree, rng, 0.0)


# ----- commit_kv -----


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 64), (torch.bfloat16, 80), (torch.float32, 4)])
@each_schedule
def test_committed_slots_are_the_twins(is_paged: bool, dtype: torch.dtype, size: int, seed: int) -> None:
    """Paths longer than the eight nodes that are held at once, empty ones, and pages in any order."""
    path = torch.full((3, 12), -1, dtype=torch.int32)
    for row, nodes in enumerate(([0, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 20], [0, 1, 2], [0])):
        path[row, : len(nodes)] = torch.tensor(nodes)
    counts = (path >= 0).sum(1).int()
    starts = torch.tensor([10, 3, 0], dtype=torch.int32)
    shape, pages = ((3, 2, 40, size), torch.arange(3)[:, None]) if not is_paged else ((20, 2, 8, size), None)
    table = (torch.randperm(20)[:15].view(3, 5) if pages is None else pages).int()
    tensors = [torch.randn(shape).to(dtype) for _ in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    with schedule(seed):
        commit_kv(KVBuffers.of(tensors), starts, path, counts, table)
    commit_kv_torch(KVBuffers.of(copies), starts, path, counts, table)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_the_commit_twin_moves_what_is_accepted() -> None:
    keys = torch.arange(12.0).view(1, 1, 12, 1).repeat(1, 1, 1, 4)
    path = torch.tensor([[0, 2, 5, -1]], dtype=torch.int32)
    one = torch.tensor([3], dtype=torch.int32)
    commit_kv_torch(KVBuffers.of([keys]), torch.tensor([4], dtype=torch.int32), path, one, one[:, None] * 0)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 6, 9, 7, 8, 9, 10, 11]


def test_buffers_of_different_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="of one shape"):
        KVBuffers.of([torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 32)])
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        KVBuffers.of([torch.zeros(1, 2, 8, 5)])
