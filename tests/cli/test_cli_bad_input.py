"""Whatever is wrong with the input, the answer is one clear line on standard error, status 2, and no traceback."""

from __future__ import annotations

import json

import pytest
import tinychat
import torch


@pytest.fixture
def specdec_command(monkeypatch, capsys):
    return tinychat.Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.fixture
def refused(specdec_command, monkeypatch):
    """Run a command that must be refused; its error line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments):
        ran = specdec_command(*arguments)
        assert ran.status == 2, ran
        assert ran.out == ""
        return ran.error

    return run


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(refused, target, prompt):
    assert "the prompt is empty" in refused("generate", prompt, "--target", target)


def test_a_prompt_past_the_context(refused, target):
    said = refused("generate", "x" * 400, "--target", target, "--max-new-tokens", "200")
    assert "past the model's context of 512" in said
    assert "ask for at most 110 new tokens" in said
    said = refused("generate", "x" * 600, "--target", target)
    assert said.endswith("shorten it")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--max-new-tokens", "0"), "max_new_tokens must be at least 1, got 0"),
        (("--max-new-tokens", "-3"), "max_new_tokens must be at least 1, got -3"),
        (("--max-nodes", "-1"), "max_nodes must be"),
        (("--temperature", "-0.5"), "temperature must be 0 (greedy) or a positive number, got -0.5"),
        (("--temperature", "nan"), "temperature must be"),
        (("--seed", "-1"), "seed must be in [0, 2**64), got -1"),
        (("--threads", "0"), "threads must be at least 1, got 0"),
        (("--verifier", "nope"), "no verifier is called 'nope'; choose one of block, match"),
        (("--drafter", "nope"), "no drafter is called 'nope'; choose one of auto, eagle"),
        (("--drafter", "ngram:max_order"), "drafter options are written name:option=value"),
        (("--drafter", "ngram:colour=1"), "drafter 'ngram' does not take these options"),
        (("--drafter", "ngram:max_order=0"), "max_order must be at least 1"),
        (("--drafter", "model"), "--drafter-model NAME_OR_PATH"),
        (("--dtype", "float8"), "dtype must be one of"),
        (("--device", "gpux"), "device must be 'auto' or a torch device"),
        (("--drafter-model", "/no/such/folder"), "there is no folder /no/such/folder"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_options_out_of_range(refused, target, command, options, complaint):
    words = ("generate", "abc") if command == "generate" else ("bench", "--limit", "1")
    assert complaint in refused(*words, "--target", target, *options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--top-k", "-1"), "top_k must be 0 (off) or a positive number, got -1"),
        (("--top-p", "0"), "top_p must be in (0, 1], got 0.0"),
        (("--min-p", "2"), "min_p must be in [0, 1], got 2.0"),
        (("--system", "x", "--no-chat"), "a system message needs the chat template"),
    ],
)
def test_options_of_generate(refused, target, options, complaint):
    assert complaint in refused("generate", "abc", "--target", target, *options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--limit", "0"), "limit must be at least 1, got 0"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--batch-size", "-2"), "batch_size must be at least 1, got -2"),
        (("--prompts", "/no/such/file.jsonl"), "cannot read the prompts file /no/such/file.jsonl"),
    ],
)
def test_options_of_bench(refused, target, options, complaint):
    assert complaint in refused("bench", "--target", target, *options)


@pytest.mark.parametrize("command", [("generate", "abc"), ("bench", "--limit", "1")])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("smollm-135m", "HF_HUB_OFFLINE forbids the network"),
        ("what is this?", "neither a built-in model"),
    ],
)
def test_an_unknown_model(refused, command, name, complaint):
    assert complaint in refused(*command, "--target", name)


def test_something_that_is_no_number(specdec_command, target):
    """typer's own usage errors have its own form, and the same status."""
    ran = specdec_command("bench", "--target", target, "--limit", "many")
    assert ran.status == 2
    assert "--limit" in ran.err
    assert "Traceback" not in ran.err


def test_a_corrupt_prompts_file_is_told_by_its_line(refused, target, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": \n')
    assert f"{path}, line 2: not JSON" in refused("bench", "--target", target, "--prompts", str(path))


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_question_past_the_context_is_named_before_anything_is_measured(refused, target, tmp_path, batch_size):
    lines = [{"prompt": "short"}, {"question_id": "long one", "turns": ["x" * 500]}]
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", lines)
    trace = tmp_path / "t.jsonl"
    words = ("--max-new-tokens", "20", "--batch-size", batch_size, "--trace", str(trace))
    said = refused("bench", "--target", target, "--prompts", prompts, *words)
    assert "question long one needs 502 tokens and 20 new ones, which is past the model's context of 512" in said
    assert not trace.exists()


def test_a_later_turn_past_the_context_is_found_before_the_run(refused, target, tmp_path):
    """Its earlier answers are not known yet; they are taken at their longest."""
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", [{"question_id": 4, "turns": ["x" * 200, "y" * 200]}])
    said = refused("bench", "--target", target, "--prompts", prompts, "--max-new-tokens", "80")
    assert "question 4, turn 2 (with its earlier answers) needs" in said


def test_token_ids_outside_the_vocabulary(refused, tmp_path):
    """A tokenizer of another model: generate() would crash inside the embedding."""
    target = tinychat.save(tmp_path, tokenizer=tinychat.make_tokenizer(num_extra=5))
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", [{"question_id": 5, "turns": ["say <x3>"]}])
    expected = f"has token ids up to 262, but the model knows {tinychat.VOCAB}"
    assert f"the prompt {expected}" in refused("generate", "say <x3>", "--target", target)
    assert f"question 5 {expected}" in refused("bench", "--target", target, "--prompts", prompts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_numbers(refused, tmp_path, value, temperature):
    model = tinychat.make_model()
    model.get_output_embeddings().weight.data[7] = value
    target = tinychat.save(tmp_path, model)
    for words in (("generate", "abc"), ("bench", "--limit", "1", "--max-new-tokens", "4")):
        said = refused(*words, "--target", target, "--temperature", temperature)
        assert "NaN" in said or "infinit" in said


@pytest.mark.parametrize("option", ["--output", "--trace"])
def test_a_file_that_cannot_be_written_is_found_before_the_model_is_loaded(refused, tmp_path, option):
    """Minutes of measuring must not end in a missing folder."""
    words = ("bench", "--target", "/no/such/model")
    assert f"cannot write {option} {tmp_path}/absent/b.json" in refused(
        *words, option, str(tmp_path / "absent" / "b.json")
    )
    assert "it is a directory" in refused(*words, option, str(tmp_path))
    assert f"cannot write {option} /proc/b.json" in refused(*words, option, "/proc/b.json")


def test_files_that_would_overwrite_each_other(refused, target, tmp_path):
    path, prompts = str(tmp_path / "b.json"), tinychat.write_prompts(tmp_path / "p.jsonl", [{"prompt": "abc"}])
    assert "are the same file" in refused("bench", "--target", target, "--output", path, "--trace", path)
    assert "and the prompts are the same file" in refused(
        "bench", "--target", target, "--prompts", prompts, "--trace", prompts
    )
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"prompt": "abc"}, "the prompts are still there"


def test_a_system_message_without_a_template(refused, tmp_path):
    target = tinychat.save(tmp_path, tokenizer=tinychat.make_tokenizer(template=None))
    assert "this model has none" in refused("generate", "abc", "--target", target, "--system", "x")


def test_a_fault_of_ours_is_one_line_with_its_own_status(specdec_command, target, monkeypatch):
    monkeypatch.setattr("specdec.runtime.CausalLM", lambda _model, **_: 1 // 0)
    ran = specdec_command("generate", "abc", "--target", target)
    assert ran.status == 3
    assert ran.error.startswith("error: unexpected ZeroDivisionError")
    assert "SPECDEC_DEBUG=1" in ran.error


def test_debug_shows_the_traceback(specdec_command, monkeypatch):
    monkeypatch.setenv("SPECDEC_DEBUG", "1")
    with pytest.raises(ValueError, match="the prompt is empty"):
        specdec_command("generate", "")


def test_memory_that_runs_out_is_said_in_words(specdec_command, target, monkeypatch):
    def full(_model, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("specdec.runtime.CausalLM", full)
    ran = specdec_command("generate", "abc", "--target", target)
    assert ran.status == 2
    assert "use a smaller model" in ran.error


def test_ctrl_c_while_loading(specdec_command, target, monkeypatch):
    def interrupted(_model, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("specdec.runtime.CausalLM", interrupted)
    ran = specdec_command("generate", "abc", "--target", target)
    assert ran.status == 130
    assert "Traceback" not in ran.err
