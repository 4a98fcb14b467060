"""From a name to a model: a built-in one that needs no hub, a local folder, or any Hugging Face Hub id.

Nothing here imports torch or transformers until a model is loaded.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import CheckpointError, ModelUnavailableError
from specdec.hub.catalog import DEFAULT_MODEL, known_models
from specdec.hub.fetch import Progress, fetch_model
from specdec.hub.quiet import quiet
from specdec.records.weight_index import file_inside, read_index, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
_WEIGHTS, _INDEX = ("model.safetensors", "pytorch_model.bin"), ".index.json"  # as transformers looks for them
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


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
    if name_or_path in [builtin.name for builtin in known_models()]:
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
        names = ", ".join(builtin.name for builtin in known_models())
        raise ModelUnavailableError(f"{text!r} is neither a built-in model ({names}), a folder, nor a valid Hub id")
    return text


def _load(source: Path | str, read: Callable[..., Any]) -> Any:
    """``read(local_files_only=True)``, then for a Hub id also over the network. Failures become one sentence."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        try:
            with quiet():
                return read(local_files_only=True)
        except OSError:
            if isinstance(source, Path):
                raise
        _check_on_hub(source)
        with quiet(hide_bars=False):  # a download may take long: let the Hub's own bars show
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
        CheckpointError: see :mod:`specdec.records.weight_index`.
    """
    from transformers.utils import cached_file

    weights_file = getattr(config, "transformers_weights", None)
    if weights_file and isinstance(source, Path):
        file_inside(source, str(weights_file), f"{source / 'config.json'}: transformers_weights are said to be")
    names = [weights + _INDEX for weights in _WEIGHTS] if weights_file is None else [str(weights_file)]
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
        with quiet():
            model_info(hub_id, timeout=10)
    except RepositoryNotFoundError:
        reason = "the Hugging Face Hub has no such model, or it is private and you are not logged in"
    except OfflineModeIsEnabled:
        reason = "it is not in the local cache, and HF_HUB_OFFLINE forbids the network"
    except Exception as error:  # the Hub's client raises errors of several HTTP libraries, with no common base
        reason = f"it is not in the local cache, and the Hugging Face Hub cannot be reached: {_first_line(error)}"
    else:
        return
    close = difflib.get_close_matches(hub_id, [builtin.name for builtin in known_models()], n=1) or [DEFAULT_MODEL]
    raise ModelUnavailableError(
        f"model {hub_id!r} is not available ({reason}); name a local folder or the built-in {close[0]}"
    )


def _first_line(error: Exception) -> str:
    """With the next one, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
