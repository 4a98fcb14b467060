"""``specdec train`` as a user runs it: from nothing but a tiny chat model to a drafter that generate takes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tinychat
import torch

from specdec.cli.train_data import Source
from specdec.drafters.training import data, generator

NUM = 128  # the fewest conversations that can be trained on
TEXT = ("--conversations", str(NUM), "--max-answer-tokens", "8", "--threads", "1")
FIT = ("--epochs", "1", "--precision", "no")
SMALL = {
    "medusa": (*TEXT, *FIT, "--draft-vocab", "200", "--heads", "2"),
    "eagle": (*TEXT, *FIT, "--draft-vocab", "200", "--steps", "2"),
    "draft": (*TEXT, *FIT, "--layers", "2"),
    "recycling": TEXT,
}


@pytest.fixture
def specdec_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[tinychat.Command]:
    threads = torch.get_num_threads()
    monkeypatch.setattr("specdec.cli.train._NUM_JUDGES", 4)
    short = partial(data.DataSettings, max_question_tokens=16)
    monkeypatch.setattr(data, "DataSettings", short)
    yield tinychat.Command(monkeypatch, capsys)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = tinychat.make_model(max_position_embeddings=2048, num_hidden_layers=4)
    return tinychat.save(tmp_path_factory.mktemp("target"), model)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and features, made by whichever test comes first."""
    return tmp_path_factory.mktemp("work")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


USES = {
    "medusa": ("--drafter", 'medusa:path="{}"'),
    "eagle": ("--drafter", 'eagle:path="{}"'),
    "draft": ("--drafter", "model", "--drafter-model", "{}"),
    "recycling": ("--drafter", 'recycling:start="{}"'),
}


@pytest.mark.parametrize("kind", USES)
def test_from_nothing_but_a_model_to_a_drafter_that_keeps_the_text(
    specdec_command: tinychat.Command, target: str, work: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "a, b's drafter"
    train = ("train", kind, "--target", target, "--work", str(work), "--output", str(output), *SMALL[kind])
    ran = specdec_command(*train)
    assert ran.status == 0, ran.err
    hint = ran.out.removeprefix(f"{output}: use it with ")
    use = shlex.split(hint)
    assert use == [word.format(output) for word in USES[kind]]
    assert re.search(r"training on \d+ tokens, 1 shards held out", ran.err)
    fitted = kind != "recycling"  # a table is only gathered
    assert bool(re.search(r"final: step \d+, 100 %, loss \d", ran.err)) == fitted
    assert re.search(r"mean acceptance length on 4 held-out questions, greedy: [1-9]\.\d\d", ran.err)
    for name in ("config.json", "README.md", "training.json", *(("run/log.jsonl", "run/state.pt") if fitted else ())):
        assert (output / name).is_file()

    question = ("hello hello", "--target", target, "--max-new-tokens", "24", "--fixed")
    plain = specdec_command("generate", *question, "--drafter", "none")
    drafted = specdec_command("generate", *question, *use)
    assert drafted.status == 0, drafted.err
    assert drafted.out == plain.out != ""

    made = files(work)
    again = specdec_command(*train)
    assert again.status == 0, again.err
    assert ("100 % done" in again.err) == fitted
    assert "conversations:" not in again.err  # nothing was written anew
    assert files(work) == made


def test_the_card_says_what_it_was_made_of(
    specdec_command: tinychat.Command, target: str, work: Path, tmp_path: Path
) -> None:
    places = ("--work", str(work), "--output", str(tmp_path))
    ran = specdec_command("train", "medusa", "--target", target, *places, *SMALL["medusa"])
    assert ran.status == 0, ran.err
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["target"] == target
    assert facts["recipe"]["heads"] == 2
    assert facts["facts"]["draft_vocab_size"] == 200
    card = (tmp_path / "README.md").read_text()
    assert f"Data: {NUM} conversations" in card
    assert "--drafter medusa:path=THIS_FOLDER" in card
    assert f"{facts['facts']['mean_acceptance_length']:.2f}" in card


def test_progress_counts_what_is_asked_for_and_ends_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversations that an earlier, larger run had left were counted too, and tokens that are in no whole shard."""
    monkeypatch.setattr(data, "DataSettings", partial(data.DataSettings, max_question_tokens=16))
    folder = data.DataFolder(tmp_path, data.DataSettings("tiny", 200, max_answer_tokens=8))
    folder.open()
    with folder.append() as file:
        for index in range(1, 200):
            file.write(json.dumps({"index": index, "tokens": [9, 10, 11], "num_prompt": 2}) + "\n")
    source = Source("tiny", "self", NUM, max_answer_tokens=8, batch_size=4, seed=0, work=tmp_path)
    _, texts = source.prepare(tinychat.make_model(), tinychat.make_tokenizer(), needs_layers=False)
    assert len(texts) == 200
    said = capsys.readouterr().err
    assert f"conversations: {NUM} of {NUM}, " in said
    assert f"features, tokens: {3 * 192} of {3 * 192}" in said


def test_a_run_that_is_stopped_while_it_writes_goes_on(
    specdec_command: tinychat.Command,
    target: str,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in the first stage, then the same command again: the text is that of a run that was not stopped."""
    whole = generator.Generator.run

    def stopped(self: generator.Generator, folder: Any) -> Iterator[Any]:
        for number, text in enumerate(whole(self, folder)):
            if number == 40:
                raise KeyboardInterrupt
            yield text

    own = tmp_path / "work"
    train = ("train", "medusa", "--target", target, "--output", str(tmp_path / "out"), *SMALL["medusa"], "--work")
    assert specdec_command(*train, str(work)).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(generator.Generator, "run", stopped)
        ran = specdec_command(*train, str(own))
    assert ran.status == 130
    assert len((own / "conversations.jsonl").read_text().splitlines()) >= 40
    assert specdec_command(*train, str(own)).status == 0
    lines = [sorted((folder / "conversations.jsonl").read_text().splitlines()) for folder in (own, work)]
    assert lines[0] == lines[1]


def write_questions(path: Path, count: int) -> str:
    return tinychat.write_prompts(path, [{"turns": [f"question {i}", "and?"]} for i in range(count)])


@pytest.mark.parametrize("template", [tinychat.TEMPLATE, None], ids=["chat", "base"])
def test_questions_from_a_file_also_for_a_base_model(
    specdec_command: tinychat.Command, tmp_path: Path, template: str | None
) -> None:
    """A model without a chat template continues each prompt as it stands."""
    tokenizer = tinychat.make_tokenizer(template=template)
    model = tinychat.make_model(num_hidden_layers=2)  # too few layers for EAGLE, enough for Medusa
    target = tinychat.save(tmp_path / "target", model, tokenizer)
    questions = write_questions(tmp_path / "questions.jsonl", NUM + 3)
    options = (
        *SMALL["medusa"][2:],
        "--target",
        target,
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
    )
    ran = specdec_command("train", "medusa", "--data", questions, *options)
    assert ran.status == 0, ran.err
    lines = [json.loads(line) for line in (tmp_path / "work" / "conversations.jsonl").read_text().splitlines()]
    prompts = {line["index"]: line["tokens"][: line["num_prompt"]] for line in lines}
    text = list(tokenizer("question 5")["input_ids"])
    assert len(prompts) == NUM + 3
    assert prompts[5] == ([257, *text, 258] if template else text)
    write_questions(Path(questions), NUM)
    ran = specdec_command("train", "medusa", "--data", questions, *options)
    assert ran.status == 2
    assert "holds data made with other settings" in ran.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--conversations", "127"), "training needs at least 128 conversations, got 127"),
        (("--epochs", "0"), "epochs must be positive, got 0"),
        (("--learning-rate", "0"), "learning_rate must be positive, got 0"),
        (("--minutes", "-1"), "minutes must be positive"),
        (("--precision", "int8"), "precision must be no, bf16 or fp16, got 'int8'"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--draft-vocab", "-2"), "draft_vocab must be at least 0, got -2"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--threads", "0"), "threads must be at least 1, got 0"),
        (("--data", "nonesuch.jsonl"), "cannot read the prompts file nonesuch.jsonl"),
        (("--target", "nonesuch"), "nonesuch"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_options_are_named_before_any_work(
    specdec_command: tinychat.Command, target: str, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    output, work = tmp_path / "out", tmp_path / "work"
    ran = specdec_command("train", "eagle", "--target", target, "--output", str(output), "--work", str(work), *words)
    assert ran.status == 2
    assert message in ran.error
    assert not work.exists()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("draft", ("--layers", "4"), "must have 1 to 3 layers (fewer than the target's), got 4"),
        ("medusa", ("--draft-vocab", "260"), "a draft vocabulary must have 1 to 259 (the target's) ids, got 260"),
        ("medusa", ("--seed", "1"), "holds data made with other settings"),
        ("medusa", ("--max-answer-tokens", "2040"), "past the model's context of 2048"),
    ],
)
def test_options_that_do_not_fit_the_target_or_the_data_are_named(
    specdec_command: tinychat.Command, target: str, work: Path, tmp_path: Path, kind: str, words: Any, message: str
) -> None:
    place = tmp_path / "work" if "context" in message else work
    options = ("--target", target, "--output", str(tmp_path / "out"), "--work", str(place), *SMALL[kind], *words)
    ran = specdec_command("train", kind, *options)
    assert ran.status == 2
    assert message in ran.error


HELP = {
    "medusa": {"--heads", "--head-layers", "--draft-vocab", "--own-output", "--start-from", "--epochs"},
    "eagle": {"--steps", "--draft-vocab", "--own-output", "--start-from", "--epochs"},
    "draft": {"--layers", "--start-from", "--epochs"},
    "recycling": {"--contexts"},
}


@pytest.mark.parametrize("kind", HELP)
def test_a_kind_has_its_own_options_and_defaults(specdec_command: tinychat.Command, kind: str) -> None:
    """With one command for all kinds, most options of a run did nothing."""
    said = specdec_command("train", kind, "--help").out
    options = set(re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE))
    assert options & set().union(*HELP.values()) == HELP[kind]
    assert {"--output", "--target", "--work", "--seed", "--threads"} <= options
    assert "Where the training text comes from:" in said
    rate = re.search(r"--learning-rate X .*\[default: ([\d.]+)\]", said)
    assert (rate and rate[1]) == {"draft": "0.0003", "recycling": None}.get(kind, "0.001")


def test_too_few_questions_and_no_layers_for_eagle(specdec_command: tinychat.Command, tmp_path: Path) -> None:
    target = tinychat.save(tmp_path / "target")
    questions = write_questions(tmp_path / "questions.jsonl", 20)
    options = ("--target", target, "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    ran = specdec_command("train", "medusa", "--data", questions, *options)
    assert (ran.status, "got 20 (--data" in ran.error) == (2, True)
    ran = specdec_command("train", "eagle", *options, *SMALL["eagle"])
    assert ran.status == 2
    assert "EAGLE-3 reads three layers of its target, which has 2" in ran.error
    assert not (tmp_path / "work").exists()


def test_a_model_without_a_template_is_told_to_take_a_file(specdec_command: tinychat.Command, tmp_path: Path) -> None:
    target = tinychat.save(tmp_path / "target", tokenizer=tinychat.make_tokenizer(template=None))
    places = ("--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    ran = specdec_command("train", "medusa", "--target", target, *places, *SMALL["medusa"])
    assert ran.status == 2
    assert "has no chat template, so it cannot write questions; give a file" in ran.error
