"""What holds for every drafter: a new file in ``drafters/`` is covered without a line here, unless it needs options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trained import random_eagle, random_medusa, tiny_target
from transformers import LlamaForCausalLM

import specdec
from specdec.drafters import DRAFTERS, format_drafter
from specdec.drafters.heads.eagle_format import save_eagle
from specdec.drafters.heads.medusa_heads import save_medusa
from specdec.drafters.heads.shipped import target_facts
from specdec.drafters.none import NoDrafter
from specdec.interfaces import Limit, Row
from specdec.rng import Rng
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ([5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30])
MAX_NODES = 5


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target()


def with_cell(model: Any, folder: Path) -> dict[str, Any]:
    save_eagle(random_eagle(model), folder, target_facts(model))
    return {"path": str(folder)}


def with_heads(model: Any, folder: Path) -> dict[str, Any]:
    save_medusa(random_medusa(model), folder, target_facts(model))
    return {"path": str(folder)}


# Options without which a drafter cannot be built for this target, and packages that it needs.
NEEDS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {"eagle": with_cell, "medusa": with_heads}
PACKAGES = {"suffix": "arctic_inference"}
WAYS: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "temperature": 1.0, "seed": 3}]


def run(model: Any, drafter: Any, **options: Any) -> Tensor:
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    settings = {"max_new_tokens": 16, "adaptive": False, "max_nodes": MAX_NODES, **options}
    tokens: Tensor = specdec.generate(model, ids, attention_mask=mask, drafter=drafter, **settings)
    return tokens


@pytest.fixture(scope="module")
def plain(model: LlamaForCausalLM) -> list[Tensor]:
    return [run(model, "none", **way) for way in WAYS]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_changes_no_token_and_keeps_to_its_limits(
    model: LlamaForCausalLM, plain: list[Tensor], tmp_path: Path, name: str
) -> None:
    """The loop itself refuses trees beyond the limits."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    drafter = format_drafter(name, NEEDS[name](model, tmp_path) if name in NEEDS else {})
    draft_model = tiny_target(layers=1) if name == "model" else None
    for way, expected in zip(WAYS, plain, strict=True):
        assert torch.equal(run(model, drafter, draft_model=draft_model, **way), expected)


class Unlimited(NoDrafter):
    """Drafts more than it may."""

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        num = MAX_NODES + 1
        return [TokenTree((row.tokens[-1], *range(3, 3 + num)), (-1, *[0] * num)) for row in rows]


def test_a_drafter_that_ignores_its_limit_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="must keep within"):
        run(model, Unlimited(), do_sample=False)
