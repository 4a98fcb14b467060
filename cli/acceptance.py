"""What a drafter accepts on a few prompts, greedy: for commands that have just made a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.budget import FixedBudget
from specdec.cli.loading import eos_ids
from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters import make_drafter
from specdec.engine.causal_lm import CausalLM
from specdec.interfaces import DraftContext, Row
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY
from specdec.stats import Stats
from specdec.verifiers import make_verifier

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
    engine, rule, ends = CausalLM(model), make_verifier("match"), eos_ids(model)
    drafter = make_drafter(spec, DraftContext(engine, rule, tuple(draft_models)))
    logits_transform, rng, budget = WarperTransform(GREEDY), PhiloxRng(0), FixedBudget(max_nodes)
    decoder = Decoder(engine, drafter, rule, logits_transform, rng, lambda row: row.tokens[-1] in ends, budget)
    stats = Stats()
    rows = (Row(i, list(ids), len(ids) + _NUM_TOKENS) for i, ids in enumerate(questions))
    for emission in decoder.run(rows, num_rows):
        stats.add(emission.step)
    return stats
