"""Who may import whom, and the traps of the package mapping."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "specdec": "specdec",
    "drafters": "specdec.drafters",
    "verifiers": "specdec.verifiers",
    "kernels": "specdec.kernels",
    "cli": "specdec.cli",
    "analysis": "specdec.analysis",
}

# Which rooms each room may import from, besides itself. "core" is the files that lie directly in specdec/.
ROOMS: dict[str, str] = {
    "kernels": "",
    "core": "",
    "records": "core",
    "hub": "core records",
    "paging": "core",
    "engine": "core kernels paging",
    "cpu": "core engine",
    "cuda": "core engine kernels",
    "grammar": "core",
    "verifiers": "core",
    "drafters": "core records hub engine cpu grammar",
    "runtime": "core records paging engine cpu cuda drafters verifiers kernels",
    "generation": "core paging engine grammar drafters verifiers runtime",
    "serving": "core engine paging grammar drafters runtime",
    "serve": "core serving",
    "tune": "core records engine drafters verifiers runtime",
    "cli": "core records hub engine cpu cuda kernels grammar drafters verifiers runtime generation serving serve tune analysis",
    "analysis": "core records",
}
# Files in specdec/ that put the rooms below together, and what is for everybody to import from the package itself.
ABOVE_CORE = {"specdec.runtime": "runtime", "specdec": "cli"}


def room_of(module: str) -> str:
    if module in ABOVE_CORE:
        return ABOVE_CORE[module]
    room = module.split(".")[1]
    return room if room in ROOMS else "core"  # budget/ is a part of the core


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join((package, *(part for part in inner if part != "__init__"))), path))
    return found


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name for name in names if name.split(".")[0] == "specdec"}


def within(module: str, packages: list[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_from_the_rooms_below(module: str, path: Path) -> None:
    room = room_of(module)
    allowed = {room, *ROOMS[room].split()}
    wrong = {name for name in imports_of(path) if name != "specdec" and room_of(name) not in allowed}
    assert not wrong, f"{module} ({room}) imports {sorted(wrong)}"


def test_arrows_only_go_down() -> None:
    """A room that could be reached from what it imports would be no room."""

    def below(room: str, seen: frozenset[str] = frozenset()) -> set[str]:
        assert room not in seen, f"{room} imports itself by way of others"
        return {room}.union(*(below(other, seen | {room}) for other in ROOMS[room].split()))

    assert below("cli") == set(ROOMS)


def test_specdec_holds_the_algorithm_and_rooms() -> None:
    """A flat folder of everything is where a newcomer gives up."""
    assert len(list((ROOT / "specdec").glob("*.py"))) <= 16
    assert {path.name for path in (ROOT / "specdec").iterdir() if path.is_dir()} - {
        "__pycache__",
        "data",
        "budget",
    } < set(ROOMS)


def test_the_loop_knows_nothing_concrete() -> None:
    """Drafters, verifiers, models, kernels and the environment reach it as arguments."""
    names = imports_of(ROOT / "specdec" / "decode.py")
    assert {room_of(name) for name in names} == {"core"}
    assert "environ" not in (ROOT / "specdec" / "decode.py").read_text("utf-8")


def test_nobody_imports_the_command_line() -> None:
    """Library code that needs the command line could not be used without it."""
    guilty = [
        m
        for m, path in modules()
        if not within(m, ["specdec.cli"]) and any(within(n, ["specdec.cli"]) for n in imports_of(path))
    ]
    assert not guilty


def test_the_rules_catch_a_forbidden_import(tmp_path: Path) -> None:
    """The check itself must not be blind to imports inside functions."""
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from specdec.drafters.ngram import NgramDrafter\n")
    assert imports_of(file) == {"specdec.drafters.ngram"}
    assert room_of("specdec.drafters.ngram") not in ROOMS["core"].split()


def test_every_package_is_shipped() -> None:
    """A folder that the list in pyproject.toml lacks is there in a checkout and missing in an installation."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {module for module, path in modules() if path.name == "__init__.py"}
    assert found == listed


def test_our_kernels_folder_is_not_the_top_level_package_kernels() -> None:
    """transformers imports a package named kernels if it finds one: with the root on sys.path it would be ours."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_our_kernels_folder_is_harmless_where_it_shadows_that_package() -> None:
    """A root on sys.path (python -m pytest, scripts in the root) must not break transformers."""
    code = (
        "import sys; sys.path.insert(0, '.'); import kernels, transformers; assert not hasattr(kernels, '__version__')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_package_imports_without_torch() -> None:
    """`specdec --help` must not wait for torch."""
    code = "import sys, specdec; assert not {'torch', 'transformers'} & set(sys.modules); print(specdec.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_generate_is_the_function_also_after_its_module_was_imported() -> None:
    """A submodule of the same name as a lazy attribute would replace it."""
    code = "import specdec.generation.wrapper, specdec; assert callable(specdec.generate) and callable(specdec.custom_generate)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What an opt-in test or section of the GPU script uses if someone installed it, and skips without.
OPT_IN = {"speculators", "flashinfer"}
MODULE_OF = {"cupy-cuda13x": "cupy", "cupy-cuda12x": "cupy", "pytest-timeout": "pytest_timeout"}


def third_party(path: Path) -> set[str]:
    """Top-level names of what a file imports that is neither Python's own nor lies beside it or in the root."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    homes = (
        path.parent,
        *(parent for parent in path.parents if parent.is_relative_to(ROOT)),
        *(folder for folder in (ROOT / "tests").iterdir() if folder.is_dir()),
        ROOT / "benchmarks",
    )
    ours = {
        name
        for name in names
        for home in homes
        if (home / f"{name}.py").exists() or (home / name / "__init__.py").exists()
    }
    return names - set(sys.stdlib_module_names) - ours


@pytest.mark.slow
def test_whatever_is_imported_is_declared_and_what_make_installs_is_pinned() -> None:
    """A package that only its author's machine has would stop every other one at the first test."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {
        text: re.split(r"[<>=!~ \[]", text)[0]
        for group in (project["dependencies"], *extras.values())
        for text in group
    }
    declared = {MODULE_OF.get(name, name.replace("-", "_")) for name in names.values()}
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in (*FOLDERS, "tests", "benchmarks", "notebooks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in third_party(path)
    }
    assert len(found) > 100, "the search itself must see the imports"
    undeclared = {(path, name) for path, name in found if name not in declared | OPT_IN}
    assert not undeclared, f"not in pyproject.toml: {sorted(undeclared)}"

    pinned = {re.split("==", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    own = f"{project['name']}["  # an extra that another one includes
    included = [text.removeprefix(own).removesuffix("]") for text in extras["dev"] if text.startswith(own)]
    assert included == ["serve"]
    groups = (project["dependencies"], extras["dev"], *(extras[name] for name in included))
    installed = [names[text] for group in groups for text in group if not text.startswith(own)]
    assert not [name for name in installed if name.lower() not in pinned]
