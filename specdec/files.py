"""Output files: found unwritable before the run, and replaced in one go after it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check_writable(path: Path, what: str) -> None:
    """Try, without changing anything, whether ``path`` can be written.

    Raises:
        ValueError: it cannot; the message says why.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        if path.exists():
            with path.open("ab"):
                pass
        if _is_replaced(path):
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise ValueError(f"cannot write {what} {path} ({error.strerror or error}); name another file") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, in one go."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, in one go."""
    write_file(path, lambda file: file.write_text(text, "utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path`` and move it there, so that a reader never sees half of it."""
    if not _is_replaced(path):
        write(path)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, _mode())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _is_replaced(path: Path) -> bool:
    """A device or a pipe is written to, never replaced; nor is a link, whose target is meant."""
    return not path.is_symlink() and (path.is_file() or not path.exists())


def _mode() -> int:
    """What a new file gets: mkstemp's are private."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
