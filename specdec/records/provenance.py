"""Where a result comes from: command, versions, machine, commit, date. No user names, no home directories."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "accelerate", "tokenizers", "safetensors", "llguidance")


def collect(
    command: Sequence[str],
    *,
    dtype: str,
    device: str,
    models: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is needed to judge and repeat a measurement, ready for JSON.

    Args:
        command: the words of the command line.
        dtype, device: what the target ran in and on.
        models: role ("target", "drafter") -> what is known of that model, such as its id and the hash of its source.
        settings: whatever else decided the result.
    """
    import torch

    commit, is_dirty = project_commit()
    return {
        "command": without_home(shlex.join(command)),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": is_dirty,
        "versions": versions(),
        "machine": machine(),
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "models": {role: _clean(facts) for role, facts in models.items()},
        "settings": _clean(settings),
    }


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the packages that decide speed and results; None where one is absent."""
    numbers: dict[str, str | None] = {
        "specdec": import_module("specdec").__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            numbers[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            numbers[name] = None
    return numbers


def machine() -> dict[str, Any]:
    """The hardware, in words that say nothing of its owner."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": num_usable_cores(),
        "memory_gb": memory_gb(),
        "gpus": gpus,
        "gpu_driver": gpu_driver() if gpus else None,
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    """The processor's name as its maker gives it, as far as the system tells."""
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        info = ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def num_usable_cores() -> int | None:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_gb() -> float | None:
    """The machine's main memory, in 1e9 bytes."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def gpu_driver() -> str | None:
    """The version of the NVIDIA driver, if its tool is here."""
    output = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return output.splitlines()[0].strip() if output else None


def project_commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package runs from and whether it was changed since; None where there is none.

    The file is asked for by name, so that an installation inside somebody else's checkout does not take that
    project's commit for ours.
    """
    here = Path(__file__).resolve().parent.with_name("__init__.py")
    git = ["git", "--no-optional-locks", "-C", str(here.parent)]
    if _output([*git, "ls-files", "--error-unmatch", here.name]) is None:
        return None, None
    commit = _output([*git, "rev-parse", "HEAD"])
    if commit is None:
        return None, None
    status = _output([*git, "status", "--porcelain"])
    return commit, None if status is None else bool(status)


def without_home(text: str) -> str:
    """``text`` with the home directory written as ~."""
    home = str(Path.home()).rstrip("/")
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text) if home else text


def _clean(value: Any) -> Any:
    if isinstance(value, str | Path):
        return without_home(str(value))
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def _output(command: list[str]) -> str | None:
    """What ``command`` prints, or None if it fails or does not exist."""
    try:
        completed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
