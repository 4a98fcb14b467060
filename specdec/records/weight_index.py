"""The index of weights that are in parts: which file holds which tensor, never one outside the checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdec.errors import CheckpointError

_RULE = "weight_map must say of each tensor which file of the same folder holds it"


def weight_files(index: Path) -> dict[str, Path]:
    """The file of each tensor that ``index`` (a ``*.index.json``) names; whether it is there is not looked at.

    Raises:
        CheckpointError: no JSON object, no ``weight_map`` or an empty one, or an entry that names no file of the folder.
    """
    weight_map = read_index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no index of weights: {_RULE}, got {weight_map!r:.60}")
    # Thousands of tensors lie in a few files.
    files: dict[str, Path] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: {_RULE}, got {name!r:.60} for {key}")
        if name not in files:
            files[name] = file_inside(index.parent, name, f"{index}: {_RULE}; {key} is said to be")
    return {key: files[name] for key, name in weight_map.items()}


def read_index(index: Path) -> dict[str, Any]:
    """The JSON object in ``index``.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{index} must hold a JSON object, got {type(content).__name__}")
    return content


def file_inside(folder: Path, name: str, what: str) -> Path:
    """The file ``name`` of ``folder``, where a file that came with the folder names it; ``what`` begins the message.

    Such a file comes from whoever made the checkpoint, so a path that leaves the folder is refused, also where it does so
    through a symbolic link. In the Hub's cache, whose files are all links, it may lead anywhere in the cached repository.

    Raises:
        CheckpointError: an absolute path, one that leaves the folder, or none.
    """
    try:
        place, home = (folder / name).resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise CheckpointError(f"{what} in {name!r}, which is no path ({error})") from None
    leaves = Path(name).is_absolute() or ".." in Path(name).parts or not place.is_relative_to(_repository(home))
    if leaves:
        raise CheckpointError(
            f"{what} in {name!r}, which leads out of the folder, to {place}; put the file into the folder"
        )
    if place == home:
        raise CheckpointError(f"{what} in {name!r}, which is no file")
    return folder / name


def _repository(folder: Path) -> Path:
    """``folder`` itself, or of a snapshot in the Hub's cache the repository that its links point into."""
    is_snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent if is_snapshot else folder
