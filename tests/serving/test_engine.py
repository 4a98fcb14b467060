"""What a user of the engine sees: answers, streams, ends, errors, and rows that come and go."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from crowd import NUM_NEW, SETTINGS, VOCAB, Case, alone, crowd, crowd_model, differing, engine
from torch import Tensor

from specdec.engine.kv_memory import parse_memory
from specdec.serving.engine import Engine, QueueFullError
from specdec.serving.request import FinishReason, RequestSettings

LONG = RequestSettings(max_new_tokens=400, stop_token_ids=())


class Letters:
    """A tokenizer whose tokens are one character each; 63 is half of one that takes two, 62 is special."""

    def __call__(self, text: str) -> Any:
        return type("Encoded", (), {"input_ids": [ord(c) - 64 for c in text]})

    def decode(self, tokens: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        data = b"".join(b"" if t == 62 else b"\xc3" if t == 63 else bytes([t + 64]) for t in tokens)
        return data.decode("utf-8", errors="replace")


def test_deltas_make_the_answer() -> None:
    prompt = crowd()[0]
    with engine(Case(), tokenizer=Letters()) as made:
        handle = made.submit(prompt, SETTINGS[0.0], request_id="mine")
        deltas = list(handle)
        completion = handle.result()
        assert [t for delta in deltas for t in delta.tokens] == completion.tokens == alone(tuple(prompt), 0.0)
        assert [delta.finish_reason for delta in deltas][:-1] == [None] * (len(deltas) - 1)
        assert "".join(delta.text for delta in deltas) == completion.text
        assert completion.request_id == handle.request_id == "mine"
        assert completion.finish_reason == "length"
        assert completion.stats.num_tokens == NUM_NEW
        assert list(handle) == deltas  # another reader sees all of it
        assert 0 < completion.first_token_s <= completion.total_s
        assert handle.done
        handle.cancel()
        assert handle.result() is completion


def test_coroutines_read_it_as_well() -> None:
    async def read(made: Engine) -> None:
        handles = [made.submit(prompt, SETTINGS[0.0]) for prompt in crowd()]
        texts = await asyncio.gather(*(collected(handle) for handle in handles))
        assert texts == [(await handle).tokens for handle in handles] == [alone(tuple(p), 0.0) for p in crowd()]

    async def collected(handle: Any) -> list[int]:
        return [token async for delta in handle for token in delta.tokens]

    with engine(Case()) as made:
        asyncio.run(read(made))


def test_many_threads_submit_at_once() -> None:
    prompts = crowd(num_alone=30)
    with engine(Case()) as made, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda prompt: made.submit(prompt, SETTINGS[0.0]).result(60).tokens, prompts))
    assert found == [alone(tuple(prompt), 0.0) for prompt in prompts]


@pytest.mark.parametrize("drafter", ["none", "model:shape=chain"])
def test_end_tokens_and_stop_strings(drafter: str) -> None:
    prompt = crowd()[1]
    whole = alone(tuple(prompt), 0.0)
    at = next(i for i in range(5, NUM_NEW) if whole[i] not in whole[:i] and whole[i] < 62)
    text = Letters().decode(whole, True, False)
    stop = Letters().decode(whole[: at + 1], True, False)[-2:]
    with engine(Case(drafter, adaptive=False), tokenizer=Letters()) as made:
        by_token, by_text, late = made.run(
            [prompt] * 3,
            [
                RequestSettings(max_new_tokens=NUM_NEW, stop_token_ids=[whole[at]]),
                RequestSettings(max_new_tokens=NUM_NEW, stop_token_ids=(), stop=[stop]),
                RequestSettings(max_new_tokens=at + 1, stop_token_ids=(), stop=["never " * 3]),
            ],
        )
    assert by_token.tokens == whole[: at + 1]
    assert by_text.text == text[: text.index(stop)]
    assert by_text.tokens == whole[: len(by_text.tokens)]
    assert late.text == Letters().decode(whole[: at + 1], True, False)
    assert [c.finish_reason for c in (by_token, by_text, late)] == ["stop", "stop", "length"]


def test_logprobs_are_the_models_own() -> None:
    prompt = crowd()[2]
    with engine(Case("model:shape=best-first", adaptive=False)) as made:
        settings = RequestSettings(max_new_tokens=12, stop_token_ids=(), temperature=2.0, seed=1, logprobs=3)
        completion = made.run([prompt], settings)[0]
    ids = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        expected = crowd_model()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(completion.logprobs) == 12
    for token, found, row in zip(completion.tokens, completion.logprobs, expected, strict=True):
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [t for t, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_processors_belong_to_their_request() -> None:
    def no_even(ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.shape[0] == scores.shape[0] == 1
        return scores.masked_fill(torch.arange(VOCAB) % 2 == 0, -torch.inf)

    with engine(Case("hybrid")) as made:
        odd = RequestSettings(
            max_new_tokens=20, stop_token_ids=(), logits_processors=[no_even], temperature=1.0, seed=3
        )
        first, second = made.run([crowd()[0]] * 2, [odd, SETTINGS[1.0]])
        assert all(token % 2 for token in first.tokens)
        assert second.tokens == alone(tuple(crowd()[0]), 1.0)


@pytest.mark.parametrize("when", [0, 5])
def test_one_failing_request_leaves_the_others_alone(when: int) -> None:
    calls = []

    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > when:
            raise RuntimeError("by design")
        return scores

    with engine(Case("model:shape=best-first")) as made:
        bad = RequestSettings(max_new_tokens=20, stop_token_ids=(), logits_processors=[fails])
        others = [made.submit(prompt, SETTINGS[1.0]) for prompt in crowd()[:3]]
        handle = made.submit(crowd()[4], bad)
        with pytest.raises(RuntimeError, match="by design"):
            handle.result(30)
        with pytest.raises(RuntimeError, match="by design"):
            list(handle)
        assert [other.result(30).tokens for other in others] == [alone(tuple(p), 1.0) for p in crowd()[:3]]
        assert not differing(made, crowd())
        assert made.metrics().requests_finished["error"] == 1  # type: ignore[index]


def test_a_broken_model_ends_what_runs_and_nothing_else() -> None:
    with engine(Case()) as made:
        true_score = made._target.score

        def score(*args: Any) -> Any:
            made._target.score = true_score  # type: ignore[method-assign]
            raise MemoryError("by design")

        made._target.score = score  # type: ignore[method-assign]
        with pytest.raises(MemoryError, match="by design"):
            made.submit(crowd()[0], SETTINGS[0.0]).result(30)
        assert not differing(made, crowd())


def test_cancelled_requests_make_room() -> None:
    with engine(Case(num_blocks=400), max_rows=2) as made:
        long = [made.submit([i + 1], LONG) for i in range(4)]
        next(iter(long[0]))
        waiting = made.submit(crowd()[0], SETTINGS[0.0])
        for handle in long:
            handle.cancel()
        assert waiting.result(30).tokens == alone(tuple(crowd()[0]), 0.0)
        assert [handle.result(30).finish_reason for handle in long] == [FinishReason.CANCELLED] * 4
        assert len(long[0].result().tokens) > 0
        assert long[3].result().tokens == []


def test_nobody_waits_for_ever() -> None:
    """A request of low priority beside a stream of others that are preferred."""
    with engine(Case(), max_rows=1) as made:
        first = made.submit([1], RequestSettings(max_new_tokens=40, stop_token_ids=()))
        low = made.submit([2], RequestSettings(max_new_tokens=2, stop_token_ids=(), priority=-1))
        high = [
            made.submit([3 + i], RequestSettings(max_new_tokens=2, stop_token_ids=(), priority=1)) for i in range(40)
        ]
        low.result(30)
        assert 12 <= sum(handle.done for handle in high) < 40
        assert first.done


def test_a_long_prompt_does_not_hold_others_up() -> None:
    """Chunks of a prompt ride with the steps of rows that are further."""
    long_prompt = [i % 60 + 1 for i in range(900)]
    with engine(Case("none", budget=64, num_blocks=200), max_nodes=0) as made:
        scheduler, target = made._scheduler, made._target
        short = made._job([5], RequestSettings(max_new_tokens=30, stop_token_ids=()), None)
        scheduler.add(short)
        scheduler.step()
        long = made._job(list(long_prompt), RequestSettings(max_new_tokens=4, stop_token_ids=()), None)
        scheduler.add(long)
        known, num_steps = 0, 0
        while not long.row.num_emitted:
            emissions = scheduler.step().emissions
            num_steps += 1
            assert short in [job for job, _ in emissions]
            assert target.num_kept(long.row) - known <= 64
            known = target.num_kept(long.row)
        assert num_steps == 15  # 899 tokens, 63 beside each step of the other
        while scheduler.running:
            scheduler.step()
        assert short.row.tokens[1:] == alone((5,), 0.0, 30)
        assert long.row.tokens[900:] == alone(tuple(long_prompt), 0.0, 4)


def test_prompts_that_begin_alike_are_computed_once() -> None:
    prompts = crowd(num_alone=0, num_alike=12, common=200)
    with engine(Case(num_blocks=400), max_rows=12) as made:
        assert not differing(made, prompts, [0.0])
        metrics = made.metrics()
    assert metrics.cached_tokens >= 11 * 192
    assert metrics.prompt_tokens == sum(map(len, prompts))


def test_a_second_turn_computes_only_what_is_new() -> None:
    with engine(Case(num_blocks=200)) as made:
        first = made.run([crowd()[0]], SETTINGS[0.0])[0]
        turn = [*first.prompt_tokens, *first.tokens, 7, 8, 9]
        second = made.run([turn], SETTINGS[0.0])[0]
    assert second.num_cached == len(turn) - 4  # the last answer's newest token was never read
    assert second.tokens == alone(tuple(turn), 0.0)


def test_closing_lets_requests_finish_or_ends_them() -> None:
    with engine(Case()) as made:
        handle = made.submit(crowd()[0], SETTINGS[0.0])
    assert handle.result(0).tokens == alone(tuple(crowd()[0]), 0.0)
    with pytest.raises(RuntimeError, match="closed"):
        made.submit([1])
    made = Engine(crowd_model(), accelerate=False, kv_memory="1MB", drafter="none")
    handles = [made.submit([i + 1], RequestSettings(max_new_tokens=900, stop_token_ids=())) for i in range(3)]
    next(iter(handles[0]))
    made.close(timeout=0)
    assert {handle.result(5).finish_reason for handle in handles} == {FinishReason.CANCELLED}
    assert all(thread.name != "specdec engine" for thread in threading.enumerate())


def test_an_error_in_the_with_block_ends_requests_at_once() -> None:
    started = time.monotonic()

    def fail() -> None:
        with engine(Case(num_blocks=400)) as made:
            made.submit([1], LONG)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "at least one prompt token"),
        ([64], {}, r"\[0, 64\)"),
        ([1, "a"], {}, "a token id of the prompt must be a whole number"),
        ("text", {}, "needs a tokenizer"),
        ([1], {"max_new_tokens": 5000}, "the key-value cache holds 1599"),
        ([1], {"stop": ["x"]}, "stop strings need a tokenizer"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(prompt: Any, settings: dict[str, Any], message: str) -> None:
    with engine(Case()) as made, pytest.raises(ValueError, match=message):
        made.submit(prompt, RequestSettings(**settings))


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"temperature": -1}, {"temperature": "hot"},
        {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_k": -1}, {"temperature": 1.0, "min_p": 2.0},
        {"seed": -1}, {"stop": "text"}, {"stop": [""]}, {"logprobs": 21}, {"logprobs": -1},
    ],
)  # fmt: skip
def test_bad_settings_name_their_field(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(values)[-1]} must"):
        RequestSettings(**values)


def test_too_many_waiting_requests_are_refused() -> None:
    with engine(Case(num_blocks=400), max_rows=1, max_waiting=2) as made:
        handles = [made.submit([1], LONG)]
        next(iter(handles[0]))
        handles += [made.submit([1], LONG) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            made.submit([1], LONG)
        for handle in handles:
            handle.cancel()


@pytest.mark.parametrize(("text", "expected"), [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), (77, 77), ("12", 12)])
def test_amounts_of_memory(text: Any, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "2 parsecs", "0"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="kv_memory must be a number of bytes or text"):
        parse_memory(text)
