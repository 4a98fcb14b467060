"""What every figure must be: drawn, complete and readable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()  # places the texts
    return figure


def texts_of(figure: Figure) -> Iterator[Text]:
    return (text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text() and text.get_visible())


def assert_readable(figure: Figure, theme: Any) -> None:
    """Nothing is cut off or too small, and the ground is the theme's."""
    width, height = figure.canvas.get_width_height()
    for text in texts_of(figure):
        box = text.get_window_extent()
        if box.width == 0:
            continue
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        tick = text in [t for ax in figure.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels())]
        assert inside or tick, text.get_text()
        assert text.get_fontsize() >= 9
    assert figure.get_facecolor()[:3] == pytest.approx(tuple(int(theme.ground[i : i + 2], 16) / 255 for i in (1, 3, 5)))
