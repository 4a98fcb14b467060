"""Losslessness of the kernels themselves: what they emit over many rows follows the target, by a G-test.

A right kernel fails one of these with odds of one in a million for each new seed; the seeds are fixed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chance import g_test
from kernel_cases import kernel_cache, simulated  # noqa: F401
from torch import Tensor

from specdec.kernels import source
from specdec.kernels.pick import Filters, PickedRows, pick_rows, pick_rows_torch
from specdec.kernels.reject import Drafts, DraftTree, reject_tree
from specdec.kernels.rng import RngKeys
from specdec.kernels.walk import Walked, walk_tree

pytestmark = pytest.mark.usefixtures("simulated")
ODDS = 1e-6
ROWS, VOCAB = 2000, 5
PARENTS = (-1, 0, 0, 0, 1, 1)
Pick = Callable[[Tensor, Filters, RngKeys], PickedRows]
KINDS = ("certain", "independent", "without_replacement")


def target_logits() -> Tensor:
    """(VOCAB + 1, VOCAB): what follows each token; the last row follows the root."""
    return torch.randn(VOCAB + 1, VOCAB, generator=torch.Generator().manual_seed(3)) * 1.3


def drafted(kind: str) -> tuple[DraftTree, Tensor]:
    """A tree for each row, its children picked or drawn as ``kind`` says, and logits (ROWS, 6, VOCAB)."""
    generator = torch.Generator().manual_seed(4)
    draft = torch.randn(VOCAB + 1, VOCAB, generator=generator).softmax(-1)
    tokens = torch.full((ROWS, len(PARENTS)), VOCAB)  # only to index the tables; the root's own token plays no part
    for parent, children in ((0, (1, 2, 3)), (1, (4, 5))):
        probs = draft[tokens[:, parent]]
        if kind == "certain":
            drawn = probs.topk(len(children)).indices
        else:
            drawn = torch.multinomial(probs, len(children), kind == "independent", generator=generator)
        tokens[:, list(children)] = drawn
    parents = torch.tensor([PARENTS] * ROWS, dtype=torch.int32)
    probs = draft[tokens[:, :2]].contiguous()  # row 0 is what the root's children were drawn from, row 1 node 1's
    sources = torch.full_like(parents, -1) if kind == "certain" else parents
    without = torch.full((ROWS, 2), int(kind == "without_replacement"), dtype=torch.int32)
    return DraftTree(tokens, parents, Drafts(sources, probs, without)), target_logits()[tokens].contiguous()


def picks(logits: Tensor, keys: RngKeys, temperature: float, pick: Pick = pick_rows_torch) -> PickedRows:
    depths = torch.tensor([0, 1, 1, 1, 2, 2])
    _, nodes, vocab = logits.shape
    positions = (keys.positions[:, None] + depths).reshape(-1)
    each = RngKeys(keys.seed, keys.rows.repeat_interleave(nodes), positions)
    return pick(logits.reshape(-1, vocab), Filters(temperature), each)


def fits(walked: Walked, temperature: float) -> tuple[float, float]:
    """How well the first tokens fit, and the pairs of rows that emitted two."""
    probs = (target_logits() / temperature).softmax(-1).double()
    first = walked.tokens[:, 0].tolist()
    expected = {token: float(probs[VOCAB, token]) for token in range(VOCAB)}
    pairs = [tuple(pair) for pair in walked.tokens[walked.counts >= 2, :2].tolist()]
    share = {a: sum(pair[0] == a for pair in pairs) / len(pairs) for a in range(VOCAB)}
    # Given an accepted first token the second follows the target, whatever was accepted how often.
    joint = {(a, b): share[a] * float(probs[a, b]) for a in range(VOCAB) for b in range(VOCAB)}
    return g_test(first, expected), g_test(pairs, joint)


def keys() -> RngKeys:
    return RngKeys(torch.tensor([77]), torch.arange(ROWS), torch.full((ROWS,), 12))


@pytest.mark.parametrize("kind", KINDS)
def test_rejection_emits_the_targets_law(kind: str) -> None:
    tree, logits = drafted(kind)
    walked = reject_tree(logits, picks(logits, keys(), 0.8), tree, keys(), 0.8)
    assert int((walked.counts >= 2).sum()) > ROWS // 4
    assert min(fits(walked, 0.8)) > ODDS


def test_matches_emit_the_targets_law() -> None:
    tree, logits = drafted("independent")
    few = 500  # a block for each node is slow to simulate
    all_keys = keys()
    some = RngKeys(all_keys.seed, all_keys.rows[:few], all_keys.positions[:few])
    picked = picks(logits[:few], some, 0.8, pick_rows).tokens
    walked = walk_tree(tree.tokens[:few], tree.parents[:few], picked.view(few, -1))
    assert int((walked.counts >= 2).sum()) > few // 4
    assert min(fits(walked, 0.8)) > ODDS


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("without_replacement", "if (replaced[source])", "if (false)"),
        ("independent", "if (uniform < ", "if (0.7 * uniform < "),
        ("certain", "rejected++) {", "rejected += 0) {"),
    ],
)
def test_a_wrong_rejection_does_not(
    kind: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(source.CUDA, folder)
    text = (folder / "reject.cu").read_text()
    assert old in text
    (folder / "reject.cu").write_text(text.replace(old, new, 1))
    tree, logits = drafted(kind)
    picked = picks(logits, keys(), 0.8)
    monkeypatch.setattr(source, "CUDA", folder)
    assert min(fits(reject_tree(logits, picked, tree, keys(), 0.8), 0.8)) < ODDS
