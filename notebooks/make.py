"""Make again what is committed here: the measured data, the figures of docs/figures and the notebooks' outputs.

python notebooks/make.py measure     # about ten minutes on two cores that do nothing else
python notebooks/make.py figures
python notebooks/make.py execute
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = "notebooks/data"
PROMPTS = ["--limit", "16", "--max-new-tokens", "48"]
DRAFTERS = ["--drafter", "ngram", "--drafter", "recycling", "--drafter", "hybrid"]
FEW = ["--limit", "8", "--max-new-tokens", "32", "--batch-size", "4", "--drafter", "ngram", "--drafter", "hybrid"]
TUNED = ["--limit", "8", "--max-new-tokens", "48", "--drafter", "ngram", "--drafter", "hybrid"]

MEASURE = [
    ["bench", *PROMPTS, *DRAFTERS, "--trace-probs", "--trace", f"{DATA}/bench.jsonl", "--output", f"{DATA}/bench.json"],
    ["bench", *FEW, "--trace", f"{DATA}/bench-b4.jsonl", "--output", f"{DATA}/bench-b4.json"],
    ["tune", *TUNED, "--output", f"{DATA}/tuned.json"],
]
FIGURES = [
    ["figures", "--trace", f"{DATA}/bench.jsonl", "--bench", f"{DATA}/bench.json", "--tuned", f"{DATA}/tuned.json",
     "--out", "docs/figures", "--format", "svg"],
]  # fmt: skip


def run(commands: list[list[str]]) -> None:
    for words in commands:
        print("specdec", *words, flush=True)
        subprocess.run([str(Path(sys.executable).with_name("specdec")), *words], cwd=ROOT, check=True)


def execute() -> None:
    """Run every notebook in its folder and keep its outputs."""
    import nbformat
    from nbclient import NotebookClient

    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when it ran, which changes with every run
        nbformat.write(notebook, path)


if __name__ == "__main__":
    stages = {"measure": lambda: run(MEASURE), "figures": lambda: run(FIGURES), "execute": execute}
    if len(sys.argv) != 2 or sys.argv[1] not in stages:
        sys.exit(__doc__)
    stages[sys.argv[1]]()
