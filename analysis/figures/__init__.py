"""Figures from measured data. Every function draws on the axes it is given, or on new ones, and returns them, so that
notebooks reuse them; ``draw_all`` writes all that the data allows, in both themes, and says what is missing and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdec.analysis.columns import Trace
from specdec.analysis.figures import blocks, costs, prefixes, rates, serving, speculation, trees
from specdec.analysis.figures.style import THEMES, MissingDataError, themed
from specdec.analysis.results import Bench, Tune, Workload

Draw = Callable[..., Axes]


@dataclass(frozen=True, slots=True)
class Spec:
    """One figure: its name, which is that of its files, the group it belongs to and what it is drawn from."""

    name: str
    group: str
    needs: str  # "trace", "bench" (or a trace), "tuned", "workload", or what does not exist yet
    draw: Draw | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """A figure that could not be drawn, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """What ``draw_all`` did."""

    paths: tuple[Path, ...]
    missing: tuple[Missing, ...]


FORMATS = ("svg", "png")
_GRAMMAR = "grammar-constrained generation"

FIGURES: tuple[Spec, ...] = (
    Spec("standard_vs_speculative", "speculation", "trace", speculation.standard_vs_speculative),
    Spec("speculative_algorithm_flow", "speculation", "trace", speculation.speculative_algorithm_flow),
    Spec("acceptance_rate_analysis", "speculation", "trace", speculation.acceptance_rate_analysis),
    Spec("tree_structure_visualization", "trees", "trace", trees.tree_structure_visualization),
    Spec("tree_attention_mask", "trees", "trace", trees.tree_attention_mask),
    Spec("specinfer_vs_medusa", "trees", "trace", trees.specinfer_vs_medusa),
    Spec("speedup_comparison", "trees", "bench", trees.speedup_comparison),
    Spec("cost_curve", "costs", "trace", costs.cost_curve),
    Spec("acceptance_by_depth_and_rank", "costs", "trace", costs.acceptance_by_depth_and_rank),
    Spec("acceptance_by_entropy", "costs", "trace", rates.acceptance_by_entropy),
    Spec("speedup_by_category", "costs", "trace", costs.speedup_by_category),
    Spec("step_time_breakdown", "costs", "trace", costs.step_time_breakdown),
    Spec("tuner_landscape", "costs", "tuned", costs.tuner_landscape),
    Spec("kv_cache_problem", "paged", "workload", serving.kv_cache_problem),
    Spec("block_structure", "paged", "workload", blocks.block_structure),
    Spec("memory_comparison", "paged", "workload", serving.memory_comparison),
    Spec("block_sharing", "paged", "workload", blocks.block_sharing),
    Spec("performance_comparison", "paged", "workload", serving.performance_comparison),
    Spec("attention_flow", "paged", "workload", blocks.attention_flow),
    Spec("radix_tree_structure", "prefix", "workload", prefixes.radix_tree_structure),
    Spec("throughput_comparison", "prefix", "workload", serving.throughput_comparison),
    Spec("structured_generation_flow", "grammars", _GRAMMAR),
)


def draw_all(
    out: Path,
    trace: Trace | None = None,
    bench: Bench | None = None,
    tune: Tune | None = None,
    workloads: Sequence[Workload] = (),
    *,
    only: Iterable[str] | None = None,
    formats: Sequence[str] = FORMATS,
) -> Drawn:
    """Write ``NAME-light.svg``, ``NAME-dark.png`` and so on into ``out`` for every figure that the data allows.

    Raises:
        ValueError: ``only`` names a figure that does not exist.
        OSError: a file cannot be written.
    """
    names = [spec.name for spec in FIGURES]
    wanted = names if only is None else list(only)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"there is no figure {unknown[0]!r}; there are {', '.join(names)}")
    paths: list[Path] = []
    missing: list[Missing] = []
    for spec in (spec for spec in FIGURES if spec.name in wanted):
        try:
            draw = bound(spec, trace, bench, tune, workloads)
            paths += save(draw, out, spec.name, formats)
        except MissingDataError as error:
            missing.append(Missing(spec.name, str(error)))
    return Drawn(tuple(paths), tuple(missing))


def bound(
    spec: Spec, trace: Trace | None, bench: Bench | None, tune: Tune | None, workloads: Sequence[Workload] = ()
) -> Draw:
    """The function of a figure with its data; of several workloads it is the first that holds what the figure shows.

    Raises:
        MissingDataError: there is none of the kind it is drawn from.
    """
    if spec.draw is None:
        raise MissingDataError(f"measurements of {spec.needs}, of which it is not drawn yet")
    if spec.needs == "workload" and workloads:
        return partial(_first, spec.draw, workloads)
    source: Any = {"trace": trace, "bench": bench or trace, "tuned": tune, "workload": None}[spec.needs]
    if source is None:
        what = {"trace": "specdec bench --trace", "bench": "specdec bench --output", "tuned": "specdec tune --output"}
        raise MissingDataError(f"a file of {what.get(spec.needs, 'specdec bench --workload with --output')}")
    return partial(spec.draw, source)


def _first(draw: Draw, workloads: Sequence[Workload], **options: Any) -> Axes:
    for workload in workloads[:-1]:
        with suppress(MissingDataError):
            return draw(workload, **options)
    return draw(workloads[-1], **options)


def save(draw: Draw, out: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw in both themes and write each format; the same data gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for theme in THEMES.values():
        with themed(theme):
            figure = draw().get_figure()
            assert isinstance(figure, Figure)
            for form in formats:
                path = out / f"{name}-{theme.name}.{form}"
                metadata = {"Date": None} if form == "svg" else {"Software": None}
                figure.savefig(path, dpi=144, metadata=metadata)
                paths.append(path)
    return paths
