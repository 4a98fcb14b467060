"""What a drafter accepts on a few prompts, greedy: for commands that have just made a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.cli.loading import eos_ids
from specdec.cli.measure import ends_with
from specdec.distributions import WarperTransform
from specdec.interfaces import Row
from specdec.runtime import Runtime
from specdec.sampling import GREEDY
from specdec.settings import Settings
from specdec.stats import Stats

_NUM_TOKENS = 64


def measure_acceptance(
    model: Any,
    spec: str,
    questions: Sequence[Sequence[int]],
    max_nodes: int,
    draft_models: Sequence[Any] = (),
    num_rows: int = 1,
) -> Stats:
    """Counts of drafter ``spec`` for ``model`` on the token ids of ``questions``, ``num_rows`` of them at a time.

    Trees have up to ``max_nodes`` nodes.
    """
    settings = Settings(drafter=spec, max_nodes=max_nodes, adaptive=False, seed=0)
    decoder = Runtime(model, draft_models).decoder(settings, WarperTransform(GREEDY), ends_with(eos_ids(model)))
    stats = Stats()
    rows = (Row(i, list(ids), len(ids) + _NUM_TOKENS) for i, ids in enumerate(questions))
    for emission in decoder.run(rows, num_rows):
        stats.add(emission.step)
    return stats
