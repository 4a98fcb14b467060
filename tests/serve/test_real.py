"""The server on the real engine: its answers are those of the library, whoever else asks at the same time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from served import HELLO, Served, events_of, until
from tinychat import make_model, make_tokenizer

import specdec
from specdec.serve.limits import Limits
from specdec.serve.service import Defaults
from specdec.serving.engine import Engine

TOKENIZER = make_tokenizer()
MODEL = make_model()
QUESTIONS = ["aaa bbb aaa bbb", "for i in x: print(i)", "hello hello hello", "é ü 日本", "abc abc abd", "0 1 2 3 0 1 2"]


@pytest.fixture(scope="module")
def served(one_thread: None) -> Iterator[Served]:
    with (
        Engine(
            MODEL, tokenizer=TOKENIZER, drafter="ngram", accelerate=False, adaptive=False, max_nodes=6, max_rows=4
        ) as engine,
        Served(engine, Limits(grace_s=0), Defaults(end_ids=(256,))) as server,
    ):
        yield server


def prompt_of(question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return list(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def expected(question: str, num_tokens: int, **options: Any) -> list[int]:
    """What the library answers."""
    ids = torch.tensor([prompt_of(question)])
    out = specdec.generate(MODEL, ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options)
    return out[0, ids.shape[1] :].tolist()


def ask(served: Served, question: str, num_tokens: int = 40, **fields: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return served.chat(messages=messages, max_tokens=num_tokens, return_token_ids=True, **fields).json


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5},
         {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5}),
        ({"temperature": 0, "repetition_penalty": 1.3}, {"do_sample": False, "repetition_penalty": 1.3}),
    ],
    ids=["greedy", "sampled", "penalised"],
)  # fmt: skip
def test_tokens_are_the_librarys_whoever_else_asks(served: Served, fields: Any, options: Any) -> None:
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda question: ask(served, question, **fields), QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer["prompt_token_ids"] == prompt_of(question)
        assert answer["choices"][0]["token_ids"] == expected(question, 40, **options)


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"temperature": 1.2}, {"top_k": None}, {"logits_processors": ()}], ids=lambda change: next(iter(change))
)  # fmt: skip
def test_a_server_that_mistakes_a_field_is_caught(
    served: Served, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """The comparison with the library must notice each of these."""
    settings = served.service._settings
    monkeypatch.setattr(served.service, "_settings", lambda *asked: replace(settings(*asked), **change))
    fields = {"temperature": 0.9, "top_k": 5, "seed": 5, "repetition_penalty": 1.5}
    own = [expected(question, 40, do_sample=True, **fields) for question in QUESTIONS[:3]]
    assert [ask(served, question, **fields)["choices"][0]["token_ids"] for question in QUESTIONS[:3]] != own
    monkeypatch.undo()
    assert [ask(served, question, **fields)["choices"][0]["token_ids"] for question in QUESTIONS[:3]] == own


def test_tokens_are_the_librarys_when_memory_runs_short(one_thread: None) -> None:
    """Requests lose their rows and are taken up again; nobody may notice."""
    with (
        Engine(MODEL, tokenizer=TOKENIZER, drafter="ngram", accelerate=False, max_rows=6, kv_memory=150_000) as engine,
        Served(engine, defaults=Defaults(end_ids=(256,))) as served,
        ThreadPoolExecutor(len(QUESTIONS)) as pool,
    ):
        answers = list(pool.map(lambda question: ask(served, question, 120, temperature=0, ignore_eos=True), QUESTIONS))
        assert served.metric("vllm:num_preemptions_total") > 0
        assert served.metric("vllm:request_queue_time_seconds_sum") > 0, "there are fewer rows than requests"
        assert served.metric("vllm:kv_cache_usage_perc") == 0, "what is kept for later requests is not in use"
        for question, answer in zip(QUESTIONS, answers, strict=True):
            own = expected(question, 120, do_sample=False, eos_token_id=None)
            assert answer["choices"][0]["token_ids"] == own


def test_text_and_log_probabilities_are_those_of_the_tokens(served: Served) -> None:
    (choice,) = ask(served, QUESTIONS[0], temperature=0, logprobs=True, top_logprobs=3)["choices"]
    ids = choice["token_ids"]
    assert choice["message"]["content"] == TOKENIZER.decode(ids, skip_special_tokens=True)
    prompt = prompt_of(QUESTIONS[0])
    with torch.no_grad():
        logits = MODEL(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
    told = torch.tensor([each["logprob"] for each in choice["logprobs"]["content"]])
    torch.testing.assert_close(told, own, atol=1e-4, rtol=1e-4)
    assert all(each["top_logprobs"][0]["logprob"] == each["logprob"] for each in choice["logprobs"]["content"])


def test_streams_carry_the_same_tokens_with_their_trees(served: Served) -> None:
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    answer = served.chat(
        messages=messages, max_tokens=40, temperature=0, stream=True, speculation=True, return_token_ids=True
    )
    chunks = [event["choices"][0] for event in events_of(answer.text) if event != "[DONE]"]
    steps = [chunk["speculation"] for chunk in chunks if "speculation" in chunk]
    ids = [token for chunk in chunks for token in chunk.get("token_ids", ())]
    assert (
        ids
        == [token["id"] for step in steps for token in step["tokens"]]
        == expected(QUESTIONS[2], 40, do_sample=False)
    )
    assert sum(len(step["tree"]["tokens"]) - 1 for step in steps) > 0, "something must have been drafted"
    root = prompt_of(QUESTIONS[2])[-1]
    for step in steps:
        assert step["tree"]["tokens"][0] == root
        root = step["tokens"][-1]["id"]


def test_speculation_changes_nothing_but_the_number_of_passes(served: Served) -> None:
    free = ask(served, QUESTIONS[2], temperature=0.8, seed=3)
    plain = ask(served, QUESTIONS[2], temperature=0.8, seed=3, draft=False)
    assert plain["choices"][0]["token_ids"] == free["choices"][0]["token_ids"]
    assert plain["usage"]["speculation"]["num_draft_tokens"] == 0 < free["usage"]["speculation"]["num_draft_tokens"]


def test_a_conversation_that_goes_on_shares_its_prefix(served: Served) -> None:
    messages = [{"role": "system", "content": "s" * 40}, *HELLO]
    first = served.chat(messages=messages, max_tokens=20, temperature=0, seed=1).json
    text = first["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and?"}]
    usage = served.chat(messages=messages, max_tokens=5, temperature=0).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32


def test_biases_and_penalties_hold_under_speculation(served: Served) -> None:
    free = ask(served, QUESTIONS[2], temperature=0)["choices"][0]["token_ids"]
    banned = ask(served, QUESTIONS[2], temperature=0, logit_bias={str(free[3]): -100})["choices"][0]["token_ids"]
    assert free[3] not in banned
    fields = {"temperature": 0.7, "seed": 2, "frequency_penalty": 0.7, "presence_penalty": 0.4}
    with_drafts, without = ask(served, QUESTIONS[2], **fields), ask(served, QUESTIONS[2], **fields, draft=False)
    assert with_drafts["choices"][0]["token_ids"] == without["choices"][0]["token_ids"]


def test_an_end_token_stops_unless_it_is_ignored(served: Served) -> None:
    free = ask(served, QUESTIONS[0], temperature=0, ignore_eos=True)["choices"][0]
    assert (free["finish_reason"], len(free["token_ids"])) == ("length", 40)
    end = free["token_ids"][7]
    (choice,) = ask(served, QUESTIONS[0], temperature=0, stop_token_ids=[end])["choices"]
    at = min(i for i, token in enumerate(free["token_ids"]) if token in (end, 256))
    assert (choice["finish_reason"], choice["token_ids"]) == ("stop", free["token_ids"][: at + 1])


def test_a_stop_string_may_span_tokens_and_passes(served: Served) -> None:
    text = ask(served, QUESTIONS[0], temperature=0, ignore_eos=True)["choices"][0]["message"]["content"]
    stop = text[9:14]
    (choice,) = ask(served, QUESTIONS[0], temperature=0, ignore_eos=True, stop=stop)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    streamed = served.chat(
        messages=[{"role": "user", "content": QUESTIONS[0]}], max_tokens=40, temperature=0, ignore_eos=True, stop=[stop], stream=True
    )  # fmt: skip
    pieces = [
        event["choices"][0]["delta"].get("content", "") for event in events_of(streamed.text) if event != "[DONE]"
    ]
    assert "".join(pieces) == choice["message"]["content"]


def test_a_chat_without_a_limit_fits_into_a_small_cache(one_thread: None) -> None:
    """The context may be longer than the cache: a request that asks for no length must not be refused for it."""
    with Engine(MODEL, tokenizer=TOKENIZER, drafter="none", accelerate=False, kv_memory=60_000) as engine:
        assert engine.max_length < 512
        with Served(engine) as served:
            usage = served.chat(max_tokens=None, ignore_eos=True, temperature=0).json["usage"]
            assert usage["total_tokens"] == engine.max_length
            assert served.ask("/v1/completions", {"prompt": "x" * engine.max_length}).error["param"] == "prompt"


def test_a_prompt_larger_than_the_model_is_refused(served: Served) -> None:
    answer = served.ask("/v1/completions", {"prompt": "x" * 600})
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "prompt", "context_length_exceeded")


def test_a_client_that_leaves_frees_the_row(served: Served) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    body = {"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    before = served.metric("vllm:request_success_total", finished_reason="abort")
    connection.close()
    until(lambda: served.metric("vllm:request_success_total", finished_reason="abort") == before + 1)
    assert ask(served, "x", temperature=0)["choices"]


@pytest.mark.model
def test_the_default_model_answers_as_the_library_does() -> None:
    model, tokenizer = specdec.load_model("smollm2-135m"), specdec.load_tokenizer("smollm2-135m")
    questions = ["Name three trees.", "Count from one to five in words."]
    with Engine(model, tokenizer=tokenizer, accelerate=False, max_rows=4) as engine, Served(engine) as served:
        client = served.client()

        def one(question: str) -> Any:
            return client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0,
                extra_body={"return_token_ids": True},
            )  # fmt: skip

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(one, questions))
        for question, answer in zip(questions, answers, strict=True):
            messages = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            out = specdec.generate(model, **ids, max_new_tokens=24, do_sample=False)
            own = out[0, ids["input_ids"].shape[1] :].tolist()
            assert answer.choices[0].token_ids == own
            assert answer.choices[0].message.content == tokenizer.decode(own, skip_special_tokens=True)

        history: list[Any] = [{"role": "user", "content": questions[0]}]
        history += [{"role": "assistant", "content": answers[0].choices[0].message.content}]
        more = client.chat.completions.create(
            model="tiny", messages=[*history, {"role": "user", "content": "And why?"}], max_tokens=4, temperature=0
        )
        assert more.usage is not None
        assert more.usage.prompt_tokens_details is not None
        assert (more.usage.prompt_tokens_details.cached_tokens or 0) >= 32
        client.close()
