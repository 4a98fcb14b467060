"""Draft models that can do less than their target (chains only, fewer positions, other padding): slower, never other tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tinychat
import torch
from onerow import VOCAB, batch, make_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import specdec
from specdec.drafters.model import ModelDrafter
from specdec.drafters.trees.expansion import ChildSampling, Shape
from specdec.drafters.trees.shapes import StaticShape
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import Row, Step

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA |= ENDS
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, **ENDS}


def bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **ENDS)).eval()


def gpt_neo() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        max_position_embeddings=256, window_size=8, **ENDS,
    )  # fmt: skip
    return GPTNeoForCausalLM(config).eval()


def llama(context: int, vocab: int = VOCAB, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=context, initializer_range=0.15, **LLAMA, **options)
    return LlamaForCausalLM(config).eval()


def gpt2(context: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=context, initializer_range=0.3, **GPT2)).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def prompts() -> dict[str, Tensor]:
    return batch([5, 9, 12, 7], [8, 9, 10] * 6, [30])


CHAINS = ["model", "model:shape=chain", "model:shape=1x1x1", "model:shape=1x1x3", "model:shape=4"]
TREES = ["model:shape=best-first", "model:shape=3x2x1", "model:shape=2x2", "model:shape={}/tree.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    (path / "tree.json").write_text(json.dumps({"choices": [[0], [1], [0, 0], [1, 0]]}))
    (path / "chain.json").write_text(json.dumps({"choices": [[0], [1], [0, 0], [0, 1], [0, 0, 0]]}))
    return path


@pytest.mark.parametrize("draft_model", [bloom(), gpt_neo()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("drafter", [*CHAINS, "model:shape={}/chain.json", "hybrid:parts=ngram+model"])
def test_a_draft_model_that_reads_chains_only_drafts_what_it_can(
    model: Any, prompts: dict[str, Tensor], draft_model: Any, drafter: str, folder: Path
) -> None:
    """The last level of a tree is proposed unread, so that it may branch."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**prompts, **settings)
    for verifier in ("match", "rejection"):
        settings["verifier"] = verifier
        out = specdec.generate(
            model, **prompts, drafter=drafter.format(folder), draft_model=draft_model, adaptive=False, **settings
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("draft_models", [[bloom()], [make_model(), gpt_neo()]], ids=["alone", "beside another"])
@pytest.mark.parametrize("drafter", [*TREES, "hybrid:parts=ngram+model,model.shape=best-first"])
def test_a_tree_that_a_draft_model_cannot_read_is_refused_by_the_models_name(
    model: Any, prompts: dict[str, Tensor], draft_models: list[Any], drafter: str, folder: Path
) -> None:
    """Guards errors from the middle of a step that speak of "this model"."""
    name = type(draft_models[-1]).__name__
    with pytest.raises(ValueError, match=f"draft model {name} reads chains only .*; use shape=chain"):
        specdec.generate(
            model,
            **prompts,
            drafter=drafter.format(folder),
            draft_model=draft_models,
            max_new_tokens=4,
            do_sample=False,
        )


@pytest.mark.parametrize("drafter", TREES)
def test_where_only_chains_can_be_verified_every_shape_is_one(
    model: Any, prompts: dict[str, Tensor], drafter: str, folder: Path
) -> None:
    """Then nothing asks the draft model for branches; the target or the verifier may be the reason."""
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "drafter": drafter.format(folder)}
    for target, verifier in ((bloom(), "match"), (model, "block")):
        expected = target.generate(**prompts, max_new_tokens=8, do_sample=False)
        out = specdec.generate(target, **prompts, draft_model=gpt_neo(), verifier=verifier, **settings)
        assert torch.equal(out, expected)


def test_a_drafter_built_by_hand_falls_back_to_chains(model: Any, prompts: dict[str, Tensor]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    drafter = ModelDrafter(CausalLM(bloom()), Shape((3, 2)), ChildSampling.CERTAIN)
    steps: list[Step] = []
    out = specdec.generate(model, **prompts, drafter=drafter, adaptive=False, on_step=steps.append, **settings)
    assert torch.equal(out, model.generate(**prompts, **settings))
    assert steps[0].tree_parents == (-1, 0, 1)


@pytest.mark.parametrize(
    ("shape", "branches"),
    [
        (Shape((1, 1, 1)), False),
        (Shape((4,)), False),
        (Shape((1, 1, 4)), False),
        (Shape((2, 1)), True),
        (Shape((), top_k=1, depth=4), False),
        (Shape((), top_k=4, depth=1), False),
        (Shape((), top_k=2, depth=2), True),
        (Shape(static=StaticShape(((0,), (1,), (1, 0), (1, 1)))), False),
        (Shape(static=StaticShape(((0,), (1,), (0, 0), (1, 0)))), True),
    ],
)
def test_a_shape_branches_inside_where_two_nodes_of_a_level_have_children(shape: Shape, branches: bool) -> None:
    assert shape.branches_inside is branches


def test_tune_tries_the_shapes_that_the_draft_model_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a run that ends at a shape that nobody asked for."""
    target, draft = tinychat.save(tmp_path / "target"), tmp_path / "draft"
    torch.manual_seed(0)
    vocab = tinychat.make_model().config.vocab_size
    small = BloomForCausalLM(BloomConfig(vocab_size=vocab, hidden_size=32, n_layer=1, n_head=4, **ENDS))
    tinychat.save(draft, small)
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", tinychat.QUESTIONS[:2])
    words = ["--target", target, "--drafter-model", str(draft), "--drafter", "model", "--prompts", prompts]
    words += ["--max-new-tokens", "4", "--max-nodes", "2", "--output", str(tmp_path / "tuned.json")]
    ran = tinychat.Command(monkeypatch, capsys)("tune", *words)
    assert ran.status == 0, ran.err
    assert "what model:num_tokens=8,min_confidence=0.0, model propose" in ran.err
    assert "shape=" not in ran.err


# ---- fewer positions ----

SHORT = {
    "rotary": llama,
    "table": gpt2,
    "dynamic rotary": lambda n: llama(n, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
}


@pytest.mark.parametrize(
    ("drafter", "verifier"),
    [("model", "rejection"), ("model:shape=3x2x1", "match"), ("hybrid:parts=ngram+model", "match")],
)
@pytest.mark.parametrize("context", [12, 18, 19])
@pytest.mark.parametrize("kind", SHORT)
def test_a_draft_model_with_a_shorter_context_drafts_as_far_as_it_reaches(
    model: Any, prompts: dict[str, Tensor], kind: str, context: int, drafter: str, verifier: str
) -> None:
    """Prompts of 4, 18 and 1 tokens: some rows start beyond the draft model's context, others outgrow it."""
    settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    steps: list[Step] = []
    out = specdec.generate(
        model, **prompts, drafter=drafter, draft_model=SHORT[kind](context), verifier=verifier, adaptive=False,
        on_step=steps.append, **settings,
    )  # fmt: skip
    assert torch.equal(out, model.generate(**prompts, **settings))
    if not drafter.startswith("hybrid"):
        # The row's tokens up to the root; what is drafted below the last position is proposed unread.
        assert all(step.position <= context for step in steps if step.num_drafted)
        assert any(step.num_drafted for step in steps if step.position <= context)


def test_the_deepest_draft_stands_one_place_behind_the_last_position(model: Any) -> None:
    """Guards a limit that is off by one: the draft model reads its last position and drafts one token more."""
    steps: list[Step] = []
    specdec.generate(
        model, torch.tensor([[5, 9, 12, 7, 9, 3, 8]]), drafter="model:num_tokens=8,min_confidence=0.0", draft_model=gpt2(12),
        adaptive=False, max_new_tokens=20, do_sample=False, eos_token_id=None, on_step=steps.append,
    )  # fmt: skip
    drafted = {step.position: step.num_drafted for step in steps}
    assert drafted[7] == 6, "positions 6 to 11 are read"
    assert all(count == max(0, min(8, 13 - position)) for position, count in drafted.items())


def test_sampled_text_does_not_depend_on_where_drafts_end(model: Any, prompts: dict[str, Tensor]) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "seed": 3, "eos_token_id": None}
    plain = specdec.generate(model, **prompts, drafter="none", **settings)
    for shape in ("chain", "3x2"):
        out = specdec.generate(
            model, **prompts, drafter=f"model:shape={shape}", draft_model=[gpt2(12), llama(512)], **settings
        )
        assert torch.equal(out, plain)


def test_a_draft_models_sliding_window_does_not_end_its_drafts(model: Any, prompts: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=VOCAB, sliding_window=6, max_position_embeddings=512, **LLAMA)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    steps: list[Step] = []
    out = specdec.generate(
        model, **prompts, drafter="model:shape=3x2x1", draft_model=MistralForCausalLM(config).eval(), adaptive=False,
        on_step=steps.append, **settings,
    )  # fmt: skip
    assert torch.equal(out, model.generate(**prompts, **settings))
    assert all(step.num_drafted for step in steps if not step.finished)


def test_a_target_is_still_told_that_its_positions_do_not_suffice() -> None:
    with pytest.raises(ValueError, match=r"its table of positions has 12; shorten the prompt \(13 tokens\)"):
        CausalLM(gpt2(12)).open([Row(0, [5] * 13, 20)])
    with pytest.raises(ValueError, match="its table of positions has 12"):
        CausalLM(gpt2(12)).open([Row(0, [5] * 4, 20)])


# ---- other padding ----


@pytest.mark.parametrize("verifier", ["match", "rejection"])
@pytest.mark.parametrize("shape", ["chain", "3x2", "best-first"])
def test_the_padding_of_a_larger_draft_vocabulary_is_never_proposed(shape: str, verifier: str) -> None:
    """Guards ids that the target has no embedding for, even where the draft model would bet everything on them."""
    target, other = llama(512, vocab=200), llama(512, vocab=201)
    with torch.no_grad():
        other.lm_head.weight[200] = other.lm_head.weight[:200].sum(0) * 50
        other.model.norm.weight.fill_(3.0)
    for sampling in ({"do_sample": False}, {"do_sample": True, "seed": 1}):
        steps: list[Step] = []
        specdec.generate(
            target, torch.tensor([[5, 9, 150]]), drafter=f"model:shape={shape},min_confidence=0.0", draft_model=other,
            verifier=verifier, adaptive=False, max_new_tokens=12, on_step=steps.append, **sampling,
        )  # fmt: skip
        assert any(step.num_drafted for step in steps)
        assert all(max(step.tree_tokens) < 200 for step in steps)
