"""How figures look: two themes, colours that stay apart for colour-blind readers, sizes that are readable on a slide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

P = ParamSpec("P")

SIZE = (10.0, 5.6)  # inches, 16:9
CAPTION_WIDTH = 135  # signs of small print a line


class MissingDataError(ValueError):
    """What was given does not hold what a figure shows; the message says what is needed."""


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours by meaning. The hues are Okabe and Ito's, lightened for a dark ground."""

    name: str
    ground: str
    ink: str
    faint: str  # grids, what is not in question
    accepted: str
    rejected: str
    own: str  # the target's own token
    cycle: tuple[str, ...]  # methods, in order

    @property
    def ramp(self) -> LinearSegmentedColormap:
        """A colour map from little to much."""
        return LinearSegmentedColormap.from_list("ramp", [self.ground, self.own])


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#c9d1d9", "#009e73", "#d55e00", "#0072b2",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#57606a"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#3d444d", "#2fc79b", "#ff8a3d", "#56b4e9",
    ("#56b4e9", "#ff8a3d", "#2fc79b", "#e79bc4", "#e6c84a", "#9ecbff", "#9198a1"),
)  # fmt: skip
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}
MARKERS = "osD^vPX"  # colour is never the only difference

_current = LIGHT


def theme() -> Theme:
    """The theme in force; LIGHT outside of ``themed``."""
    return _current


@contextmanager
def themed(wanted: Theme) -> Iterator[Theme]:
    """Draw in ``wanted``."""
    global _current
    before, _current = _current, wanted
    try:
        with mpl.rc_context(_rc(wanted)):
            yield wanted
    finally:
        _current = before


def in_theme(draw: Callable[P, Axes]) -> Callable[P, Axes]:
    """A figure function that draws in the theme in force, whatever matplotlib's settings are."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Axes:
        with mpl.rc_context(_rc(_current)):
            return draw(*args, **kwargs)

    return styled


def _rc(wanted: Theme) -> Any:
    return {
        "figure.facecolor": wanted.ground,
        "axes.facecolor": wanted.ground,
        "savefig.facecolor": wanted.ground,
        "text.color": wanted.ink,
        "axes.labelcolor": wanted.ink,
        "axes.edgecolor": wanted.ink,
        "xtick.color": wanted.ink,
        "ytick.color": wanted.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 15,
        "axes.titleweight": "bold",
        "axes.titlepad": 12,
        "axes.labelsize": 13,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "legend.fontsize": 12,
        "legend.frameon": False,
        "font.family": "DejaVu Sans",
        "font.size": 13,
        "grid.color": wanted.faint,
        "grid.linewidth": 0.6,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.1,
        "svg.hashsalt": "specdec",  # the same figure gives the same file
        "svg.fonttype": "path",
    }


def new_axes(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new figure in the theme's colours."""
    return Figure(figsize=SIZE, layout="constrained").add_subplot() if ax is None else ax


def color_of(name: str, names: list[str]) -> str:
    """The colour of a method among all that a run measured, the same in every figure."""
    return _current.cycle[names.index(name) % len(_current.cycle)]


def marker_of(name: str, names: list[str]) -> str:
    return MARKERS[names.index(name) % len(MARKERS)]


def caption(ax: Axes, *parts: str) -> None:
    """Conditions below the axes, in small print."""
    figure = ax.get_figure()
    if isinstance(figure, Figure) and len(figure.axes) == 1:
        lines = [line for part in parts if part for line in textwrap.wrap(part, CAPTION_WIDTH)]
        figure.supxlabel("\n".join(lines), fontsize=9, color=_current.ink, alpha=0.75)


def conditions(provenance: Mapping[str, Any]) -> str:
    """Model, dtype, machine, batch size, versions and date of a run, as far as it tells."""
    machine, versions = provenance.get("machine") or {}, provenance.get("versions") or {}
    settings, target = provenance.get("settings") or {}, (provenance.get("models") or {}).get("target") or {}
    gpus = machine.get("gpus") or []
    where = gpus[0] if gpus and provenance.get("device") != "cpu" else machine.get("cpu")
    threads = provenance.get("threads")
    facts = [
        target.get("id"),
        provenance.get("dtype"),
        where
        and (f"{where}, {threads} thread{'s' * (threads != 1)}" if threads and where != (gpus or [0])[0] else where),
        settings.get("batch_size") and f"batch size {settings['batch_size']}",
        settings.get("temperature") is not None and f"temperature {settings['temperature']:g}",
        settings.get("num_prompts") and f"{settings['num_prompts']} prompts",
        versions.get("specdec") and f"specdec {versions['specdec']}",
        versions.get("torch") and f"torch {versions['torch']}",
        str(provenance.get("date") or "")[:10],
    ]
    return ", ".join(str(fact) for fact in facts if fact)


def shown(text: str, width: int = 12) -> str:
    """A token's text for a label: spaces and breaks made visible, cut, without signs that the font lacks."""
    visible = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    drawable = _known_signs()
    visible = "".join(sign if ord(sign) in drawable else "□" for sign in visible) or "∅"
    return visible if len(visible) <= width else visible[: width - 1] + "…"


@cache
def _known_signs() -> frozenset[int]:
    path = font_manager.findfont("DejaVu Sans")
    return frozenset(FT2Font(str(path)).get_charmap())
