"""Make again what is committed here: the measured data, the figures of docs/figures and the notebooks' outputs.

python notebooks/make.py measure     # about ten minutes on two cores that do nothing else
python notebooks/make.py figures
python notebooks/make.py execute     # or only those named: execute 4_speedup_model
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = "notebooks/data"
PROMPTS = ["--limit", "16", "--max-new-tokens", "48"]
DRAFTERS = ["--drafter", "ngram", "--drafter", "recycling", "--drafter", "hybrid"]
# Where drafts die shows only where drafting goes on all the same: the adaptive budget stops it there.
FIXED = [
    "--limit",
    "12",
    "--max-new-tokens",
    "40",
    "--fixed",
    "--max-nodes",
    "12",
    "--drafter",
    "ngram",
    "--drafter",
    "hybrid",
]
# Full trees in every step: costs of wide passes, and what drafts bring in a batch where nobody holds them back.
FEW = [
    *["--limit", "8", "--max-new-tokens", "32", "--batch-size", "4", "--fixed", "--max-nodes", "8"],
    *["--drafter", "ngram", "--drafter", "hybrid"],
]
TUNED = ["--limit", "8", "--max-new-tokens", "48", "--drafter", "ngram", "--drafter", "hybrid"]

MEASURE = [
    ["bench", *PROMPTS, *DRAFTERS, "--trace-probs", "--trace", f"{DATA}/bench.jsonl", "--output", f"{DATA}/bench.json"],
    ["bench", *FIXED, "--trace-probs", "--trace", f"{DATA}/bench-fixed.jsonl", "--output", f"{DATA}/bench-fixed.json"],
    ["bench", *FEW, "--trace", f"{DATA}/bench-b4.jsonl", "--output", f"{DATA}/bench-b4.json"],
    ["tune", *TUNED, "--output", f"{DATA}/tuned.json"],
]
# Those that docs/analysis.md shows; the tree is one of the run with --fixed.
SHOWN = "docs/figures"
OUT = ["--out", SHOWN, "--format", "svg"]
FIGURES = [
    ["figures", "--bench", f"{DATA}/bench.json", "--only", "speedup_comparison", *OUT],
    ["figures", "--trace", f"{DATA}/bench-fixed.jsonl", "--only", "tree_structure_visualization", *OUT],
]


def run(commands: list[list[str]]) -> None:
    for words in commands:
        print("specdec", *words, flush=True)
        subprocess.run([str(Path(sys.executable).with_name("specdec")), *words], cwd=ROOT, check=True)


def draw() -> None:
    run(FIGURES)
    for dark in (ROOT / SHOWN).glob("*-dark.svg"):  # the pages show the light ones
        dark.unlink()


def execute(names: list[str]) -> None:
    """Run the notebooks, all or those named, in their folder and keep their outputs."""
    import nbformat
    from nbclient import NotebookClient

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=600, coalesce_streams=True, resources=where)
        client.extra_arguments = ["--log-level=ERROR"]
        client.execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when it ran, which changes with every run
        nbformat.write(notebook, path)


if __name__ == "__main__":
    stages = {
        "measure": lambda _: run(MEASURE),
        "figures": lambda _: draw(),
        "execute": execute,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        sys.exit(__doc__)
    stages[sys.argv[1]](sys.argv[2:])
