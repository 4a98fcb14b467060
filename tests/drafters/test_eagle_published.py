"""Published EAGLE-3 heads: each layout and each flag of its config drafts what its own network, written anew, does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_runs import EXACT, PROMPTS, VOCAB, run
from published import Head, Network, Tensors
from torch import Tensor
from trained import tiny_target

from specdec.drafters import make_drafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.heads.eagle_engine import EagleEngine
from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
from specdec.drafters.trees.expansion import Shape
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import DraftContext, Row, Scores
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier

SPECULATORS = Head("speculators", (1, 3, 7), (1, 3, 7), first="layers.0", own_embedding=True)
NESTED = Head("nested", (6, 0, 3), (1, 4, 7))  # in the order of a set, one before the entries, collected as layers run
HEADS: dict[str, Head] = {
    "plain": Head(),
    "layers.0, ids from the embeddings on": Head(ids=(1, 3, 6), entries=(1, 3, 6), first="layers.0"),
    "four features": Head(ids=(0, 1, 3, 6), entries=(0, 1, 3, 6)),
    "eagle_config": NESTED,
    "eagle_config, d2t alone": replace(NESTED, has_t2d=False),
    "eagle_config, the last state": Head("nested", last_state=True),
    "speculators": SPECULATORS,
    "speculators without ids": Head("speculators", first="layers.0"),
    "speculators, the whole vocabulary": replace(SPECULATORS, draft_vocab=None, extra={"draft_vocab_size": VOCAB}),
    "norm_before_residual": replace(SPECULATORS, norm_before_residual=True),
    "norm_before_fc": replace(SPECULATORS, norm_before_fc=True),
    "fc_norm": Head(fc_norm=True),
    "norm_output": Head(norm_output=True),
    "fc_norm, norm_output": replace(SPECULATORS, fc_norm=True, norm_output=True),
    "all flags, two layers": replace(
        SPECULATORS, norm_before_residual=True, norm_before_fc=True, norm_output=True, num_layers=2
    ),
    "both norms before fc": Head(norm_before_fc=True, fc_norm=True),
    "three layers": Head(num_layers=3, first="layers.0"),
    "two layers, hidden_norm in both": Head(num_layers=2, first="layers.0", later_norm="hidden_norm"),
    "qk_norm": replace(SPECULATORS, qk_norm=True),
    "qk_norm, flat": Head(qk_norm=True, first="layers.0"),
    "biases": Head(bias=True),
    "a narrow head": Head(size=24, own_embedding=True),
    "a tied output": Head(draft_vocab=None, own_embedding=True, output="tied"),
    "the target's output": Head(draft_vocab=None, output="target's"),
    "axes of one position": Head(extra={"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 1]}}),
}


@dataclass
class Watched(EagleEngine):
    """An engine that compares all it computes with the network of ``head``."""

    cell: Any
    target: Any
    head: Head
    tensors: Tensors
    worst: float = 0.0
    num_checked: int = 0
    networks: dict[Row, tuple[Network, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        EagleEngine.__init__(self, self.cell, self.target)

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree], num_scored: Sequence[int]) -> list[Scores]:
        results = super().score(rows, trees, num_scored)
        for row, tree, done, scores in zip(rows, trees, num_scored, results, strict=True):
            if not done:
                network = Network(self.head, self.tensors, self.target.model)
                self.networks[row] = network, network.read(row.tokens)
            network, state = self.networks[row]
            for node in range(done, len(tree)):
                expected = network.logits(state, tree.path_tokens(node))
                error = (scores.logits[node - done] - expected).abs().max() / expected.abs().max()
                self.worst = max(self.worst, float(error))
                self.num_checked += 1
        return results


def watched(stored: Path, head: Head, tensors: Tensors) -> Watched:
    model = tiny_target(VOCAB, layers=8, dtype=torch.float64)
    engine = Watched(load_eagle(stored, 32, VOCAB), CausalLM(model), head, tensors)
    run(EagleDrafter(engine, Shape((2, 2, 1))), PROMPTS[1:3], 4)
    assert engine.num_checked > 10
    return engine


@pytest.mark.parametrize("name", HEADS)
def test_a_published_head_computes_what_its_format_says(tmp_path: Path, name: str) -> None:
    """Guards flags that were passed over in silence, and layer ids that were counted from the wrong layer."""
    head = HEADS[name]
    assert watched(head.write(tmp_path, VOCAB), head, head.tensors(VOCAB)).worst < EXACT


IGNORED: dict[str, tuple[str, dict[str, Any]]] = {
    "norm_before_residual": ("norm_before_residual", {"norm_before_residual": False}),
    "norm_before_fc": ("norm_before_fc", {"norm_before_fc": False}),
    "fc_norm": ("fc_norm", {"fc_norm": False}),
    "norm_output": ("norm_output", {"norm_output": False}),
    "a norm of all features for one of each": ("both norms before fc", {"norm_before_fc": False}),
    "the second layer": ("two layers, hidden_norm in both", {"num_layers": 1}),
    "qk_norm": ("qk_norm", {"qk_norm": False}),
    "biases": ("biases", {"bias": False}),
    "the layer ids": ("speculators", {"entries": (2, 4, 5)}),
    "speculators' count": ("speculators", {"entries": (2, 4, 7)}),
    "SGLang's count": ("eagle_config", {"entries": (0, 3, 6)}),
    "the order of layers": ("eagle_config", {"entries": (7, 1, 4)}),
    "its own embedding": ("speculators", {"own_embedding": False}),
}


@pytest.mark.parametrize("ignored", IGNORED)
def test_that_comparison_sees_what_is_ignored(tmp_path: Path, ignored: str) -> None:
    name, change = IGNORED[ignored]
    head = HEADS[name]
    stored, wrong = head.write(tmp_path, VOCAB), replace(head, **change)
    assert watched(stored, wrong, head.tensors(VOCAB)).worst > 1000 * EXACT


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_saved_again_computes_the_same(tmp_path: Path, name: str) -> None:
    """Guards the export: flags and layer ids that the written config does not hold."""
    head = HEADS[name]
    cell: Any = load_eagle(head.write(tmp_path / "published", VOCAB), 32, VOCAB)
    save_eagle(cell, tmp_path / "ours", shares_output=head.output == "target's")
    assert watched(tmp_path / "ours", head, head.tensors(VOCAB)).worst < EXACT


def test_the_layers_can_be_named_whatever_the_config_says(tmp_path: Path) -> None:
    """For heads whose config counts them otherwise than its layout does."""
    stored = NESTED.write(tmp_path, VOCAB)
    target = CausalLM(tiny_target(VOCAB, layers=8, dtype=torch.float64))

    def drafter(options: str) -> Any:
        return make_drafter(f"eagle:path={stored}{options}", DraftContext(target, make_verifier("match")))

    assert drafter("").engine.layers == (1, 4, 7)
    assert drafter(",layers=6+0+3").engine.layers == (6, 0, 3)
    with pytest.raises(ValueError, match=r"reads 3 layers .* option layers"):
        drafter(",layers=6+0")
    with pytest.raises(ValueError, match=r"reads hidden_states\[1, 2, 8\] .* which has 8 layers"):
        drafter(",layers=1+2+8")
    with pytest.raises(ValueError, match=r"joined by \+"):
        drafter(",layers=low")
