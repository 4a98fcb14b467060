"""Recorded passes against ordinary ones: a tape on a CPU that holds every address and number, as a CUDA graph does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import needs_gpu
from kernel_cases import kernel_cache, simulated  # noqa: F401
from kernel_models import FAMILIES as KERNEL_FAMILIES
from mutants import mutated
from rerun import Rerun
from tape import Tape, taped_kernels  # noqa: F401
from torch import Tensor
from torch.distributions import Distribution
from zoo import CHAIN, FAMILIES, TREE
from zoo_rows import accept, deep_tree, generated, make_row, model_of, random_chain, random_tree, scattered_node

import specdec
from specdec.cuda import graphs, static_pass
from specdec.cuda.graphs import GraphedPasses, GraphPool, graph_pool
from specdec.cuda.recording import Recorder
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.engine import attention, model_state
from specdec.engine.causal_lm import CausalLM
from specdec.errors import UnsupportedOptionError
from specdec.interfaces import Row, Scores
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY
from specdec.tree import TokenTree
from specdec.verifiers.match import MatchVerifier

pytestmark = pytest.mark.usefixtures("one_thread")

# Why a GPU's graph cannot hold them either; they take the ordinary path.
WAITS, ASKS = "would wait for the device", "asks how much the cache holds"
NOT_RECORDABLE = {
    "gemma3n": WAITS,
    "gpt_oss": WAITS,
    "mixtral": WAITS,
    "qwen2_moe": WAITS,
    "qwen3_moe": WAITS,
    "deepseek_v3": WAITS,
    "gemma3-vision": WAITS,
    "opt": ASKS,
    "falcon-rotary": ASKS,
    "llama4": ASKS,
    "llama4-vision": ASKS,
}
RECORDABLE = [family.name for family in TREE if family.name not in NOT_RECORDABLE]


@pytest.fixture(autouse=True)
def small_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows within a test, so that recordings go stale."""
    monkeypatch.setattr(graphs, "_MIN_CAPACITY", 64)
    monkeypatch.setattr(model_state, "_ATTRIBUTE", f"_specdec_states_{id(monkeypatch)}")  # nothing of other tests


def recorded(model: Any, recorders: Callable[[], Recorder] = Tape, **states: Any) -> CausalLM:
    """An engine whose passes are recorded."""
    return CausalLM(model, replays=GraphPool(model, recorders), **states)


def passes_of(lm: CausalLM) -> GraphedPasses:
    assert isinstance(lm.replay, GraphedPasses)
    return lm.replay


def play(lm: CausalLM, seed: int = 2) -> tuple[list[Scores], list[Tensor]]:
    """Ragged rows through trees of many sizes and by levels, through chains, and a row that leaves for one that joins.

    All scores, and at the end the kept keys and values of each row and layer.
    """
    rng = random.Random(seed)
    rows = [make_row(rng, key, size) for key, size in enumerate((21, 5, 13))]
    lm.open(rows)
    found: list[Scores] = []
    for sizes in ((14, 1, 7), (3, 9, 1), (6, 5, 14), (1, 14, 2), (1, 1, 1), (9, 3, 30), (12, 4, 31)):
        trees = [random_tree(rng, row.tokens[-1], size) for row, size in zip(rows, sizes, strict=True)]
        found += lm.score(rows, trees)
        accept(lm, rows, trees, [rng.randrange(size) for size in sizes], rng)
        if sizes[0] == 6:  # the middle row ends, and a new one joins with its prompt
            lm.close(rows[1:2])
            rows[1] = make_row(rng, 3, 11)
            lm.open(rows[1:2])
    found += by_levels(lm, rows, rng)
    for _ in range(3):  # deeper than the window; then as long as it takes for the cache to grow
        found += lm.score(rows, [deep_tree(rng, row.tokens[-1]) for row in rows])
        trees = [random_chain(rng, row.tokens[-1], 14) for row in rows]
        found += lm.score(rows, trees)
        accept(lm, rows, trees, [13] * len(rows), rng)
    return found, kept_states(lm, rows)


def by_levels(lm: CausalLM, rows: list[Row], rng: random.Random) -> list[Scores]:
    trees = [random_tree(rng, row.tokens[-1], 12, by_level=True) for row in rows]
    found, done = [], [0] * len(rows)
    for level in range(1, 7):
        sofar = [max(1, sum(d <= level for d in tree.depths())) for tree in trees]
        if any(now == before for now, before in zip(sofar, done, strict=True)):
            break
        parts = [TokenTree(t.tokens[:n], t.parents[:n]) for t, n in zip(trees, sofar, strict=True)]
        found += lm.score(rows, parts, done)
        done = sofar
    accept(lm, rows, parts, [scattered_node(part) for part in parts], rng)
    return found


def kept_states(lm: CausalLM, rows: list[Row]) -> list[Tensor]:
    lines = [lm._rows[row] for row in rows]
    buffers = [buffer for pair in lm._rows.cache.pairs if pair for buffer in pair]
    return [buffer[line.index, :, : line.length] for buffer in buffers for line in lines]


def difference(got: tuple[list[Scores], list[Tensor]], wanted: tuple[list[Scores], list[Tensor]]) -> float:
    """The largest of any logit, hidden state, feature, key or value; infinity for NaN."""
    pairs = list(zip(got[1], wanted[1], strict=True))
    for a, b in zip(got[0], wanted[0], strict=True):
        pairs.append((a.logits, b.logits))
        pairs += [
            (x, y) for x, y in ((a.hidden, b.hidden), (a.features, b.features)) if x is not None and y is not None
        ]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max().nan_to_num(torch.inf)) for a, b in pairs)


@pytest.mark.parametrize("name", RECORDABLE)
def test_replays_equal_ordinary_passes(name: str) -> None:
    """With other lengths, trees and rows than were recorded; features and hidden states with them."""
    states: dict[str, Any] = {"capture_hidden": True, "feature_layers": (0, 2)}
    lm = recorded(model_of(name), **states)
    got = play(lm)
    assert passes_of(lm).fault == ""
    assert passes_of(lm).num_replays > passes_of(lm).num_recordings > 3
    assert difference(got, play(CausalLM(model_of(name), **states))) < 10 * FAMILIES[name].tolerance


@pytest.fixture
def checked_distributions() -> Iterator[None]:
    """Gemma 3n's normal distribution checks its arguments; compiling any model switches that off for good."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("checked_distributions")
@pytest.mark.parametrize("name", NOT_RECORDABLE)
def test_a_model_that_cannot_be_recorded_takes_the_ordinary_path(name: str, caplog: pytest.LogCaptureFixture) -> None:
    lm = recorded(model_of(name))
    got = play(lm)
    assert NOT_RECORDABLE[name] in passes_of(lm).fault
    assert passes_of(lm).num_replays == 0
    assert difference(got, play(CausalLM(model_of(name)))) < 10 * FAMILIES[name].tolerance
    assert sum("no longer captured" in message for message in caplog.messages) == 1


def test_chain_only_models_are_left_alone() -> None:
    lm = recorded(CHAIN[0].build())
    row = make_row(random.Random(0), 0, 9)
    lm.open([row])
    lm.score([row], [TokenTree.chain(row.tokens[-1], [3, 4])])
    assert lm.replay is None


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
@pytest.mark.usefixtures("taped_kernels")
def test_replays_launch_the_kernel_with_what_is_in_its_buffers(family: str) -> None:
    """Lengths and bits come from memory: the launch itself, its grid and its numbers stay as recorded."""
    torch.manual_seed(0)
    model = KERNEL_FAMILIES[family]().eval()
    if "gpt-oss" in family:
        model.set_experts_implementation("batched_mm")
    attention.use_kernels(model)
    scores = []
    for lm in (CausalLM(model), recorded(model)):
        scores.append(short_play(lm))
    assert (passes_of(lm).fault, passes_of(lm).num_recordings, passes_of(lm).num_replays) == ("", 1, 3)
    for got, wanted in zip(*scores, strict=True):
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def short_play(lm: CausalLM) -> list[Scores]:
    rng = random.Random(5)
    rows = [Row(key, [rng.randrange(64) for _ in range(size)], 200) for key, size in enumerate((17, 4))]
    lm.open(rows)
    found: list[Scores] = []
    for sizes in ((3, 2), (4, 3), (2, 4), (4, 4)):
        trees = [
            TokenTree(tuple([row.tokens[-1], 1, 2, 3][:n]), (-1, 0, 0, 1)[:n])
            for row, n in zip(rows, sizes, strict=True)
        ]
        found += lm.score(rows, trees)
        lm.commit(rows, [(0, 1)] * 2)
        for row in rows:
            row.tokens += [1, rng.randrange(64)]
    return found


MUTATIONS = {
    "lengths of the host": (
        "lengths, places = self.mask.lengths.long()[:, None]",
        "lengths, places = torch.from_numpy(self._fields['lengths'].copy()).long()[:, None]",
    ),
    "one slot too few": ("places < lengths)", "places < lengths - 1)"),
    "positions are slots": ('kept + fields["query_depths"][row]', "row_pass.start + np.arange(num_columns)"),
    "earlier nodes count again": ("= inside[columns]", "= inside[: len(new)]"),
    "no tree": ("= tree.ancestors()", "= True"),
    "padding among the kept": ("row_pass.start + np.arange(num_columns)\n", "(row_pass.start + np.arange(num_columns)) % 40\n"),
    "windows count slots": ("lengths + self.mask.node_depths)", "area)"),
    "outputs are not copied": ("t[:, :num_columns].clone()", "t[:, :num_columns]"),
    "the last columns": ("logits[row, num_new - num_nodes : num_new]", "logits[row, num_columns - num_nodes :]"),
    "nothing is brought to the device": (
        "self._device.copy_(self._host, non_blocking=True)",
        "self._device.copy_(self._host) if not self._device.any() else None",
    ),
}  # fmt: skip


def with_mutant(monkeypatch: pytest.MonkeyPatch, mutant: ModuleType) -> None:
    for name in ("StepInputs", "PassOutput", "recordable"):
        monkeypatch.setattr(graphs, name, getattr(mutant, name))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_pass_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that holds a length, or an input that is filled wrongly, must show in what ``play`` compares."""
    with_mutant(monkeypatch, mutated(static_pass, *MUTATIONS[name]))
    monkeypatch.setattr(graphs, "_lengths", lambda _: [])  # else the check would find it first
    wanted = play(CausalLM(model_of("mistral-window")))
    assert difference(play(recorded(model_of("mistral-window"))), wanted) > 1e-3


def test_the_pass_that_the_mutants_change_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    with_mutant(monkeypatch, mutated(static_pass, "places < lengths)", "lengths > places)"))
    wanted = play(CausalLM(model_of("mistral-window")))
    assert difference(play(recorded(model_of("mistral-window"))), wanted) < 1e-5


def test_recordings_of_a_cache_that_grew_are_dropped() -> None:
    """Their addresses are those of buffers that nobody reads any more."""
    lm = recorded(model_of("llama"))
    play(lm)
    shapes = passes_of(lm)._recorded
    assert {shape.capacity for shape in shapes} == {lm._rows.cache.capacity} == {256}
    assert passes_of(lm).num_recordings > passes_of(lm).num_bytes == len(shapes)


def test_a_replay_that_holds_a_length_is_noticed_while_decoding(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model's own code may hold one, too: the first replay at other lengths is compared with an ordinary pass."""
    with_mutant(monkeypatch, mutated(static_pass, *MUTATIONS["lengths of the host"]))
    lm = recorded(model_of("llama"))
    assert difference(play(lm), play(CausalLM(model_of("llama")))) < 1e-5
    assert passes_of(lm).fault == "a replay gave other logits than an ordinary pass"
    assert "no longer captured" in caplog.text


class Chains:
    """A drafter of chains of any length, some of them right."""

    name = "chains"

    def __init__(self, answers: dict[int, list[int]]) -> None:
        self.answers = answers
        self.rng = random.Random(3)

    def begin(self, rows: Any) -> None: ...

    def observe(self, *_: Any) -> None: ...

    def end(self, rows: Any) -> None: ...

    def propose(self, rows: Any, limits: Any, *_: Any) -> list[TokenTree]:
        return [self.tree(row, min(limit.depth, limit.nodes)) for row, limit in zip(rows, limits, strict=True)]

    def tree(self, row: Row, depth: int) -> TokenTree:
        size = self.rng.randrange(depth + 1)
        tokens = self.answers[row.key][len(row.tokens) :][:size]
        return TokenTree.chain(row.tokens[-1], [t if self.rng.random() < 0.8 else 5 for t in tokens])


def decode(lm: CausalLM, answers: dict[int, list[int]], rows: list[Row]) -> dict[int, list[int]]:
    decoder = Decoder(lm, Chains(answers), MatchVerifier(), WarperTransform(GREEDY), PhiloxRng(1), lambda _: False)
    for _ in decoder.run(rows):
        pass
    return {row.key: row.tokens for row in rows}


def rows_of(seed: int) -> list[Row]:
    return [make_row(random.Random(seed + key), key, size, room=30 + key) for key, size in enumerate((21, 5, 13))]


def test_the_next_engine_on_a_model_uses_what_the_last_one_recorded() -> None:
    """generate() builds an engine at every call; recordings and their cache go from one to the next, never to two."""
    model = model_of("llama")
    answers = {row.key: generated(model, row) for row in rows_of(4)}
    first, second = (recorded(model) for _ in range(2))
    assert decode(first, answers, rows_of(4)) == answers
    num_recordings = passes_of(first).num_recordings
    assert decode(second, answers, rows_of(4)) == answers
    assert second.replay is first.replay
    assert passes_of(second).num_recordings <= num_recordings + 2  # a bucket that the first happened not to need
    third = recorded(model)
    second.open(rows_of(4))
    third.open(rows_of(4))
    assert second.replay is not third.replay
    with torch.inference_mode():
        fourth = recorded(model)
        fourth.open(rows_of(4))
        assert fourth.replay is not first.replay


def test_old_recordings_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MAX_RECORDINGS", 2)
    lm = recorded(model_of("llama"))
    got = play(lm)
    assert len(passes_of(lm)._recorded) == passes_of(lm).num_bytes == 2
    assert difference(got, play(CausalLM(model_of("llama")))) < 1e-5


def test_a_function_that_runs_again_is_a_recorder() -> None:
    """What the benchmark's dry run uses."""
    got = play(recorded(model_of("llama"), Rerun))
    assert difference(got, play(CausalLM(model_of("llama")))) < 1e-5


def test_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"CUDA graphs need a model on one GPU .* tensors are on cpu"):
        graph_pool(model_of("llama"))
    with pytest.raises(UnsupportedOptionError, match="leave cuda_graphs out"):
        specdec.generate(model_of("llama"), torch.tensor([[3, 4]]), max_new_tokens=3, cuda_graphs=True)


def test_a_copy_for_the_kernels_shares_every_weight() -> None:
    model = model_of("llama")
    ours = attention.attention_copy(model)
    assert ours.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == "sdpa"
    assert all(a is b for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    assert attention.attention_copy(model) is ours
    assert attention.attention_copy(ours) is ours


@pytest.mark.parametrize("family", [pytest.param(name, marks=needs_gpu) for name in KERNEL_FAMILIES])
def test_graphs_on_a_gpu_equal_ordinary_passes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "cupy")
    torch.manual_seed(0)
    model = KERNEL_FAMILIES[family]().eval().to("cuda")
    if "gpt-oss" in family:
        model.set_experts_implementation("batched_mm")
    attention.use_kernels(model)
    lm = CausalLM(model, replays=graph_pool(model))
    scores = [short_play(engine) for engine in (lm, CausalLM(model))]
    assert (passes_of(lm).fault, passes_of(lm).num_recordings, passes_of(lm).num_replays) == ("", 1, 3)
    for got, wanted in zip(*scores, strict=True):
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-3, atol=1e-3)
