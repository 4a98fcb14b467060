"""``specdec doctor``: what is here, what is not, and what to do about it. Never fails for what is absent."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata

import typer

EXAMPLE = "Example: specdec doctor"

# Module -> what it is for, and how to get it.
_OPTIONAL = {
    "cupy": ("own CUDA kernels without a compiler", 'pip install "specdec-toolkit[cuda]"'),
    "llguidance": ("grammar drafts", "pip install llguidance"),
    "arctic_inference": ("suffix-tree drafts", "pip install arctic-inference"),
    "fastapi": ("specdec serve", 'pip install "specdec-toolkit[serve]"'),
    "accelerate": ("loading straight onto a GPU", "pip install accelerate"),
}
_TOOLS = {
    "g++": "a C++ compiler, for torch.compile",
}


def doctor() -> None:
    """Show versions, devices, models, drafters and verifiers, and say what is missing and why.

    Always ends with status 0: nothing here is an error.
    """
    for title, lines in (
        ("versions", _versions()),
        ("machine", _machine()),
        ("optional parts", _optional()),
        ("kernels", _kernels()),
        ("models", _models()),
        ("drafters", _drafters()),
        ("verifiers", _verifiers()),
    ):
        typer.echo(title)
        for line in lines:
            typer.echo(f"  {line}")


def _versions() -> Iterator[str]:
    from specdec.records.provenance import project_commit, versions

    for name, version in versions().items():
        yield f"{name}: {version or 'not installed'}"
    commit, is_dirty = project_commit()
    yield f"commit: {commit or 'not a checkout'}{' (changed since)' if is_dirty else ''}"


def _machine() -> Iterator[str]:
    import torch

    from specdec.records.provenance import machine

    facts = machine()
    yield f"cpu: {facts['cpu']}, {facts['usable_cores']} of {facts['cores']} cores usable, torch uses {torch.get_num_threads()} threads"
    yield f"memory: {facts['memory_gb'] or 'unknown'} GB"
    yield f"platform: {facts['platform']}"
    yield f"bfloat16 on the CPU: {_cpu_bf16()}"
    if facts["gpus"]:
        for i, name in enumerate(facts["gpus"]):
            bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
            yield f"gpu {i}: {name}, driver {facts['gpu_driver'] or 'unknown'}, bfloat16 {bf16}"
    else:
        why = "torch sees no NVIDIA GPU" if torch.version.cuda else "this torch is built for the CPU only"
        yield f"gpu: none ({why})"


def _cpu_bf16() -> str:
    """Whether the processor multiplies bfloat16 itself; torch can do it on any, slowly."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            words = set(file.read().split())
    except OSError:
        return "works; whether the processor speeds it up is unknown"
    kinds = sorted({"amx_bf16", "avx512_bf16", "bf16"} & words)
    return (
        f"works, sped up by {', '.join(kinds)}"
        if kinds
        else "works, but slowly: this processor has no instructions for it"
    )


def _optional() -> Iterator[str]:
    for module, (use, how) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield f"{module}: not installed ({use}); {how}"
        else:
            yield f"{module}: {_distribution_version(module)} ({use})"
    for tool, use in _TOOLS.items():
        place = shutil.which(tool)
        yield f"{tool}: {_first_line_with_version(place) if place else 'not found'} ({use})"


def _kernels() -> Iterator[str]:
    from specdec.kernels.dispatch import describe

    yield from describe()


def _distribution_version(module: str) -> str:
    """The version of the package that brings ``module``: cupy's name depends on its CUDA."""
    names = metadata.packages_distributions().get(module, [module])
    try:
        return metadata.version(names[0])
    except metadata.PackageNotFoundError:
        return "installed"


def _first_line_with_version(tool: str) -> str:
    try:
        completed = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "found, but does not run"
    lines = [line.strip() for line in completed.stdout.splitlines() if any(c.isdigit() for c in line)]
    return lines[0] if lines else "found"


def _models() -> Iterator[str]:
    from specdec.hub.catalog import DEFAULT_MODEL, cache_dir, is_fetched, known_models, model_path

    for builtin in known_models():
        default = " (the default)" if builtin.name == DEFAULT_MODEL else ""
        if is_fetched(builtin.name):
            yield f"{builtin.name}{default}: fetched, in {model_path(builtin.name)}"
        else:
            yield f"{builtin.name}{default}: not fetched; specdec models fetch {builtin.name}"
    yield f"cache: {cache_dir()}"


def _drafters() -> Iterator[str]:
    from specdec.drafters import DRAFTERS, ENTRY_POINTS, drafter_names

    origins = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    for name in drafter_names():
        if name in DRAFTERS:
            yield f"{name}: built in"
            continue
        point = origins[name]
        package = point.dist.name if point.dist else point.value
        try:
            point.load()
        except Exception as error:  # whatever another package raises when it is imported
            yield f"{name}: from {package}, but it does not load ({type(error).__name__}: {error})"
        else:
            yield f"{name}: from {package}"


def _verifiers() -> Iterator[str]:
    from specdec.verifiers import VERIFIERS, make_verifier

    for name in VERIFIERS:
        verifier = make_verifier(name)
        draws = ", ".join(sorted(draw.value for draw in verifier.draws))
        yield f"{name}: lossless {'yes' if verifier.lossless else 'NO'}; for trees drawn {draws}"
