"""Prompts: the built-in suite is balanced, a wrong file is named with its line, chats are rendered turn by turn."""

import json
from collections import Counter
from pathlib import Path

import pytest

from specdec.records.prompts import Prompt, load_prompts, render_turns


def write(folder: Path, *lines: object) -> Path:
    """A JSONL file; a str or bytes line is written as it stands, anything else as JSON."""
    path = folder / "some.jsonl"
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))
    return path


class Words:
    """A tokenizer double: one id a word; with ``chat_template`` it spells out the messages it was handed."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.messages: list[dict[str, str]] = []

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.text = text
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt
        assert tokenize
        assert not return_dict
        self.messages = messages
        return [len(message["content"]) for message in messages] + [0]


def test_every_prefix_of_the_built_in_suite_is_balanced():
    """Guards ``--limit``: eight categories of eight, in turn, with ids that are all different."""
    prompts = load_prompts("builtin")
    names = {"chat", "translation", "summarisation", "qa", "maths", "retrieval", "code", "structured"}
    assert len(prompts) == 64
    assert len({prompt.question_id for prompt in prompts}) == 64
    assert len({prompt.turns for prompt in prompts}) == 64
    for start in range(0, 64, 8):
        assert {prompt.category for prompt in prompts[start : start + 8]} == names
    assert Counter(len(prompt.turns) for prompt in prompts) == {1: 62, 2: 2}
    assert not any(prompt.is_raw for prompt in prompts)


def test_the_built_in_prompts_are_of_many_lengths():
    """Guards the suite against turning into one-liners: summaries and retrieval carry their passages."""
    words = [(prompt.category, sum(len(turn.split()) for turn in prompt.turns)) for prompt in load_prompts("builtin")]
    assert all(10 <= number <= 320 for _, number in words)
    assert all(number >= 75 for category, number in words if category in ("summarisation", "retrieval"))
    assert min(number for _, number in words) < 20
    assert max(number for _, number in words) > 200


def test_limit_takes_the_first_and_must_be_positive(tmp_path):
    """Guards against ``prompts[:-1]`` and against an empty run."""
    assert [prompt.question_id for prompt in load_prompts("builtin", limit=3)] == ["1", "2", "3"]
    assert len(load_prompts(write(tmp_path, {"prompt": "a"}), limit=9)) == 1
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
            load_prompts("builtin", limit=limit)


def test_both_forms_of_a_line_are_read(tmp_path):
    """Guards the defaults, ignored keys, empty lines, a byte order mark, CRLF and U+2028 inside a string."""
    path = write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"question_id": 81, "category": "writing", "turns": ["a", "b"], "x": 1}).encode(),
        "",
        json.dumps({"prompt": "one\u2028line"}, ensure_ascii=False) + "\r",
        {"question_id": "q-7", "prompt": "hi"},
    )
    assert load_prompts(str(path)) == [
        Prompt("81", "writing", ("a", "b"), is_raw=False),
        Prompt("3", "prompt", ("one\u2028line",), is_raw=True),
        Prompt("q-7", "prompt", ("hi",), is_raw=True),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
        ('{"prompt": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "must be a JSON object .* got a list"),
        ("null", "must be a JSON object .* got null"),
        ({"question_id": 9}, 'neither "turns" .* nor "prompt"'),
        ({"turns": []}, r'"turns" must be a list of at least one string, got \[\]'),
        ({"turns": "hello"}, '"turns" must be a list of at least one string, got a string'),
        ({"turns": ["a", 3]}, '"turns" item 2 must be a string, got a number'),
        ({"turns": ["a", " \n"]}, '"turns" item 2 is blank'),
        ({"prompt": ""}, '"prompt" is blank'),
        ({"prompt": None}, '"prompt" must be a string, got null'),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        ({"prompt": "x", "category": 3}, '"category" must be a string, got a number'),
        ({"prompt": "x", "question_id": True}, '"question_id" must be a whole number or a string, got true or false'),
        ({"prompt": "x", "question_id": 1.5}, '"question_id" must be a whole number or a string, got a number'),
        ({"prompt": "x", "question_id": "7"}, "question_id '7' is already used on line 1"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(tmp_path, line, message):
    """Guards against errors that do not say where in the file to look."""
    path = write(tmp_path, {"prompt": "fine", "question_id": 7}, "", line)
    with pytest.raises(ValueError, match=rf"some\.jsonl, line 3: .*{message}"):
        load_prompts(path, limit=1)


def test_a_file_that_is_missing_or_holds_nothing_is_a_clear_error(tmp_path):
    """Guards against a bare FileNotFoundError, and against a benchmark over no prompts."""
    with pytest.raises(ValueError, match=r"cannot read the prompts file .*nowhere\.jsonl .*'builtin'"):
        load_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="cannot read the prompts file"):
        load_prompts(tmp_path)
    with pytest.raises(ValueError, match=r"some\.jsonl holds no prompts"):
        load_prompts(write(tmp_path, "", "  "))


def test_turns_go_through_the_chat_template_with_the_answers_between():
    """Guards the order and the roles of a conversation, raw prompts included."""
    tokenizer = Words("template")
    prompt = Prompt("1", "chat", ("first", "then"), is_raw=False)
    assert render_turns(tokenizer, prompt, []) == [5, 0]
    assert render_turns(tokenizer, prompt, ["reply!"]) == [5, 6, 4, 0]
    assert [message["role"] for message in tokenizer.messages] == ["user", "assistant", "user"]
    assert render_turns(tokenizer, Prompt("2", "prompt", ("raw",), is_raw=True), []) == [3, 0]
    with pytest.raises(ValueError, match=r"question 1 has 2 turns, so at most 1 answers .* got 2"):
        render_turns(tokenizer, prompt, ["a", "b"])


def test_without_a_chat_template_the_turns_are_joined_by_newlines():
    """Guards base models, and against handing a model an empty prompt."""
    tokenizer = Words()
    prompt = Prompt("1", "chat", ("first", "then"), is_raw=False)
    assert render_turns(tokenizer, prompt, ["reply!"]) == [5, 6, 4]
    assert tokenizer.text == "first\nreply!\nthen"
    with pytest.raises(ValueError, match="question 9 has no tokens"):
        render_turns(tokenizer, Prompt("9", "x", (" ",), is_raw=True), [])


@pytest.mark.model
def test_the_default_models_template_opens_an_assistant_turn():
    """Guards against a template that is lost in the conversion, or tokenised with a second BOS."""
    from specdec.hub.catalog import DEFAULT_MODEL
    from specdec.hub.load import load_tokenizer

    tokenizer = load_tokenizer(DEFAULT_MODEL)
    ids = render_turns(tokenizer, Prompt("1", "chat", ("Hi", "And you?"), is_raw=False), ["Fine."])
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>assistant\nFine.<|im_end|>" in text
    assert text.count("<|im_start|>system") == 1
    assert all(len(render_turns(tokenizer, prompt, [])) < 512 for prompt in load_prompts("builtin"))
