"""The text of a kernel: one ``.cu`` file with our own headers put in, so that its hash names everything it holds.

(CuPy's cache key does not cover the content of included files.)
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

CUDA = Path(__file__).resolve().parent / "cuda"
_INCLUDE = re.compile(r'^#include "([^"]+)"$')


@lru_cache(maxsize=64)
def flattened(file: str, folder: Path = CUDA) -> str:
    """The text of ``folder/file`` with each ``#include "..."`` replaced by that file, once."""
    return "\n".join(_lines(file, folder, set())) + "\n"


def _lines(file: str, folder: Path, seen: set[str]) -> list[str]:
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate((folder / file).read_text("utf-8").splitlines(), 1):
        found = _INCLUDE.match(line)
        if found and found[1] not in seen:
            lines += [*_lines(found[1], folder, seen), f'#line {number + 1} "{file}"']
        elif not found and line != "#pragma once":
            lines.append(line)
        else:
            lines.append("")
    return lines
