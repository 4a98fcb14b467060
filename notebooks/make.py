"""Make again what is committed here: the measured data, the figures of docs/figures and the notebooks' outputs.

python notebooks/make.py draft       # a small draft model, about half an hour; what lies in runs/draft is taken as it is
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
# A draft model's trees against Medusa's heads, as many nodes each.
DRAFT = "runs/draft"
TRAIN = ["train", "draft", "--conversations", "1856", "--dtype", "bfloat16", "--minutes", "9", "--output", DRAFT]
PAIR = [
    *["--limit", "8", "--max-new-tokens", "40", "--fixed", "--max-nodes", "8"],
    *["--drafter", "model:shape=2x2x1", "--drafter-model", DRAFT, "--drafter", "medusa"],
]
TUNED = ["--limit", "8", "--max-new-tokens", "48", "--drafter", "ngram", "--drafter", "hybrid"]

MEASURE = [
    ["bench", *PROMPTS, *DRAFTERS, "--trace-probs", "--trace", f"{DATA}/bench.jsonl", "--output", f"{DATA}/bench.json"],
    ["bench", *FIXED, "--trace-probs", "--trace", f"{DATA}/bench-fixed.jsonl", "--output", f"{DATA}/bench-fixed.json"],
    ["bench", *FEW, "--trace", f"{DATA}/bench-b4.jsonl", "--output", f"{DATA}/bench-b4.json"],
    ["bench", *PAIR, "--trace", f"{DATA}/bench-pair.jsonl", "--output", f"{DATA}/bench-pair.json"],
    ["tune", *TUNED, "--output", f"{DATA}/tuned.json"],
]
OUT = ["--out", "docs/figures", "--format", "svg"]
ACCEPTANCE = ["acceptance_rate_analysis", "acceptance_by_depth_and_rank", "acceptance_by_entropy"]
TREES = ["tree_structure_visualization", "tree_attention_mask", "speculative_algorithm_flow"]
ONLY = [word for name in ACCEPTANCE + TREES for word in ("--only", name)]
ALL = ["--trace", f"{DATA}/bench.jsonl", "--bench", f"{DATA}/bench.json", "--tuned", f"{DATA}/tuned.json"]
FIGURES = [
    ["figures", *ALL, *OUT],
    ["figures", "--trace", f"{DATA}/bench-fixed.jsonl", *ONLY, *OUT],
    ["figures", "--trace", f"{DATA}/bench-pair.jsonl", "--only", "specinfer_vs_medusa", *OUT],
]


def run(commands: list[list[str]]) -> None:
    for words in commands:
        print("specdec", *words, flush=True)
        subprocess.run([str(Path(sys.executable).with_name("specdec")), *words], cwd=ROOT, check=True)


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
        "draft": lambda _: run([TRAIN]),
        "measure": lambda _: run(MEASURE),
        "figures": lambda _: run(FIGURES),
        "execute": execute,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        sys.exit(__doc__)
    stages[sys.argv[1]](sys.argv[2:])
