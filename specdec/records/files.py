"""Output files: found unwritable before the run, and replaced in one go after it."""

from __future__ import annotations

import json
import os
import secrets
import stat
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
        if _is_replaced(target := _target(path)):
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise ValueError(f"cannot write {what} {path} ({error.strerror or error}); name another file") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, in one go."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, in one go."""
    write_file(path, lambda file: file.write_text(text, "utf-8"))


def write_file(path: Path, write: Callable[[Path], object], mode: int = 0o666) -> None:
    """Let ``write`` make a file beside ``path`` and move it there, so that a reader never sees half of it.

    A file that is replaced keeps its permissions; a new one gets ``mode`` less the process's umask, which the system
    subtracts by itself: setting the umask, even to read it, would hold for all threads. Behind a symbolic link its target
    is replaced and the link stays.
    """
    target = _target(path)
    if not _is_replaced(target):
        write(target)
        return
    old = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode if old is None else 0o600)
    kept = stat.S_IMODE(os.fstat(handle).st_mode) if old is None else old
    os.close(handle)
    try:
        write(temporary)
        temporary.chmod(kept)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _target(path: Path) -> Path:
    """What ``path`` means: where it is a symbolic link, the file that this leads to."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_replaced(path: Path) -> bool:
    """A device or a pipe is written to, never replaced."""
    return path.is_file() or not path.exists()
