"""The interface, asked by OpenAI's own client."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from served import HELLO, Served, events_of
from tinychat import make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = FakeEngine(TOKENIZER)
    with Served(engine) as server:
        yield server
    engine.close()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def last(served: Served) -> Any:
    """The settings that the engine was asked for most recently."""
    assert isinstance(served.engine, FakeEngine)
    return served.engine.asked[-1].settings


def test_a_chat_is_answered_with_text_reason_and_usage(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6)
    assert isinstance(served.engine, FakeEngine)
    asked = served.engine.asked[-1]
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", asked.text, "length")
    assert asked.prompt == tuple(
        TOKENIZER.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=True, return_dict=False)
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(asked.prompt), 6)
    assert answer.usage.model_extra == {
        "speculation": {
            "num_drafts": 3, "num_draft_tokens": 6, "num_accepted_tokens": 3, "acceptance_rate": 0.5,
            "mean_acceptance_length": 2.0,
        }
    }  # fmt: skip


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    *texts, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == whole.choices[0].message.content
    assert texts[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in texts[-2:]] == [None, "length"]
    assert not usage.choices
    assert usage.usage == whole.usage
    assert all(chunk.usage is None for chunk in texts)
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_completions_take_texts_and_tokens_one_or_several(client: openai.OpenAI) -> None:
    ids = TOKENIZER("hi")["input_ids"]
    one = client.completions.create(model="tiny", prompt="hi", max_tokens=5)
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=5)
    both = client.completions.create(model="tiny", prompt=["hi", "ho"], max_tokens=5, n=2)
    assert one.choices[0].text == same.choices[0].text == both.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage is not None
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (2 * len(ids), 20)


def test_without_max_tokens_a_text_has_sixteen_and_a_chat_all_the_room(client: openai.OpenAI, served: Served) -> None:
    client.completions.create(model="tiny", prompt="hi")
    assert last(served).max_new_tokens == 16
    client.chat.completions.create(model="tiny", messages=HELLO, stop="a")
    assert last(served).max_new_tokens == 4096 - 7


def test_every_sampling_field_reaches_the_engine(client: openai.OpenAI, served: Served) -> None:
    client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=3, temperature=0.5, top_p=0.9, seed=-1, stop=["x", "y"],
        extra_body={"top_k": 7, "min_p": 0.1, "stop_token_ids": [3], "ignore_eos": True, "draft": False},
    )  # fmt: skip
    got = last(served)
    assert (got.max_new_tokens, got.temperature, got.top_p, got.top_k, got.min_p) == (3, 0.5, 0.9, 7, 0.1)
    assert (got.seed, got.stop, tuple(got.stop_token_ids), got.draft) == (2**64 - 1, ("x", "y"), (3,), False)


def test_defaults_are_openais(client: openai.OpenAI, served: Served) -> None:
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, extra_body={"top_k": -1})
    got = last(served)
    assert (got.temperature, got.top_p, got.top_k, got.seed, got.stop_token_ids) == (1.0, None, None, None, None)


def test_several_choices_have_seeds_of_their_own(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, n=3, seed=4)
    alone = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, seed=6)
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.choices[2].message.content == alone.choices[0].message.content
    assert answer.usage is not None
    assert alone.usage is not None
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens


def test_several_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, n=3, seed=4)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, n=3, seed=4, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="hi", max_tokens=12).choices[0].text
    cut = client.completions.create(model="tiny", prompt="hi", max_tokens=12, stop=free[4:6])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (free[: free.index(free[4:6])], "stop")


def test_log_probabilities_come_with_every_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(each.token for each in logprobs.content) == answer.choices[0].message.content
    assert {len(each.top_logprobs) for each in logprobs.content} == {2}
    streamed = [
        each
        for chunk in client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=2, stream=True
        )
        if chunk.choices[0].logprobs is not None
        for each in chunk.choices[0].logprobs.content or ()
    ]
    assert [each.model_dump() for each in streamed] == [each.model_dump() for each in logprobs.content]


def test_text_completions_tell_where_each_token_begins(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="hi", max_tokens=5, logprobs=1).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs == [-0.5] * 5
    assert "".join(choice.logprobs.tokens or ()) == choice.text


def test_token_ids_are_returned_on_request(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hi", max_tokens=5, extra_body={"return_token_ids": True})
    extra = answer.choices[0].model_extra
    assert extra is not None
    assert TOKENIZER.decode(extra["token_ids"]) == answer.choices[0].text
    assert answer.model_extra == {"prompt_token_ids": TOKENIZER("hi")["input_ids"]}
    stream = client.completions.create(
        model="tiny", prompt="hi", max_tokens=5, stream=True, extra_body={"return_token_ids": True}
    )
    first, *others = [chunk.model_extra for chunk in stream]
    assert first == answer.model_extra
    assert not any(others)


def test_each_chunk_shows_its_tree_on_request(served: Served) -> None:
    events = list(events_of(served.chat(stream=True, speculation=True).text))
    steps = [event["choices"][0].get("speculation") for event in events[1:-2]]
    assert events[-1] == "[DONE]"
    assert len(steps) == 2
    for step in steps:
        tree, tokens = step["tree"], [token["id"] for token in step["tokens"]]
        path = [tree["tokens"][node] for node in tree["nodes"]]
        assert path[1:] == tokens[: step["accepted"]]
        assert len(tree["parents"]) == len(tree["texts"]) == len(tree["tokens"])
        assert tree["parents"][0] == -1
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert "".join(token["text"] for step in steps for token in step["tokens"]) == text


def test_the_description_for_programs_knows_the_fields_and_the_errors(served: Served) -> None:
    described = served.ask("/openapi.json").json
    asked = described["paths"]["/v1/chat/completions"]["post"]
    assert set(asked["responses"]) == {"200", "4XX", "5XX"}
    assert {"messages", "temperature", "guided_json"} <= set(
        described["components"]["schemas"]["ChatBody"]["properties"]
    )


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other/model")


def test_a_conversation_that_goes_on_begins_with_the_same_tokens(client: openai.OpenAI, served: Served) -> None:
    """Otherwise the engine would find no prefix to share."""
    assert isinstance(served.engine, FakeEngine)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *HELLO]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6).choices[0].message
    before = served.engine.asked[-1]
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "more é"}]
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
    now = served.engine.asked[-1].prompt
    whole = (*before.prompt, *before.tokens)
    assert now[: len(whole)] == whole


def test_curl_is_answered(served: Served) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 4, "stream": True})
    ran = subprocess.run(
        ["curl", "-sN", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert list(events_of(ran.stdout))[-1] == "[DONE]"


def test_content_may_come_in_parts_and_developers_are_the_system(served: Served) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    served.chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    assert isinstance(served.engine, FakeEngine)
    text = TOKENIZER.decode(served.engine.asked[-1].prompt)
    assert text == "systemx<user>hello<bot>"


def test_an_answer_can_be_continued(served: Served) -> None:
    served.chat(messages=[*HELLO, {"role": "assistant", "content": "abc"}], continue_final_message=True)
    assert isinstance(served.engine, FakeEngine)
    assert TOKENIZER.decode(served.engine.asked[-1].prompt) == "<user>hello<bot>abc"
