"""What may happen to a model or around it while an engine uses it: threads, other modes, other settings."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tinychat
import torch
from trained import random_eagle, tiny_target
from zoo import FAMILIES

import specdec
from specdec.drafters.heads.eagle_format import save_eagle
from specdec.engine.causal_lm import CausalLM
from specdec.engine.hidden_states import HiddenStateHooks
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row, Scores
from specdec.tree import TokenTree

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (0, 1, 3)


def small(**options: Any) -> Any:
    return tinychat.make_model(num_hidden_layers=4, **options)


def watching(model: Any) -> CausalLM:
    return CausalLM(model, capture_hidden=True, feature_layers=LAYERS)


def step(engine: CausalLM, row: Row) -> Scores:
    """Score a tree behind ``row`` and keep its first branch."""
    root = row.tokens[-1]
    scores = engine.score([row], [TokenTree((root, root + 1, root + 2), (-1, 0, 0))])[0]
    engine.commit([row], [[0, 1]])
    row.tokens += [root + 1, root + 3]
    return scores


def run(engine: CausalLM, first: int, num_steps: int = 1) -> list[Scores]:
    row = Row(0, [first, first + 1, first + 2], 200)
    engine.open([row])
    found = [step(engine, row) for _ in range(num_steps)]
    engine.close([row])
    return found


def assert_same(found: list[Scores], expected: list[Scores]) -> None:
    for got, want in zip(found, expected, strict=True):
        for name in ("logits", "hidden", "features"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4)


# --- threads


class Gate:
    """A hook that holds up every thread but the main one, until it is opened."""

    def __init__(self) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.is_reached.set()
            assert self.is_open.wait(60)


def test_a_pass_of_another_thread_in_the_middle_of_a_pass_changes_no_features() -> None:
    """Hooks hang on the model, which both engines share: each engine once took what the other one's pass had shown."""
    model, gate = small(), Gate()
    first, second = watching(model), watching(model)
    expected = run(first, 10), run(second, 50)
    model.model.layers[2].register_forward_pre_hook(gate)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, first, 10)
        try:
            assert gate.is_reached.wait(60)
            assert_same(run(second, 50), expected[1])
        finally:
            gate.is_open.set()
        assert_same(running.result(), expected[0])


def test_a_hook_may_go_when_another_thread_is_about_to_call_it() -> None:
    """torch has noted by then that it will call the hook, and has forgotten that it takes keywords."""
    model, gate = small(), Gate()
    model.model.layers[0].register_forward_pre_hook(gate)
    engine = CausalLM(model)
    with ThreadPoolExecutor(1) as pool:
        try:
            with HiddenStateHooks(model, hidden=True, layers=(0,)):
                running = pool.submit(run, engine, 10)
                assert gate.is_reached.wait(60)
        finally:
            gate.is_open.set()
        assert running.result()


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads that take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_engines_on_one_model_run_in_threads_as_they_do_alone() -> None:
    """Hooks come and go while other threads call the modules that they hang on."""
    model, starts = small(), (10, 50, 90, 130)
    engines = [watching(model) for _ in starts]
    expected = [run(engine, start, 12) for engine, start in zip(engines, starts, strict=True)]
    with ThreadPoolExecutor(len(starts)) as pool:
        for found, alone in zip(pool.map(run, engines, starts, [12] * len(starts)), expected, strict=True):
            assert_same(found, alone)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("accelerate", [False, True])
def test_calls_of_generate_on_one_model_run_in_threads(accelerate: bool, tmp_path: Path) -> None:
    model = tiny_target(vocab=200, layers=4, size=256)  # large enough for packed layers
    save_eagle(random_eagle(model), tmp_path)
    prompts = [torch.arange(first, first + 6)[None] for first in (10, 50, 90, 130)]

    def generated(ids: torch.Tensor) -> torch.Tensor:
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        drafter = f"eagle:path={tmp_path}"
        return specdec.generate(model, ids, drafter=drafter, accelerate=accelerate, adaptive=False, **options)  # type: ignore[no-any-return]

    expected = [generated(ids) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for found, alone in zip(pool.map(generated, prompts), expected, strict=True):
            assert torch.equal(found, alone)


def test_a_capture_that_cannot_begin_leaves_no_hook() -> None:
    model = small()
    capture = HiddenStateHooks(model, hidden=True, layers=(0,))
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="no list of 4 decoder layers"), capture:
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- a model that changes


def use_eager(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "undo", "message"),
    [
        (use_eager, lambda model: model.set_attn_implementation("sdpa"), "attention 'eager' instead of 'sdpa'"),
        (lambda model: model.train(), lambda model: model.eval(), "training True instead of False"),
        (lambda model: model.double(), lambda model: model.float(), r"dtype torch\.float64 instead of torch\.float32"),
    ],
    ids=["attention", "mode", "dtype"],
)
def test_an_engine_names_what_was_changed_below_it(
    change: Callable[[Any], Any], undo: Callable[[Any], Any], message: str
) -> None:
    """Eager attention adds masks up; to one made for sdpa it answered with wrong logits and without a word."""
    model = small()
    engine, row = CausalLM(model), Row(0, [9, 8, 3], 40)
    engine.open([row])
    change(model)
    with pytest.raises(ValueError, match=rf"changed after its engine was built \({message}\); .* build another engine"):
        step(engine, row)
    renewed = run(CausalLM(model), 10)[0].logits
    undo(model)
    step(engine, row)
    torch.testing.assert_close(renewed.float(), run(CausalLM(model), 10)[0].logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_model_in_training_mode_that_cannot_be_verified_says_so(is_checkpointed: bool) -> None:
    """Dropout draws anew in every pass, and gradient checkpointing drops the cache; what eval() said before is no help."""
    model = small(attention_dropout=0.0 if is_checkpointed else 0.5)
    CausalLM(model)
    model.train()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match=r"training mode: call model\.eval\(\)"):
        CausalLM(model)
    model.eval()
    CausalLM(model)


# --- modes of torch


@pytest.mark.parametrize("num_before", [1, 40])
def test_an_engine_may_leave_inference_mode_and_come_back(num_before: int) -> None:
    """A cache made in that mode could not be written to outside; after 40 steps it has grown there."""
    model = small()
    expected = run(watching(model), 10, num_before + 2)
    engine, row = watching(model), Row(0, [10, 11, 12], 200)
    engine.open([row])
    with torch.inference_mode():
        found = [step(engine, row) for _ in range(num_before)]
    found.append(step(engine, row))
    with torch.inference_mode():
        found.append(step(engine, row))
    assert_same(found, expected)


def test_an_engine_may_leave_autocast() -> None:
    """The cache once kept the narrow dtype of its first pass, and attention then met two dtypes."""
    model = small()
    expected = run(CausalLM(model), 10)[0].logits
    engine = CausalLM(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(engine, 10)[0].logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(run(engine, 10)[0].logits, expected)


def test_the_rounding_of_autocast_is_not_taken_for_an_error_of_the_model() -> None:
    model = FAMILIES["phi3"].build().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert CausalLM(model).support.reason == ""
