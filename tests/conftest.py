"""What is slow, so that `make test-fast` leaves it out, and fixtures that several files of tests ask for by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Processes side by side (`pytest -n`) share the cores, and so must what they start; torch reads this on import.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

# Folders and files of which every test is marked slow, as is whatever needs the default model ...
SLOW = {
    "cuda", "kernels", "training", "tune",
    "analysis/test_analysis_bench.py", "analysis/test_analysis_lanes.py", "analysis/test_figures.py",
    "analysis/test_workload_figures.py", "cli/test_workload.py",
    "cli/test_bench.py", "cli/test_bench_cli.py", "cli/test_cli.py", "cli/test_export.py", "cli/test_report.py",
    "cli/test_saved_config.py",
    "core/test_budget.py", "core/test_mutants.py", "core/test_rng.py", "core/test_rules.py",
    "cpu/test_fused_layer.py",
    "drafters/test_draft_range.py", "drafters/test_eagle.py", "drafters/test_shipped_drafters.py",
    "engine/test_last_position.py", "engine/test_model_changes.py", "engine/test_offloaded.py",
    "engine/test_wrapped.py",
    "serving/test_drafts_on_shared_prefixes.py", "serving/test_engine_exactness.py", "serving/test_soak.py",
    "generation/test_caller_objects.py", "generation/test_endings.py",
    "project/test_notebooks.py",
    "serve/test_load.py", "serve/test_real.py",
}  # fmt: skip
# ... and files of many cases, of which the first one of each test is not.
SAMPLED = {
    "cli/test_cli_bad_input.py",
    "core/test_exactness.py", "core/test_growth_law.py",
    "drafters/test_eagle_exactness.py", "drafters/test_eagle_published.py",
    "engine/test_paged.py", "engine/test_zoo.py",
    "grammar/test_exactness.py", "grammar/test_generate.py", "grammar/test_inputs.py", "grammar/test_mutants.py",
    "generation/test_wrapper.py", "generation/test_wrapper_inputs.py",
    "project/test_imports.py",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[tuple[str, str]] = set()
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        test = (place, getattr(item, "originalname", item.name))
        is_slow = place in SLOW or place.split("/")[0] in SLOW or (place in SAMPLED and test in seen)
        if is_slow or item.get_closest_marker("model"):
            item.add_marker(pytest.mark.slow)
        seen.add(test)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny matrices, where a second thread costs more than it brings; other files keep their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
