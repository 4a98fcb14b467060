"""The EAGLE drafter: its passes equal the published equations, and with any head the text stays the target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_runs import EXACT, PROMPTS, VOCAB, run
from torch import Tensor
from trained import random_eagle, random_feature_cell, tiny_target
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdec.cpu.packed_linear import PackedLinear, is_packed, pack, packing_fault
from specdec.drafters import make_drafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.heads import eagle_cell, eagle_engine
from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell
from specdec.drafters.heads.eagle_engine import EagleEngine, feature_layers
from specdec.drafters.heads.eagle_format import save_eagle
from specdec.drafters.trees.expansion import ChildSampling, Shape
from specdec.engine import padded_pass
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import DraftContext, Limit, Row, Scores
from specdec.rng import Rng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree
from specdec.verifiers import make_verifier


def rms(x: Tensor, norm: Any) -> Tensor:
    out: Tensor = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return out


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """(heads, D) turned by ``position``: pairs (i, i + D / 2)."""
    half = x.shape[-1] // 2
    angle = position / theta ** (torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@dataclass
class Reference:
    """EAGLE's equations written down once more: one token at a time, without batch, tree or buffers."""

    cell: Any
    model: LlamaForCausalLM
    keys: list[list[Tensor]] = field(init=False)
    values: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [[] for _ in range(self.cell.num_layers)]
        self.values = [[] for _ in range(self.cell.num_layers)]

    def features(self, tokens: Sequence[int]) -> Tensor:
        """What the head reads of the target at each of ``tokens``."""
        states = self.model(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states
        if isinstance(self.cell, FeatureCell):
            return states[-1][0]
        number = self.model.config.num_hidden_layers
        return torch.cat([states[2][0], states[number // 2][0], states[number - 3][0]], -1)

    def attend(self, index: int, layer: Any, x: Tensor) -> Tensor:
        config, attention, position = self.cell.config, layer.self_attn, len(self.keys[index])
        theta = config.rope_parameters["rope_theta"]
        q, k, v = (p(x).view(-1, config.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        self.keys[index].append(rotated(k, position, theta))
        self.values[index].append(v)
        group = config.num_attention_heads // config.num_key_value_heads
        keys = torch.stack(self.keys[index], 1).repeat_interleave(group, 0)
        values = torch.stack(self.values[index], 1).repeat_interleave(group, 0)
        weights = (rotated(q, position, theta)[:, None] @ keys.transpose(1, 2) / config.head_dim**0.5).softmax(-1)
        out: Tensor = attention.o_proj((weights @ values).flatten())
        return out

    def finish(self, h: Tensor, layer: Any, attended: Tensor) -> Tensor:
        h = h + attended
        y = rms(h, layer.post_attention_layernorm)
        out: Tensor = h + layer.mlp.down_proj(torch.nn.functional.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
        return out

    def step(self, token: int, state: Tensor) -> Tensor:
        embed = (self.cell.embed_tokens or self.model.model.embed_tokens).weight[token]
        if isinstance(self.cell, EagleCell):
            layer = self.cell.midlayer
            x = torch.cat([rms(embed, layer.input_layernorm), rms(state, layer.hidden_norm)])
            attended = self.attend(0, layer, x)
            residual = rms(state, layer.hidden_norm) if self.cell.config.norm_before_residual else state
            return self.finish(residual, layer, attended)
        h = self.cell.fc(torch.cat([embed, state]))
        for i, layer in enumerate(self.cell.layers):
            h = self.finish(h, layer, self.attend(i, layer, rms(h, layer.input_layernorm) if i else h))
        return h

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """The state (H,) at the newest of a row's ``tokens``."""
        state = torch.zeros(0)
        for token, feature in zip(tokens[1:], self.features(tokens[:-1]), strict=True):
            state = self.step(token, self.cell.fc(feature) if isinstance(self.cell, EagleCell) else feature)
        return state

    @torch.no_grad()
    def logits(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """(Vd,) after the drafted ``path`` below ``state``; what it adds to the keys is forgotten."""
        length = len(self.keys[0])
        for token in path:
            state = self.step(token, state)
        for stored in (*self.keys, *self.values):
            del stored[length:]
        if isinstance(self.cell, EagleCell):
            return self.cell.lm_head(rms(state, self.cell.norm))
        return self.model.lm_head(state)


@dataclass
class Watched(EagleEngine):
    """An engine that compares all it computes with the reference."""

    cell: Any
    target: Any
    worst: float = 0.0
    num_checked: int = 0
    reference: dict[Row, Reference] = field(default_factory=dict)
    before: dict[Row, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        EagleEngine.__init__(self, self.cell, self.target)

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree], num_scored: Sequence[int]) -> list[Scores]:
        results = super().score(rows, trees, num_scored)
        for row, tree, done, scores in zip(rows, trees, num_scored, results, strict=True):
            if not done:
                self.reference[row] = reference = Reference(self.cell, self.target.model)
                self.before[row] = reference.read(row.tokens)
            for node in range(done, len(tree)):
                expected = self.reference[row].logits(self.before[row], tree.path_tokens(node))
                error = (scores.logits[node - done] - expected).abs().max() / expected.abs().max()
                self.worst = max(self.worst, float(error))
                self.num_checked += 1
        return results


def watched(
    make: Callable[[LlamaForCausalLM], Any], shape: Shape, children: ChildSampling, params: SamplingParams
) -> Watched:
    model = tiny_target(VOCAB, dtype=torch.float64)
    engine = Watched(make(model), CausalLM(model))
    verifier = "match" if children is ChildSampling.CERTAIN else "rejection"
    texts, accepted = run(EagleDrafter(engine, shape, children), PROMPTS, 6, params, verifier, max_rows=3)
    assert [len(text) for text in texts] == [len(prompt) + 6 + key for key, prompt in enumerate(PROMPTS)]
    assert accepted > 0.1, "nothing was accepted, so nothing was proved of what follows an accept"
    assert engine.num_checked > 30
    return engine


BEST_FIRST = Shape((), top_k=3, depth=3)
CELLS: dict[str, Callable[[LlamaForCausalLM], Any]] = {
    "eagle3": random_eagle,
    "eagle3 reduced vocabulary": lambda model: random_eagle(model, [0, 2, 3, 5, 8, 9, 10]),
    "eagle3 norm before residual, own embedding": lambda model: random_eagle(
        model, norm_before_residual=True, has_embedding=True
    ),
    "eagle1": random_feature_cell,
    "eagle1 three layers, bias": lambda model: random_feature_cell(model, 3, fc_bias=True),
}


@pytest.mark.parametrize("cell", CELLS)
def test_trees_of_ragged_rows_equal_one_token_at_a_time_from_scratch(cell: str) -> None:
    """Guards masks, positions, alignment with the features, rows that join late, and what is left after an accept."""
    assert watched(CELLS[cell], BEST_FIRST, ChildSampling.CERTAIN, SamplingParams()).worst < EXACT


DRAWN = {
    "chain": (Shape((1, 1, 1)), ChildSampling.INDEPENDENT),
    "3x2 independent": (Shape((3, 2)), ChildSampling.INDEPENDENT),
    "3x2 without replacement": (Shape((3, 2)), ChildSampling.WITHOUT_REPLACEMENT),
    "best-first top plus one": (BEST_FIRST, ChildSampling.TOP_PLUS_ONE),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_so_do_drawn_trees(kind: str) -> None:
    """Guards repeated siblings, which are scored once."""
    cell = CELLS["eagle3 reduced vocabulary"]
    assert watched(cell, *DRAWN[kind], SamplingParams()).worst < EXACT


def keep_head_states(self: EagleEngine, row: Row, scores: Scores, num_nodes: int, path: Sequence[int]) -> None:
    true_read(self, row, scores, num_nodes, [0] * len(path))


def by_slots(*args: Any) -> Any:
    plan = true_plan(*args)
    parts, num_columns = args[0], args[1]
    columns = torch.arange(num_columns)
    slots = [part.start + columns - (num_columns - len(part.new_tokens)) for part in parts]
    return replace(plan, positions=torch.stack(slots).clamp(min=0))


def in_the_head(name: str, broken: Callable[..., Any]) -> Callable[..., Any]:
    """The head's passes with a part of their layout broken; the target's are laid out by the same code."""

    def forward(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(padded_pass, name, broken)
            return true_forward(*args)

    return forward


true_read, true_forward = EagleEngine.read, EagleEngine._forward
true_plan, true_visibility = padded_pass.mask_plan, padded_pass.visibility
BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "features of the root for all": ("read", keep_head_states),
    "positions that count siblings": ("_forward", in_the_head("mask_plan", by_slots)),
    "no tree mask": ("_forward", in_the_head("visibility", lambda plan: torch.ones_like(true_visibility(plan)))),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_comparison_sees_a_broken_engine(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EagleEngine, *BROKEN[fault])
    assert watched(CELLS["eagle3"], BEST_FIRST, ChildSampling.CERTAIN, SamplingParams()).worst > 1000 * EXACT


def test_a_long_prompt_is_processed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle_engine, "PREFILL_CHUNK", 4)
    assert watched(CELLS["eagle3"], BEST_FIRST, ChildSampling.CERTAIN, SamplingParams()).worst < EXACT


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(0.7, 5, 0.9)], ids=str)
def test_a_batch_drafts_and_emits_what_single_rows_do(params: SamplingParams) -> None:
    """Match with coupled children: the same noise in any batch."""
    model = tiny_target(VOCAB, dtype=torch.float64)

    def texts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        engine = EagleEngine(random_eagle(model), CausalLM(model))
        return run(EagleDrafter(engine, BEST_FIRST, ChildSampling.COUPLED), prompts, 9, params)[0]

    together = texts(PROMPTS)
    assert texts(PROMPTS[:1]) == together[:1]
    assert texts(PROMPTS[:3]) == together[:3]


class Recording(EagleDrafter):
    """Keeps what it proposed for which tokens."""

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        trees = super().propose(rows, limits, params, rng)
        self.seen.update(((row.key, *row.tokens), tree) for row, tree in zip(rows, trees, strict=True))
        return trees


@torch.no_grad()
def calmed(cell: FeatureCell) -> FeatureCell:
    """Weights so small that the target's logits for its states tell more than one token apart."""
    for parameter in cell.parameters():
        parameter.mul_(0.2)
    return cell


SIZE, LARGE_VOCAB = 128, 200  # layers large enough to be packed
PACKED_CELLS: dict[str, Callable[[LlamaForCausalLM], Any]] = {
    "eagle3": lambda model: random_eagle(model, list(range(0, LARGE_VOCAB, 2))),
    "eagle3 biases, norm before residual": lambda model: random_eagle(
        model, attention_bias=True, norm_before_residual=True
    ),
    "eagle1 two layers": lambda model: calmed(random_feature_cell(model, 2, fc_bias=True)),
}
needs_packing = pytest.mark.skipif(bool(packing_fault(torch.float32)), reason=packing_fault(torch.float32))


def drafts(name: str, shape: Shape, packed: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Every tree of a run over ragged rows, two at a time, and the cell."""
    model = tiny_target(LARGE_VOCAB, size=SIZE, dtype=dtype)
    cell = PACKED_CELLS[name](model)
    if packed:
        pack(model)
    drafter = Recording(EagleEngine(cell, CausalLM(model)), shape)
    drafter.seen = {}
    run(drafter, [[token * 7 for token in prompt] for prompt in PROMPTS], 9, max_rows=2)
    return drafter.seen, cell


def agree(found: dict[Any, TokenTree], expected: dict[Any, TokenTree]) -> bool:
    return found.keys() == expected.keys() and all(
        tree.parents == expected[key].parents
        and tree.tokens == expected[key].tokens
        and tree.estimates == pytest.approx(expected[key].estimates, rel=1e-3)
        for key, tree in found.items()
    )


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads beside a packed float32 target would run in bfloat16 where the processor has it."""
    monkeypatch.setattr(eagle_engine, "draft_dtype", lambda target: target.model.dtype)


@needs_packing
@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("shape", [BEST_FIRST, Shape((1, 1, 1)), Shape((3, 2))], ids=["best-first", "chain", "3x2"])
@pytest.mark.parametrize("name", PACKED_CELLS)
def test_a_packed_head_drafts_what_the_plain_one_does(name: str, shape: Shape) -> None:
    plain, cell = drafts(name, shape, packed=False)
    assert not is_packed(cell)
    packed, cell = drafts(name, shape, packed=True)
    layer = cell.midlayer if isinstance(cell, EagleCell) else cell.layers[0]
    assert isinstance(layer.self_attn.qkv, PackedLinear)
    assert isinstance(layer.mlp.gate_up, PackedLinear)
    assert sum(len(tree) > 2 for tree in plain.values()) > 20
    assert agree(packed, plain)


@needs_packing
@pytest.mark.usefixtures("in_float32")
def test_that_comparison_sees_products_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = eagle_cell.merged
    monkeypatch.setattr(eagle_cell, "merged", lambda parent, names: merged(parent, names[::-1]))
    plain, packed = (drafts("eagle3", BEST_FIRST, packed)[0] for packed in (False, True))
    assert not agree(packed, plain)


@pytest.mark.skipif(bool(packing_fault(torch.bfloat16)), reason=packing_fault(torch.bfloat16))
@torch.no_grad()
def test_in_16_bits_a_packed_head_is_as_near_to_the_truth_as_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds, states = torch.randn(2, 3, 4, SIZE, generator=generator).bfloat16()
    positions = torch.arange(4).expand(3, -1)
    model = tiny_target(LARGE_VOCAB, size=SIZE)

    def logits(dtype: torch.dtype, packed: bool) -> Tensor:
        cell = random_eagle(model).bfloat16().to(dtype)
        if packed:
            eagle_cell.pack_cell(cell)

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return cell.logits(cell(embeds.to(dtype), states.to(dtype), positions, attend)).double()

    truth = logits(torch.float64, packed=False)
    plain, packed = ((logits(torch.bfloat16, p) - truth).square().mean().sqrt() for p in (False, True))
    assert float(packed) < 1.2 * float(plain)


def test_layers_too_small_to_be_packed_stay_as_they_are() -> None:
    cell = random_eagle(tiny_target(VOCAB))
    keys = list(cell.state_dict())
    eagle_cell.pack_cell(cell)
    assert not is_packed(cell)
    assert list(cell.state_dict()) == keys


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ROPES)
def test_positions_turn_queries_and_keys_as_in_transformers(rope: str, dtype: torch.dtype) -> None:
    """To the last bit: heads were trained with transformers' own."""
    cell = random_eagle(tiny_target(VOCAB), rope_parameters=ROPES[rope]).to(dtype)
    attention = cell.midlayer.self_attn
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, attention.q_proj.in_features, generator=generator).to(dtype)
    positions = torch.randint(4096, (2, 7), generator=generator)
    q, k, v = (
        layer(x).view(2, 7, -1, attention.head_dim).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = LlamaRotaryEmbedding(cell.config.llama())(x, positions)
    expected = (*apply_rotary_pos_emb(q, k, cos, sin), v)
    for found, tensor in zip(attention.project(x, *cell.rotary(positions, dtype)), expected, strict=True):
        assert torch.equal(found, tensor)


def test_features_are_those_of_the_paper() -> None:
    assert feature_layers(30) == (2, 15, 27)
    with pytest.raises(ValueError, match="three layers"):
        feature_layers(2)


def test_a_checkpoint_is_read_once_for_a_target_and_anew_when_it_changes(tmp_path: Path) -> None:
    """generate() builds a drafter at every call."""
    model = tiny_target(VOCAB)
    save_eagle(random_eagle(model), tmp_path)
    target = CausalLM(model)

    def cell() -> Any:
        return make_drafter(f"eagle:path={tmp_path}", DraftContext(target, make_verifier("match"))).engine.cell  # type: ignore[attr-defined]

    first = cell()
    assert cell() is first
    save_eagle(random_eagle(model, seed=2), tmp_path)
    assert cell() is not first
