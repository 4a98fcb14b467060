"""Streamers: served whichever call they were given to, and ended whatever happens, so that no reader waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tinychat import make_model, make_tokenizer
from tinyllama import Collector, tiny
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import specdec

IDS = torch.tensor([[8, 9, 10, 8, 9, 10, 8, 9]])
TWO = torch.tensor([[0, 0, 0, 5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8]])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny(0)


def settings(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 10, "do_sample": False, **changes}


def by_wrapper(model: Any, ids: Tensor, streamer: Any, **options: Any) -> Any:
    return specdec.generate(model, ids, streamer=streamer, **options)


def by_hook(model: Any, ids: Tensor, streamer: Any, **options: Any) -> Any:
    return model.generate(ids, streamer=streamer, custom_generate=specdec.custom_generate("ngram"), **options)


def by_loop(model: Any, ids: Tensor, streamer: Any, **options: Any) -> Any:
    loop = specdec.custom_generate("ngram", streamer=streamer)
    return model.generate(ids, custom_generate=loop, **options)


def by_function(model: Any, ids: Tensor, streamer: Any, **options: Any) -> Any:
    loop = specdec.custom_generate("ngram")
    return model.generate(ids, streamer=streamer, custom_generate=lambda *a, **k: loop(*a, **k), **options)


Way = Callable[..., Any]
ways = pytest.mark.parametrize("way", [by_wrapper, by_hook, by_loop, by_function])


@ways
@pytest.mark.parametrize("ids", [IDS, TWO], ids=["one row", "two rows"])
def test_a_streamer_sees_the_same_whichever_call_it_was_given_to(model: Any, way: Way, ids: Tensor) -> None:
    """model.generate drops it on the way to its hook: it got the prompt, no token and no end."""
    expected, found = Collector(), Collector()
    mask = (ids != 0).long()
    out = model.generate(ids, attention_mask=mask, streamer=expected, **settings())
    for repetition in (1, 2):
        found.parts.clear()
        assert torch.equal(way(model, ids, found, attention_mask=mask, **settings()), out)
        assert found.parts == expected.parts
        assert found.ended == repetition


@ways
def test_a_reader_in_another_thread_gets_the_text_and_its_end(way: Way) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    ids = tokenizer("abc abc abc ab", return_tensors="pt").input_ids
    texts = []
    for run in (lambda m, i, s, **k: m.generate(i, streamer=s, **k), way):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, model, ids, streamer, **settings(eos_token_id=None))
            texts.append("".join(streamer))
            running.result()
    assert texts[0] == texts[1] != ""


def test_a_streamer_given_twice_is_refused_and_ended(model: Any) -> None:
    first, second = Collector(), Collector()
    loop = specdec.custom_generate("ngram", streamer=first)
    with pytest.raises(ValueError, match="not to both"):
        model.generate(IDS, streamer=second, custom_generate=loop, **settings())
    assert (first.ended, second.ended) == (1, 1)


def test_a_streamer_for_one_row_refuses_two_as_in_generate(model: Any) -> None:
    for run in (model.generate, lambda *a, **k: specdec.generate(model, *a, **k)):
        with pytest.raises(ValueError, match="batch size 1"):
            run(TWO, attention_mask=(TWO != 0).long(), streamer=TextStreamer(make_tokenizer()), **settings())


class Fails(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if input_ids.shape[1] > 11:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Excludes(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -float("inf")) if input_ids.shape[1] > 11 else scores


class Breaks(Collector):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.parts) == 3:
            raise BrokenPipeError("nobody listens")

    def end(self) -> None:
        super().end()
        raise BrokenPipeError("nobody listens to the end either")


ERRORS: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "a criterion": ({"stopping_criteria": StoppingCriteriaList([Fails(ZeroDivisionError())])}, ZeroDivisionError),
    "the keyboard": ({"stopping_criteria": StoppingCriteriaList([Fails(KeyboardInterrupt())])}, KeyboardInterrupt),
    "a processor": ({"logits_processor": LogitsProcessorList([Excludes()])}, ValueError),
    "a refused option": ({"output_attentions": True, "return_dict_in_generate": True}, ValueError),
    "a refused input": ({"labels": IDS}, ValueError),
}


@ways
@pytest.mark.parametrize(("options", "kind"), ERRORS.values(), ids=list(ERRORS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_streamer_is_ended_once_when_an_error_ends_the_call(
    model: Any, way: Way, options: dict[str, Any], kind: type[BaseException]
) -> None:
    """generate() itself leaves whoever reads from it waiting."""
    streamer = Collector()
    with pytest.raises(kind):
        way(model, IDS, streamer, **settings(eos_token_id=None, **options))
    assert streamer.ended == 1


BEFORE: list[dict[str, Any]] = [
    {"drafter": "nonesuch"}, {"drafter": None}, {"max_nodes": None}, {"seed": -1}, {"draft_model": "gpt2"}, {"stop_strings": "x"},
    {"attention_mask": torch.ones(1, 9)}, {"num_beams": 2}, {"max_new_tokens": 0}, {"nonsense": 3}, {"assistant_model": tiny(1, 1)},
    {"on_step": "print"}, {"drafter": "ngram", "draft_model": tiny(1, 1)},
]  # fmt: skip


@pytest.mark.parametrize("options", BEFORE, ids=lambda o: "+".join(o))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_ended_by_an_error_before_anything_runs_too(model: Any, options: dict[str, Any]) -> None:
    streamer = Collector()
    with pytest.raises(ValueError, match=r"."):
        specdec.generate(model, IDS, streamer=streamer, **settings(**options))
    assert streamer.ended == 1


@ways
def test_an_error_of_the_streamer_is_the_one_that_is_raised(model: Any, way: Way) -> None:
    """A second error from its end() must not hide it."""
    streamer = Breaks()
    with pytest.raises(BrokenPipeError, match=r"nobody listens$"):
        way(model, IDS, streamer, **settings(eos_token_id=None))
    assert streamer.ended == 1


def test_a_call_inside_another_ones_criterion_keeps_its_own_streamer(model: Any) -> None:
    """The frames of both calls are on the stack; each loop belongs to the nearest."""
    outer, inner = Collector(), Collector()

    def nested(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if ids.shape[1] == IDS.shape[1] + 1:
            by_hook(model, IDS, inner, **settings(eos_token_id=None))
            by_hook(model, IDS, None, **settings(eos_token_id=None))
        return torch.zeros(len(ids), dtype=torch.bool)

    given = settings(eos_token_id=None)
    out = by_hook(model, IDS, outer, stopping_criteria=[nested], **given)
    for streamer in (outer, inner):
        assert [token for part in streamer.parts for token in part] == out[0].tolist()
        assert streamer.ended == 1
