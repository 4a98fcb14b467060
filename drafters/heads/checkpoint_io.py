"""Tensors and configs of drafter checkpoints: reading from any published container, checking, writing atomically.

Knows no format: the formats name the keys and shapes that they expect, and whatever is missing, left over or of
another shape is an error here. An unknown key that is skipped would be a drafter that is wrong in silence.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import CheckpointError
from specdec.records.files import write_file, write_json
from specdec.records.weight_index import weight_files

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_NAMES = (WEIGHTS, "pytorch_model.bin")  # and their indices, where a checkpoint is in parts

Shape = tuple[int, ...]


class TensorFiles:
    """The tensors of a checkpoint file or folder, read when asked for.

    Args:
        path: a .safetensors, .bin or .pt file, or a folder with one, whole or in parts with an index.
        names: file names that this format uses, looked for in a folder before the usual ones.

    Raises:
        CheckpointError: nothing there, or a file that cannot be read as plain tensors.
    """

    def __init__(self, path: Path, names: Iterable[str] = ()) -> None:
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        self._where = self._find(path, (*names, *_NAMES))

    @property
    def keys(self) -> list[str]:
        return list(self._where)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``keys``, on the CPU; no others are read from safetensors files."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._where[key], []).append(key)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            tensors.update(self._read(file, wanted))
        return tensors

    def _find(self, path: Path, names: Iterable[str]) -> dict[str, Path]:
        """Which file each key is in."""
        if path.is_file():
            return dict.fromkeys(self._keys(path), path)
        if not path.is_dir():
            raise CheckpointError(f"there is no drafter checkpoint at {path}: give a file or folder that exists")
        for name in names:
            if (path / name).is_file():
                return dict.fromkeys(self._keys(path / name), path / name)
            if (path / f"{name}.index.json").is_file():
                return weight_files(path / f"{name}.index.json")
        raise CheckpointError(f"{path} holds none of {', '.join(names)}: it is no drafter checkpoint")

    def _keys(self, file: Path) -> list[str]:
        if file.suffix != ".safetensors":
            return list(self._unpickled(file))
        with _explained(file), safe_open(str(file), "pt") as opened:
            return list(opened.keys())

    def _read(self, file: Path, keys: list[str]) -> dict[str, Tensor]:
        if not file.is_file():
            raise CheckpointError(f"the checkpoint's index names {file.name}, which is not in {file.parent}")
        held = set(self._keys(file))
        missing = [key for key in keys if key not in held]
        if missing:
            raise CheckpointError(
                f"the checkpoint's index says that {file} holds {_listed(missing)}, which it does not"
            )
        with _explained(file):
            if file.suffix != ".safetensors":
                return {key: self._unpickled(file)[key] for key in keys}
            with safe_open(str(file), "pt") as opened:
                return {key: opened.get_tensor(key) for key in keys}

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        if file not in self._pickled:
            loaded = read_plain(file)
            if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
                raise CheckpointError(f"{file} must hold a flat table of tensors, as a state dict does")
            self._pickled[file] = loaded
        return self._pickled[file]


def read_plain(file: Path) -> Any:
    """What a .pt or .bin file holds, tensors on the CPU; nothing in it is run.

    Raises:
        CheckpointError: damaged, or something else than tensors and plain values.
    """
    with _explained(file):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds more than plain tensors and is not run to find out"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} is damaged or no checkpoint: {why}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: it says what the drafter's weights mean") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], where: object) -> None:
    """Check that ``tensors`` holds exactly the ``expected`` keys and shapes.

    Raises:
        CheckpointError: a key is missing, left over or of another shape; it names the first few.
    """
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise CheckpointError(f"{where} lacks {_listed(missing)}: it is incomplete or of another format")
    unknown = [key for key in tensors if key not in expected]
    if unknown:
        raise CheckpointError(f"{where} holds {_listed(unknown)}, which this format does not know: it cannot be used")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(f"{key} in {where} must have shape {shape}, got {tuple(tensors[key].shape)}")


def check_vocab(target_ids: Tensor, vocab_size: int, what: str) -> None:
    """Check that ``target_ids`` (Vd,) are different ids of a vocabulary of ``vocab_size``.

    Raises:
        CheckpointError: another shape or type, an id outside, or one twice.
    """
    if target_ids.dim() != 1 or target_ids.is_floating_point() or len(target_ids) == 0:
        raise CheckpointError(
            f"{what} must be a list of token ids, got {target_ids.dtype} of {tuple(target_ids.shape)}"
        )
    low, high = int(target_ids.min()), int(target_ids.max())
    if low < 0 or high >= vocab_size:
        raise CheckpointError(f"{what} must be token ids in [0, {vocab_size}) (the target's), got {low} to {high}")
    if len(torch.unique(target_ids)) < len(target_ids):
        raise CheckpointError(f"{what} names a token id twice")


def _listed(keys: list[str]) -> str:
    more = len(keys) - 4
    return ", ".join(keys[:4]) + (f" and {more} more" if more > 0 else "")


def save_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, weights: str = WEIGHTS) -> None:
    """Write ``path``/config.json and the tensors; each file appears whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    write_file(path / weights, lambda file: save_file(plain, file, {"format": "pt"}))
    write_json(path / CONFIG, config)
