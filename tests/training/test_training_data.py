"""Training text: what a conversation holds depends on its number alone, and a stopped run goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tinychat
import torch
from transformers import LlamaForCausalLM

from specdec.drafters.training.data import Conversation, DataFolder, DataSettings
from specdec.drafters.training.generator import OPENERS, Chat, Generator, MakeDecoder
from specdec.runtime import Runtime
from specdec.settings import Settings

EOS, USER, BOT = 256, 257, 258
SETTINGS = DataSettings("tiny", 24, max_question_tokens=12, max_answer_tokens=10)
OPEN = ("What is", "How", "Write")
LINES = "conversations.jsonl"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tinychat.make_model().double()  # rounding must not depend on the batch


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.of(tinychat.make_tokenizer())


@pytest.fixture(scope="module")
def runtime(model: LlamaForCausalLM) -> Runtime:
    return Runtime(model)


def plain_decoder(runtime: Runtime, settings: DataSettings) -> MakeDecoder:
    return partial(runtime.decoder, Settings(drafter="none", adaptive=False, seed=settings.seed))


@pytest.fixture
def make(runtime: Runtime, chat: Chat) -> Any:
    def generator(settings: DataSettings = SETTINGS, **options: Any) -> Generator:
        options = {"openers": OPEN, "batch_size": 5, **options}
        return Generator(plain_decoder(runtime, settings), frozenset({EOS}), chat, settings, **options)

    return generator


def opened(path: Path, settings: DataSettings = SETTINGS) -> DataFolder:
    folder = DataFolder(path, settings)
    folder.open()
    return folder


def by_number(folder: DataFolder) -> dict[int, Conversation]:
    texts = folder.read()
    assert len({text.index for text in texts}) == len(texts)
    return {text.index: text for text in texts}


@pytest.fixture(scope="module")
def whole(runtime: Runtime, chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Conversation]:
    """What a run that was never interrupted makes."""
    folder = opened(tmp_path_factory.mktemp("whole"))
    make_decoder = plain_decoder(runtime, SETTINGS)
    generator = Generator(make_decoder, frozenset({EOS}), chat, SETTINGS, OPEN, batch_size=5)
    assert [text.index for text in generator.run(folder)] == [text.index for text in folder.read()]
    texts = by_number(folder)
    assert sorted(texts) == list(range(SETTINGS.count))
    return texts


# ----- resuming -----


@pytest.mark.parametrize("batch_size", [5, 1, 64])
@pytest.mark.parametrize("stopped_after", [1, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_conversations(
    make: Any, whole: dict[int, Conversation], tmp_path: Path, batch_size: int, stopped_after: int
) -> None:
    """Guards against noise that depends on the batch, or on which rows were made together."""
    folder = opened(tmp_path)
    running = make().run(folder)
    assert len(list(islice(running, stopped_after))) == stopped_after
    running.close()
    early = folder.read()
    list(make(batch_size=batch_size).run(folder))
    assert by_number(folder) == whole
    assert folder.read()[: len(early)] == early  # shards of features are made of what was there first


def test_another_seed_gives_other_conversations(make: Any, whole: dict[int, Conversation], tmp_path: Path) -> None:
    """The comparison above would pass for texts that are always the same."""
    settings = replace(SETTINGS, seed=1)
    folder = opened(tmp_path, settings)
    list(make(settings).run(folder))
    assert sum(by_number(folder)[i] == whole[i] for i in whole) < len(whole) // 2
    assert len({text.tokens for text in whole.values()}) > len(whole) // 2


@pytest.mark.parametrize("tail", ["{", '{"index": 3, "tokens": [1, 2', "half é"])
def test_a_last_line_that_was_cut_short_is_made_anew(
    make: Any, whole: dict[int, Conversation], tmp_path: Path, tail: str
) -> None:
    folder = opened(tmp_path)
    list(islice(make().run(folder), 4))
    file = tmp_path / LINES
    before = file.read_bytes()
    file.write_bytes(before + tail.encode()[:-1])
    size = file.stat().st_size
    assert len(folder.read()) == 4
    assert file.stat().st_size == size  # a reader beside the run that writes must not touch its file
    list(make().run(folder))
    assert file.read_bytes().startswith(before)
    assert by_number(folder) == whole


def test_a_line_in_the_middle_that_is_no_conversation_is_named(make: Any, tmp_path: Path) -> None:
    folder = opened(tmp_path)
    list(islice(make().run(folder), 2))
    file = tmp_path / LINES
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first, '{"index": 1}\n', *rest]))
    with pytest.raises(ValueError, match=r"line 2 is not a conversation .*delete the line"):
        folder.read()


def test_a_folder_grows_and_is_never_read_as_less(make: Any, whole: dict[int, Conversation], tmp_path: Path) -> None:
    """Asking for fewer later must not change which conversations come first: shards are made of these."""
    small = replace(SETTINGS, count=10)
    folder = opened(tmp_path, small)
    list(make(small).run(folder))
    assert sorted(by_number(folder)) == list(range(10))
    early = folder.read()
    list(make().run(opened(tmp_path)))
    assert by_number(folder) == whole
    again = opened(tmp_path, small)
    assert again.missing() == []
    assert len(again.read()) == SETTINGS.count
    assert again.read()[:10] == early


@pytest.mark.parametrize("content", ["", '{"target": ', "[1, 2]"])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    opened(tmp_path)
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json (cannot be read as JSON|must hold a JSON object)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"target": "other"}, {"seed": 3}, {"source": "abc"}, {"max_answer_tokens": 11}, {"answer_temperatures": (0.0,)}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_folder_of_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    opened(tmp_path)
    with pytest.raises(ValueError, match=rf"other settings \({next(iter(changes))} .*, not .*name another folder"):
        opened(tmp_path, replace(SETTINGS, **changes))
    opened(tmp_path)  # and was left as it is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens"),
        ({"answer_temperatures": ()}, "answer_temperatures"),
        ({"answer_temperatures": (-1.0,)}, "not negative"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


# ----- what is in them -----


def test_a_question_begins_with_its_opener_and_stands_in_the_template(
    whole: dict[int, Conversation], chat: Chat
) -> None:
    for index, text in whole.items():
        prompt = text.tokens[: text.num_prompt]
        opener = chat.encode(OPEN[index % len(OPEN)])
        assert prompt[: 1 + len(opener)] == (USER, *opener)
        assert prompt[-1] == BOT
        assert not {EOS, BOT} & set(prompt[:-1])  # what ended the question is no part of it
        assert len(prompt) <= 1 + len(opener) + SETTINGS.max_question_tokens + 1
        assert 1 <= text.num_answer <= SETTINGS.max_answer_tokens
        assert EOS not in text.tokens[text.num_prompt : -1]


def greedy(model: LlamaForCausalLM, text: Conversation) -> tuple[int, ...]:
    prompt = torch.tensor([text.tokens[: text.num_prompt]])
    limit = SETTINGS.max_answer_tokens
    return tuple(model.generate(prompt, max_new_tokens=limit, do_sample=False, pad_token_id=0)[0].tolist())


def test_answers_are_greedy_for_one_round_of_openers_and_sampled_for_the_next(
    model: LlamaForCausalLM, whole: dict[int, Conversation]
) -> None:
    """So that each opener gets answers of both kinds."""
    same = {index: greedy(model, text) == text.tokens for index, text in whole.items()}
    rounds = {index: index // len(OPEN) % 2 for index in whole}
    assert all(same[index] for index in whole if rounds[index] == 0)
    assert sum(same[index] for index in whole if rounds[index] == 1) <= 3  # of 12


def test_given_questions_are_answered_as_they_are(
    model: LlamaForCausalLM, make: Any, chat: Chat, tmp_path: Path
) -> None:
    encoded = [chat.encode(f"question {i}") for i in range(8)]
    settings = replace(SETTINGS, count=len(encoded), source="a file")
    folder = opened(tmp_path, settings)
    list(make(settings, openers=(), questions=encoded).run(folder))
    texts = by_number(folder)
    assert sorted(texts) == list(range(len(encoded)))
    for index, question in enumerate(encoded):
        assert texts[index].tokens[: texts[index].num_prompt] == (USER, *question, BOT)
    same = [greedy(model, texts[index]) == texts[index].tokens for index in range(len(encoded))]
    assert same[::2] == [True] * 4  # without openers they alternate
    assert not all(same[1::2])


# ----- templates -----


def test_the_ids_around_the_users_text_are_the_templates() -> None:
    tokenizer = tinychat.make_tokenizer()
    chat = Chat.of(tokenizer)
    message = [{"role": "user", "content": "hello é"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert chat.prompt(chat.encode("hello é")) == list(ids)


@pytest.mark.parametrize(
    "template", [None, "{{ 'no text of the user' }}", "{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_a_tokenizer_whose_template_does_not_let_us_speak_for_the_user_is_refused(template: str | None) -> None:
    with pytest.raises(ValueError, match="give a file of prompts"):
        Chat.of(tinychat.make_tokenizer(template=template))


def test_without_a_template_given_prompts_are_continued_as_they_stand() -> None:
    tokenizer = tinychat.make_tokenizer(template=None)
    chat = Chat.plain(tokenizer)
    assert chat.prompt(chat.encode("abc")) == list(tokenizer("abc")["input_ids"])


def test_the_openers_are_texts_of_many_kinds() -> None:
    lines = [json.loads(line) for line in OPENERS.read_text("utf-8").splitlines()]
    assert all(isinstance(line, str) for line in lines)
    assert len(set(lines)) > 50
    assert "" in lines  # there the target chooses the topic alone
