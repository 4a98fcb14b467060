"""The commands as a user runs them: help without torch, streamed text, doctor, models."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import tinychat
import torch

import specdec
from specdec.cli.stream import _writer
from specdec.settings import DEFAULTS
from specdec.text import TextStream


@pytest.fixture
def specdec_command(monkeypatch, capsys):
    return tinychat.Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "generate --help",
        "bench --help",
        "models --help",
        "models list",
        "doctor --help",
        "train eagle --help",
        "--version",
    ],
)
def test_help_does_not_wait_for_torch(words):
    """Importing torch takes seconds on a cold disk; --help should answer at once."""
    code = (
        f"import sys; sys.argv = ['specdec', *{words!r}.split()]\n"
        "from specdec.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_command_says_what_it_does_and_shows_an_example(specdec_command):
    assert "Usage: specdec" in specdec_command("--help").out
    for command in ("generate", "bench", "doctor", "models"):
        said = specdec_command(command, "--help").out
        assert f"Example: specdec {command}" in said


def test_help_shows_the_librarys_own_defaults(specdec_command):
    said = specdec_command("generate", "--help").out
    assert f"[default: {DEFAULTS.max_nodes}]" in " ".join(said.split())
    assert f"[default: {DEFAULTS.verifier}]" in " ".join(said.split())


def test_the_version_is_the_packages(specdec_command):
    assert specdec_command("--version").out == f"specdec {specdec.__version__}\n"


def test_without_a_command_the_help_is_shown(specdec_command):
    ran = specdec_command()
    assert "Usage: specdec" in ran.out + ran.err


@pytest.mark.parametrize("options", [(), ("--drafter", "none"), ("--max-nodes", "3", "--threads", "1")])
def test_generated_text_is_that_of_generate(specdec_command, target, options):
    ran = specdec_command("generate", "abc abc", "--target", target, "--max-new-tokens", "20", *options)
    model, tokenizer = tinychat.make_model(), tinychat.make_tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc abc"}], add_generation_prompt=True, return_dict=False
    )
    expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=256)[0, len(ids) :]
    assert ran.status == 0
    assert ran.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert "20 tokens in " in ran.err
    assert "mean acceptance length" in ran.err
    assert "tokens/s" in ran.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "drafter hybrid (auto),"),
        (("--drafter", "auto:parts=ngram+recycling"), "drafter hybrid (auto),"),
        (("--drafter-model", "the target"), "drafter model (auto),"),
        (("--drafter", "ngram:max_order=2"), "drafter ngram,"),
    ],
)
def test_the_summary_names_the_drafter_that_ran(specdec_command, target, options, named):
    """A line that says "drafter auto" tells nobody what drafted."""
    words = [target if word == "the target" else word for word in options]
    assert named in specdec_command("generate", "abc", "--target", target, "--max-new-tokens", "4", *words).err


def test_a_raw_prompt_takes_no_template(specdec_command, target):
    chat = specdec_command("generate", "abc", "--target", target, "--max-new-tokens", "4").err
    raw = specdec_command("generate", "abc", "--target", target, "--max-new-tokens", "4", "--no-chat").err
    system = specdec_command("generate", "abc", "--target", target, "--max-new-tokens", "4", "--system", "xy").err
    assert [f"({n} prompt tokens" in said for n, said in ((5, chat), (3, raw), (13, system))] == [True] * 3


def test_a_prompt_can_come_from_standard_input(specdec_command, target, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert "(5 prompt tokens" in specdec_command("generate", "-", "--target", target, "--max-new-tokens", "2").err


def test_sampling_depends_on_the_seed_alone(specdec_command, target):
    def text(seed, *more):
        options = ("--temperature", "1", "--top-k", "50", "--seed", str(seed), "--max-new-tokens", "16")
        return specdec_command("generate", "abc", "--target", target, *options, *more).out

    assert text(1) == text(1, "--drafter", "none") != text(2)


def test_generation_ends_with_the_end_of_text(specdec_command, tmp_path):
    """The end token counts as a token and is not shown."""
    model, tokenizer = tinychat.make_model(), tinychat.make_tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc"}], add_generation_prompt=True, return_dict=False
    )
    third = int(model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=256)[0, -1])
    model.generation_config.eos_token_id = [256, third]
    target = tinychat.save(tmp_path, model, tokenizer)
    ran = specdec_command("generate", "abc", "--target", target, "--max-new-tokens", "50")
    assert int(ran.err.split(" tokens in ")[0]) <= 3


def test_ctrl_c_keeps_what_was_generated(specdec_command, target, monkeypatch):
    from specdec.drafters.ngram import NgramDrafter

    def interrupted(self, *_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(NgramDrafter, "observe", interrupted)
    ran = specdec_command("generate", "abc", "--target", target)
    assert ran.status == 130
    assert "tokens in" in ran.err
    assert "Traceback" not in ran.err


TEXTS = [
    "plain words",
    "Grüße, Žlutý kůň",
    "日本語のテキスト",
    "👩🏽‍🚀 and 🇨🇿!",
    "  spaces\n\n\ttabs  ",
    "broken \ufffd mark",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_put_together_are_the_text(text):
    """Each byte is a token here: a character is shown once its last byte has come, and never as a broken one."""
    tokenizer = tinychat.make_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + stream.flush() == text
    assert text.count("\ufffd") or not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_come_out_as_in_one_decode():
    """Random bytes are mostly broken characters; nothing may be lost or said twice."""
    tokenizer = tinychat.make_tokenizer()
    torch.manual_seed(0)
    for _ in range(50):
        ids = torch.randint(0, tinychat.VOCAB, (30,)).tolist()
        stream = TextStream(tokenizer)
        streamed = "".join(stream.push(token) for token in ids) + stream.flush()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_spaces_between_words_come_out_as_in_the_whole():
    """A decoder that joins words with spaces must not lose them between pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert [stream.push(token) for token in (0, 1, 1)] == ["one", " two", " two"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("variable", "code"), [("COLORTERM", "\x1b[32m"), ("NO_COLOR", "\x1b[4m")])
def test_drafted_text_is_marked_on_a_terminal(monkeypatch, variable, code):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    write = _writer()
    write("mine [bold]", False)
    write(" drafted", True)
    write("\n", False)
    assert terminal.getvalue() == f"mine [bold]{code} drafted\x1b[0m\n"


def test_no_codes_go_into_a_pipe(specdec_command, target):
    assert "\x1b" not in specdec_command("generate", "abc abc", "--target", target, "--max-new-tokens", "12").out


def test_the_console_script_works(target):
    """The function that the entry point names, in a process of its own."""
    code = "import sys; from specdec.cli.main import main; sys.argv[0] = 'specdec'; main()"
    words = ["generate", "abc", "--target", target, "--max-new-tokens", "2", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert done.stdout.endswith("\n")


def add_distribution(folder, entries):
    """A package called other-drafts, as pip would leave it."""
    info = folder / "other_drafts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-drafts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specdec.drafters]\n" + "\n".join(entries) + "\n")
    (folder / "other_drafts.py").write_text("def build(context): ...\n")


def test_doctor_tells_what_is_here_and_what_is_not(specdec_command, monkeypatch, tmp_path):
    add_distribution(tmp_path, ["fine = other_drafts:build", "broken = other_drafts:absent"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = specdec_command("doctor")
    assert ran.status == 0
    for line in (
        f"torch: {torch.__version__.split('+')[0]}",  # the list of packages may leave out which build it is
        "smollm2-135m (the default): not fetched; specdec models fetch smollm2-135m",
        "g++: not found",
        "ngram: built in",
        "fine: from other-drafts",
        "broken: from other-drafts, but it does not load (AttributeError",
        "match: lossless yes",
        "rejection: lossless yes",
    ):
        assert line in ran.out
    assert any(f"{kind}:" in ran.out for kind in ("gpu", "gpu 0"))


def test_models_lists_and_finds_what_is_fetched(specdec_command, monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    for words in (("models",), ("models", "list")):
        assert "smollm2-135m: not fetched" in specdec_command(*words).out
    ran = specdec_command("models", "path", "smollm2-135m")
    assert (ran.status, ran.out) == (2, "")
    assert ran.error == "error: smollm2-135m is not fetched yet; run: specdec models fetch smollm2-135m"
    monkeypatch.setattr("specdec.cli.models.is_fetched", lambda _name: True)
    assert str(tmp_path) in specdec_command("models", "path", "smollm2-135m").out
