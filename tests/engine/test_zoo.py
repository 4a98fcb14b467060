"""The engine against unmodified transformers models of 40 families: every logit against plain forwards without cache.

The reference never sees a cache, a mask or a position of ours. All seeds are fixed, and tolerances stand far from both
sides: right masks leave 2e-6 at most, wrong ones 0.5 at least.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from zoo import CHAIN, FAMILIES, REFUSED, ROUNDED, TREE, VOCAB, WINDOW, Family
from zoo_rows import (
    MAX_DEPTH,
    accept,
    deep_tree,
    generated,
    make_row,
    model_of,
    random_chain,
    random_tree,
    scattered_node,
)

import specdec.engine.padded_pass
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.engine.causal_lm import CausalLM
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row, Scores
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY
from specdec.tree import TokenTree
from specdec.verifiers.match import MatchVerifier

tree_families = pytest.mark.parametrize("family", TREE, ids=lambda f: f.name)
chain_families = pytest.mark.parametrize("family", CHAIN, ids=lambda f: f.name)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def require_causal_lm(family_name: str) -> CausalLM:
    return CausalLM(model_of(family_name))


def engine(family: Family) -> CausalLM:
    lm = require_causal_lm(family.name)
    lm.reset()
    return lm


@torch.no_grad()
def plain(model: Any, tokens: Sequence[int], tree: TokenTree, **options: Any) -> tuple[Any, list[tuple[int, int]]]:
    """One plain forward of ``tokens`` and each leaf's path; and where in its output to find each node.

    Shorter paths are filled up at the right, which a causal model cannot see.
    """
    leaves = [i for i, below in enumerate(tree.children()) if not below]
    paths = {leaf: tree.path(leaf) for leaf in leaves}
    depth = max(map(len, paths.values()))
    ids = [[*tokens, *tree.path_tokens(leaf), *[0] * (depth - len(paths[leaf]))] for leaf in leaves]
    where = {node: (i, len(tokens) - 1 + d) for i, leaf in enumerate(leaves) for d, node in enumerate(paths[leaf])}
    out = model(input_ids=torch.tensor(ids), use_cache=False, **options)
    return out, [where[node] for node in range(len(tree))]


def plain_logits(model: Any, tokens: Sequence[int], tree: TokenTree) -> torch.Tensor:
    """(n, V) logits of each node, by plain forwards without cache."""
    out, where = plain(model, tokens, tree)
    return torch.stack([out.logits[at] for at in where])


def error(model: Any, rows: Sequence[Row], trees: Sequence[TokenTree], scores: Sequence[Scores]) -> float:
    """The largest difference of a logit of any node of any row from plain forwards."""
    pairs = [(s.logits, plain_logits(model, r.tokens, t)) for r, t, s in zip(rows, trees, scores, strict=True)]
    assert all(got.shape == want.shape for got, want in pairs)
    return max(float((got - want).abs().max()) for got, want in pairs)


# --- what each family supports


@tree_families
def test_support_for_trees_is_detected(family):
    """A family that silently fell back to chains would still pass every test of exactness."""
    support = engine(family).support
    assert support.can_tree
    assert support.reason == ""


@chain_families
def test_support_for_chains_only_is_detected_and_says_why(family):
    """MPT and GPT-Neo take a 4D mask without a complaint and answer with wrong logits."""
    lm = engine(family)
    assert lm.chain_only
    assert family.reason in lm.support.reason
    row = make_row(random.Random(0), 0, 5)
    lm.open([row])
    with pytest.raises(ValueError, match=r"chains only .*" + family.reason):
        lm.score([row], [TokenTree((row.tokens[-1], 3, 4), (-1, 0, 0))])


@pytest.mark.parametrize("family", REFUSED, ids=lambda f: f.name)
def test_models_that_cannot_drop_a_token_are_refused(family):
    """A recurrent state has seen the rejected token: logits would be off by 5, without an exception."""
    with pytest.raises(UnsupportedModelError, match=family.reason):
        CausalLM(family.build())


# --- trees


@tree_families
def test_every_node_equals_a_plain_forward_of_its_path(family):
    """A wrong mask, position or window; and slots moved wrongly by a commit of a path that is not a prefix."""
    rng = random.Random(1)
    lm, row = engine(family), make_row(rng, 0, 21)
    lm.open([row])
    for grow in (random_tree, deep_tree, random_tree, random_tree):
        tree = grow(rng, row.tokens[-1])
        assert error(lm.model, [row], [tree], lm.score([row], [tree])) < family.tolerance
        accept(lm, [row], [tree], [scattered_node(tree)], rng)


@tree_families
def test_ragged_batches_equal_plain_forwards(family):
    """Rows of other lengths must not shift positions, windows or slots; nor may a row that left or joined."""
    rng = random.Random(2)
    lm = engine(family)
    rows = [make_row(rng, key, size) for key, size in enumerate((21, 5, 13))]
    lm.open(rows)
    for sizes in ((14, 1, 7), (3, 9, 1), (6, 5, 14), (1, 14, 2)):
        trees = [random_tree(rng, row.tokens[-1], size) for row, size in zip(rows, sizes, strict=True)]
        assert error(lm.model, rows, trees, lm.score(rows, trees)) < family.tolerance
        accept(lm, rows, trees, [rng.randrange(size) for size in sizes], rng)
        if sizes[0] == 3:  # the middle row ends: the last one moves into its line, and a new one joins
            lm.close(rows[1:2])
            rows[1] = make_row(rng, 3, 11)
            lm.open(rows[1:2])


@tree_families
def test_a_tree_grown_level_by_level_equals_the_whole_tree(family):
    """How drafters grow trees: nodes of earlier levels are read from the cache, also where one tree ends early."""
    rng = random.Random(3)
    lm = engine(family)
    rows = [make_row(rng, 0, 13), make_row(rng, 1, 21)]
    lm.open(rows)
    for sizes in ((14, 5), (4, 10)):
        trees = [random_tree(rng, row.tokens[-1], size, by_level=True) for row, size in zip(rows, sizes, strict=True)]
        grown, done = [[], []], [0, 0]
        for level in range(MAX_DEPTH + 1):
            sofar = [sum(d <= level for d in tree.depths()) for tree in trees]
            if sofar == done:
                break
            parts = [TokenTree(t.tokens[:n], t.parents[:n]) for t, n in zip(trees, sofar, strict=True)]
            for logits, scores in zip(grown, lm.score(rows, parts, done), strict=True):
                logits.append(scores.logits)
            done = sofar
        assert error(lm.model, rows, trees, [Scores(torch.cat(logits)) for logits in grown]) < family.tolerance
        accept(lm, rows, trees, [scattered_node(tree) for tree in trees], rng)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek_v3"])
def test_any_rows_in_any_order_can_be_scored_again(name):
    """Rows in turn, rows apart in the cache, a second tree without a commit: a drafter may do all of these."""
    rng = random.Random(13)
    lm = engine(FAMILIES[name])
    rows = [make_row(rng, key, size) for key, size in enumerate((9, 3, 13, 6))]
    lm.open(rows)
    for order in ((2, 0), (3, 2, 1, 0), (1, 3), (0, 3)):
        some = [rows[i] for i in order]
        for _ in range(2):
            trees = [random_tree(rng, row.tokens[-1], rng.randrange(1, 10)) for row in some]
            assert error(lm.model, some, trees, lm.score(some, trees)) < FAMILIES[name].tolerance
        accept(lm, some, trees, [rng.randrange(len(tree)) for tree in trees], rng)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "deepseek_v3"])
def test_the_cache_grows_in_rows_and_slots_without_a_loss(name):
    """Buffers are allocated in steps of 64 slots for the rows known then."""
    rng = random.Random(14)
    lm = engine(FAMILIES[name])
    rows = []
    for key, size in enumerate((58, 5, 30, 120)):
        rows.append(make_row(rng, key, size))
        lm.open(rows[-1:])
        trees = [random_tree(rng, row.tokens[-1]) for row in rows]
        assert error(lm.model, rows, trees, lm.score(rows, trees)) < FAMILIES[name].tolerance
        accept(lm, rows, trees, [scattered_node(tree) for tree in trees], rng)
    lm.close(rows[1:])
    tree = random_tree(rng, rows[0].tokens[-1])
    assert error(lm.model, rows[:1], [tree], lm.score(rows[:1], [tree])) < FAMILIES[name].tolerance
    lm.close(rows[:1])
    assert not lm._rows


@dataclass
class RandomTrees:
    """A drafter that knows the answer and hides it in random trees, up to a random depth."""

    answers: dict[int, list[int]]
    rng: random.Random
    name: str = "random trees"

    def begin(self, rows): ...

    def observe(self, rows, trees, verdicts, scores): ...

    def end(self, rows): ...

    def propose(self, rows, limits, *_):
        return [self._tree(row, limit) for row, limit in zip(rows, limits, strict=True)]

    def _tree(self, row, limit):
        tokens, parents, depths, right = [row.tokens[-1]], [-1], [0], [True]
        for _ in range(self.rng.randrange(limit.nodes)):
            open_nodes = [i for i, depth in enumerate(depths) if depth < limit.depth]
            if limit.chain_only:
                open_nodes = open_nodes[len(tokens) - 1 :]
            if not open_nodes:
                break
            parent = self.rng.choice(open_nodes)
            answer = self.answers[row.key][len(row.tokens) + depths[parent]]
            token = answer if right[parent] and self.rng.random() < 0.7 else self.rng.randrange(VOCAB)
            if (parent, token) in zip(parents, tokens, strict=True):
                continue
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            right.append(right[parent] and token == answer)
        return TokenTree(tuple(tokens), tuple(parents))


@pytest.mark.parametrize("family", [*TREE, *CHAIN], ids=lambda f: f.name)
def test_greedy_decoding_emits_the_tokens_of_generate(family):
    """The whole loop in a ragged batch: any error in the cache shows as another token within a few steps."""
    rng = random.Random(4)
    lm = engine(family)
    rows = [make_row(rng, key, size, room=14 + key) for key, size in enumerate((21, 5, 13))]
    answers = {row.key: generated(lm.model, row) for row in rows}
    drafter = RandomTrees(answers, rng)
    decoder = Decoder(lm, drafter, MatchVerifier(), WarperTransform(GREEDY), PhiloxRng(1), lambda _: False)
    num_accepted = sum(e.step.num_accepted for e in decoder.run(rows))
    assert {row.key: row.tokens for row in rows} == answers
    assert num_accepted > 5  # of 45 tokens; else this would be plain decoding


# --- chains


@pytest.mark.parametrize("family", [*CHAIN, *TREE[:2]], ids=lambda f: f.name)
def test_chains_in_a_ragged_batch_equal_plain_forwards(family):
    """A bias by cache slot (ALiBi, local attention) is right only if slots are positions."""
    rng = random.Random(5)
    lm = engine(family)
    rows = [make_row(rng, key, size) for key, size in enumerate((21, 5, 13))]
    lm.open(rows)
    for sizes in ((4, 1, 6), (3, 5, 3), (2, 2, 2)):
        chains = [random_chain(rng, row.tokens[-1], size) for row, size in zip(rows, sizes, strict=True)]
        assert error(lm.model, rows, chains, lm.score(rows, chains)) < family.tolerance
        accept(lm, rows, chains, [rng.randrange(size) for size in sizes], rng)


@chain_families
def test_a_long_prompt_of_a_chain_only_model_is_processed_in_chunks(family, monkeypatch):
    """These models count slots, so that each chunk must begin where the last one ended."""
    monkeypatch.setattr(specdec.engine.causal_lm, "PREFILL_CHUNK", 4)
    rng = random.Random(15)
    lm, row = engine(family), make_row(rng, 0, 23)
    lm.open([row])
    chain = random_chain(rng, row.tokens[-1], 5)
    assert error(lm.model, [row], [chain], lm.score([row], [chain])) < family.tolerance


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_chains_in_lockstep_without_a_mask_equal_plain_forwards(name):
    """The pass that leaves the causal mask to the model, where rows are equally long."""
    rng = random.Random(6)
    lm = engine(FAMILIES[name])
    rows = [make_row(rng, key, 13) for key in range(2)]
    lm.open(rows)
    for size in (4, 1, 3):
        chains = [random_chain(rng, row.tokens[-1], size) for row in rows]
        assert error(lm.model, rows, chains, lm.score(rows, chains)) < FAMILIES[name].tolerance
        accept(lm, rows, chains, [size - 1] * 2, rng)


# --- hidden states


def captured_error(model: Any, row: Row, tree: TokenTree, scores: Scores, layers: Sequence[int], num_old: int) -> float:
    """The largest difference of captured states from those of plain forwards, for all tokens after ``num_old``."""
    out, where = plain(model, row.tokens, tree, output_hidden_states=True)
    where = [(0, i) for i in range(num_old, len(row.tokens) - 1)] + where
    hidden = torch.stack([out.hidden_states[-1][at] for at in where])
    features = torch.stack([torch.cat([out.hidden_states[i][at] for i in layers]) for at in where])
    assert scores.hidden is not None
    assert scores.features is not None
    assert scores.hidden.shape == hidden.shape
    assert scores.features.shape == features.shape
    return max(float((scores.hidden - hidden).abs().max()), float((scores.features - features).abs().max()))


@pytest.mark.parametrize("name", [f.name for f in TREE if f.name != "gemma3n"])  # its layers pass four streams on
def test_captured_states_equal_those_of_plain_forwards(name):
    """Heads were trained on these: states shifted by a column or taken before the norm only lower acceptance."""
    rng = random.Random(7)
    layers = (0, 1, 3)
    lm = CausalLM(model_of(name), capture_hidden=True, feature_layers=layers)
    rows = [make_row(rng, 0, 21), make_row(rng, 1, 5)]
    lm.open(rows)
    num_old = [0, 0]
    for _ in range(2):
        trees = [random_tree(rng, row.tokens[-1], size) for row, size in zip(rows, (14, 6), strict=True)]
        for row, tree, scores, old in zip(rows, trees, lm.score(rows, trees), num_old, strict=True):
            assert captured_error(lm.model, row, tree, scores, layers, old) < 10 * FAMILIES[name].tolerance
        accept(lm, rows, trees, [scattered_node(tree) for tree in trees], rng)
        num_old = [len(row.tokens) - 1 for row in rows]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "llama4", "deepseek_v3"])
def test_a_prompt_in_chunks_equals_a_prompt_in_one_pass(name, monkeypatch):
    """Chunks of a long prompt: the states captured in all but the last were lost once."""
    monkeypatch.setattr(specdec.engine.causal_lm, "PREFILL_CHUNK", 4)
    rng = random.Random(8)
    lm = CausalLM(model_of(name), capture_hidden=True, feature_layers=(1, 2))
    rows = [make_row(rng, key, size) for key, size in enumerate((21, 5, 13))]
    lm.open(rows)
    trees = [random_tree(rng, row.tokens[-1], size) for row, size in zip(rows, (14, 1, 7), strict=True)]
    lm.num_passes = 0
    scores = lm.score(rows, trees)
    assert lm.num_passes == 4 + 0 + 2 + 1  # 20 pending tokens: 4 chunks of 4 and a rest of 4; 4: none; 12: 2; the batch
    assert error(lm.model, rows, trees, scores) < FAMILIES[name].tolerance
    for row, tree, score in zip(rows, trees, scores, strict=True):
        assert captured_error(lm.model, row, tree, score, (1, 2), 0) < 10 * FAMILIES[name].tolerance


# --- limits


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
LIMITED = {  # family, options, the limit, a word of the message
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        "dynamic",
    ),
    "longrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32}, "long-context"),
    "gpt2": ("gpt2", {}, "table of positions"),
    "opt": ("opt", {}, "table of positions"),
    "gptj": ("gptj", {}, "table of positions"),
    "codegen": ("codegen", {}, "table of positions"),
    "gpt_neo": ("gpt_neo-local", {}, "table of positions"),
    "mpt": ("mpt", {"max_seq_len": 32, "max_position_embeddings": None}, "table of positions"),
}


@pytest.mark.parametrize("case", LIMITED)
def test_positions_are_used_up_to_the_last_and_not_beyond(case):
    """Beyond: an IndexError deep inside a model, or frequencies that change under the cache (logits off by 0.5)."""
    name, options, word = LIMITED[case]
    rng = random.Random(9)
    model = FAMILIES[name].build(**{"max_position_embeddings": 64 if case == "longrope" else 32, **options})
    lm = CausalLM(model)
    with pytest.raises(ValueError, match=rf"33 positions.* {word}.*at most 12 new tokens"):
        lm.open([make_row(rng, 0, 21, room=13)])
    row = make_row(rng, 0, 21, room=12)  # the last token is never read
    lm.open([row])
    while row.num_left:
        size = min(4, row.num_left)
        tree = (
            random_chain(rng, row.tokens[-1], size)
            if lm.chain_only or size < 3
            else random_tree(rng, row.tokens[-1], size)
        )
        assert error(model, [row], [tree], lm.score([row], [tree])) < FAMILIES[name].tolerance
        accept(lm, [row], [tree], [size - 1], rng)


def test_llama4s_attention_temperature_is_kept_within_its_first_step():
    """Llama 4 scales queries by the slot of a column, which in a ragged batch is another row's position."""
    model = FAMILIES["llama4"].build(attn_temperature_tuning=True, floor_scale=2148)
    lm = CausalLM(model)
    with pytest.raises(ValueError, match=r"attention temperature .* 100; shorten"):
        lm.open([make_row(random.Random(0), 0, 90, room=12)])
    lm.open([make_row(random.Random(0), 0, 90, room=11)])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([], "empty prompt"), ([3, VOCAB], "must be in"), ([-1], "must be in")],
    ids=["empty", "high", "negative"],
)
def test_prompts_that_no_model_can_read_are_refused_before_any_row_is_opened(tokens, words):
    """A row left half open would keep its line of the cache for ever."""
    lm = engine(FAMILIES["llama"])
    good = make_row(random.Random(0), 0, 5)
    with pytest.raises(ValueError, match=words):
        lm.open([good, Row(1, tokens, 9)])
    lm.open([good])
    tree = TokenTree.root(good.tokens[-1])
    assert error(lm.model, [good], [tree], lm.score([good], [tree])) < ROUNDED


# --- what the probe must see


def test_an_attention_that_takes_no_4d_mask_is_used_for_chains_only():
    """Flash attention ignores or misreads 4D masks."""
    AttentionInterface.register("maskless", sdpa_attention_forward)
    AttentionMaskInterface.register("maskless", sdpa_mask)
    lm = CausalLM(replace(FAMILIES["mistral-window"], attention="maskless").build())
    assert lm.chain_only
    assert "'maskless' takes no 4D mask" in lm.support.reason
    rng = random.Random(10)
    row = make_row(rng, 0, 13)
    lm.open([row])
    for _ in range(2):
        chain = random_chain(rng, row.tokens[-1], 4)
        assert error(lm.model, [row], [chain], lm.score([row], [chain])) < ROUNDED
        accept(lm, [row], [chain], [2], rng)
    with pytest.raises(ValueError, match=r"chains only .*maskless"):
        lm.score([row], [TokenTree((row.tokens[-1], 3, 4), (-1, 0, 0))])


def test_a_local_window_longer_than_the_probe_is_seen():
    """GPT-Neo's window of 256 slots passes any short probe and cuts siblings off 250 tokens later."""
    lm = CausalLM(FAMILIES["gpt_neo-local"].build(window_size=128))
    assert lm.chain_only
    assert "cache slots" in lm.support.reason


def test_a_window_in_the_config_of_a_model_without_windows_is_not_used():
    """Llama checkpoints converted from Mistral hold a sliding_window, which the model's code never reads."""
    lm = CausalLM(FAMILIES["llama"].build(sliding_window=WINDOW))
    rng = random.Random(12)
    row = make_row(rng, 0, 21)
    lm.open([row])
    tree = random_tree(rng, row.tokens[-1])
    assert error(lm.model, [row], [tree], lm.score([row], [tree])) < ROUNDED


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize(
    "types", [{"layer_types": ["full_attention"] * 4}, {"layer_types": ["sliding_attention", "full_attention"] * 2}]
)
def test_types_of_layers_in_the_config_of_a_model_without_them_are_not_used(name, types):
    """Such a model was handed a dict of masks, which its code cannot read: an AttributeError from the probe."""
    model = FAMILIES[name].build(**types, sliding_window=10**6)
    lm = CausalLM(model)
    assert lm.support.reason == ""
    rng = random.Random(12)
    row = make_row(rng, 0, 21)
    lm.open([row])
    tree = random_tree(rng, row.tokens[-1])
    assert error(lm.model, [row], [tree], lm.score([row], [tree])) < ROUNDED


@pytest.mark.parametrize("fault", [AttributeError("ndim"), KeyError("mask"), AssertionError("no")])
def test_code_that_fails_on_trees_is_used_for_chains_only(fault, monkeypatch):
    """Foreign code fails in more ways than by a ValueError, and a KeyError's text alone says nothing."""

    def forward(self, **inputs):
        if inputs.get("attention_mask") is not None:
            raise fault
        return plain_forward(self, **inputs)

    model = FAMILIES["llama"].build()
    plain_forward = type(model).forward
    forward.__signature__ = inspect.signature(plain_forward)
    monkeypatch.setattr(type(model), "forward", forward)
    lm = CausalLM(model)
    assert lm.chain_only
    assert f"fails on a small tree: {type(fault).__name__}: {fault}" in lm.support.reason


def without(model: Any, *names: str) -> Any:
    """``model`` with a forward that takes the arguments ``names`` and ignores them."""
    forward = model.forward
    signature = inspect.signature(forward)

    def ignoring(**inputs):
        return forward(**{name: value for name, value in inputs.items() if name not in names})

    ignoring.__signature__ = signature
    model.forward = ignoring
    return model


def test_a_model_that_ignores_the_cache_is_refused():
    """Chains are all that is left when trees fail; a model that fails these too must not answer."""
    with pytest.raises(UnsupportedModelError, match="small chain gave other logits"):
        CausalLM(without(FAMILIES["llama"].build(), "past_key_values"))


@pytest.mark.parametrize("name", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_positions_or_masks_is_used_for_chains_only(name):
    """Remote code may take both and do what it likes; chains in lockstep need neither."""
    lm = CausalLM(without(FAMILIES["llama"].build(), name))
    assert lm.chain_only
    assert "small tree gave other logits" in lm.support.reason


def test_a_vocabulary_of_five_tokens_is_enough():
    """The statistical tests enumerate such models: the probe once wanted eleven different tokens."""
    assert not CausalLM(FAMILIES["llama"].build(vocab_size=5)).chain_only


def test_the_probe_leaves_no_trace():
    """Its passes would count as the first request's."""
    lm = CausalLM(model_of("llama"))
    assert lm.num_passes == 0
    assert lm.model_s == 0.0


# --- power


def with_causal_mask(plan):
    """Every node sees all nodes before it."""
    return replace(plan, blocks=tuple(torch.ones_like(b).tril(b.shape[1] - b.shape[0]) for b in plan.blocks))


def with_slots_for_positions(plan):
    """Nodes stand at base + index instead of base + depth."""
    width = plan.positions.shape[1]
    positions = plan.positions.clone()
    for row, (base, depths) in enumerate(zip(plan.bases, plan.depths, strict=True)):
        positions[row, width - len(depths) :] = base + torch.arange(len(depths))
    return replace(plan, positions=positions)


def with_window_by_slots(plan):
    """Windows count slots."""
    return replace(plan, depths=tuple(torch.arange(len(d)) for d in plan.depths))


@pytest.mark.parametrize(
    ("name", "broken"),
    [(n, with_causal_mask) for n in ("llama", "gpt2", "gemma3", "llama4", "deepseek_v3", "gemma2")]
    + [(n, with_slots_for_positions) for n in ("llama", "gpt2", "gemma3", "gptj", "opt")]
    + [(n, with_window_by_slots) for n in ("mistral-window", "gemma3", "llama4")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_broken_masks_and_positions_are_seen(name, broken, monkeypatch):
    """The comparison of this module has power: each of these faults must exceed every tolerance by far."""
    rng = random.Random(11)
    lm, row = engine(FAMILIES[name]), make_row(rng, 0, 21)
    make_plan = specdec.engine.padded_pass.mask_plan
    monkeypatch.setattr(specdec.engine.padded_pass, "mask_plan", lambda *args: broken(make_plan(*args)))
    lm.open([row])
    tree = deep_tree(rng, row.tokens[-1])
    assert error(lm.model, [row], [tree], lm.score([row], [tree])) > max(1e-3, 10 * FAMILIES[name].tolerance)
