"""From models and settings to a decode loop: the one place where target, drafter, verifier, budget and rng meet."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.budget.adaptive import Budget, make_budget
from specdec.budget.costs import PassCosts
from specdec.cpu.accelerate import accelerated, accelerated_copy
from specdec.cuda.batch_verdicts import BatchVerdicts
from specdec.cuda.graphs import graph_pool
from specdec.decode import Decide, Decoder
from specdec.distributions import LogitsTransform
from specdec.drafters import make_drafter, tuned_file
from specdec.engine.attention import attention_copy, on_our_attention
from specdec.engine.causal_lm import CausalLM
from specdec.engine.model_state import ModelState
from specdec.interfaces import DraftContext, Drafter, Row, Target, Verifier
from specdec.paging.tables import BlockTables
from specdec.records.tuned import load_tuned
from specdec.rng import PhiloxRng, Rng
from specdec.settings import Settings
from specdec.verifiers import make_verifier

DecideWith = Callable[[Verifier, Rng], Decide | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides on drafts, whether settings name it or a tuned file does."""

    drafter: str | Drafter
    max_nodes: int
    adaptive: bool
    costs: PassCosts  # what passes cost, to begin with


class Runtime:
    """A target and its draft models as they run here, from which decoders are made.

    What outlives it (the probe's answer, costs, copies, recorded passes, loaded heads) is kept beside each model.

    Args:
        model: any transformers causal LM, or a module that wraps one.
        draft_models: for drafters that run one.
        accelerate: on a CPU, run a copy with packed layers; with ``in_place`` the model itself.
        cuda_graphs: on a GPU, run on our attention and replay recorded passes.
        tables: keep keys and values in pages, in the blocks of these tables.

    Raises:
        UnsupportedModelError: the model cannot be verified.
        UnsupportedOptionError: CUDA graphs were asked for where they cannot run.
    """

    def __init__(
        self,
        model: Any,
        draft_models: Sequence[Any] = (),
        *,
        accelerate: bool = False,
        cuda_graphs: bool = False,
        in_place: bool = False,
        tables: BlockTables | None = None,
    ) -> None:
        def prepared(plain: Any) -> Any:
            if cuda_graphs:
                return attention_copy(plain)
            if accelerate:
                plain = accelerated(plain, in_place=True) if in_place else accelerated_copy(plain)
            return plain if tables is None else on_our_attention(plain)

        ready = prepared(model)
        self.target = CausalLM(ready, replays=graph_pool(ready) if cuda_graphs else None, tables=tables)
        self.draft_models: Sequence[Any] = tuple(map(prepared, draft_models))

    def plan(self, settings: Settings, num_rows: int = 1) -> Plan:
        """What ``settings`` say of drafts for batches of ``num_rows``; a tuned file says it in their place.

        Raises:
            ValueError: the tuned file cannot be read.
        """
        costs, drafter = ModelState.of(self.target.model).costs, settings.drafter
        file = tuned_file(drafter) if isinstance(drafter, str | Path) else None
        if file is None:
            assert not isinstance(drafter, Path)
            return Plan(drafter, settings.max_nodes, settings.adaptive, costs())
        tuned = load_tuned(file)
        warning = tuned.warning(self.target.model)
        if warning is not None:
            warnings.warn(warning, stacklevel=2)
        entry = tuned.nearest(num_rows)
        return Plan(entry.drafter, entry.max_nodes, entry.adaptive, costs(PassCosts if warning else tuned.costs))

    def drafter(self, drafter: str | Drafter, verifier: Verifier, draft_models: Sequence[Any] | None = None) -> Drafter:
        """The drafter that a text names, built for this target; one that is built already stays as it is."""
        if not isinstance(drafter, str):
            return drafter
        models = self.draft_models if draft_models is None else draft_models
        return make_drafter(drafter, DraftContext(self.target, verifier, models))

    def decoder(
        self,
        settings: Settings,
        logits_transform: LogitsTransform,
        stop: Callable[[Row], bool],
        *,
        drafter: Drafter | None = None,
        target: Target | None = None,
        budget: Budget | None = None,
        decide: DecideWith | None = None,
        rng: Rng | None = None,
        num_rows: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Decoder:
        """A decode loop for ``settings``.

        Args:
            logits_transform: from logits to distributions.
            stop: whether a row ends with its newest token.
            drafter, target, budget, rng: in the place of those that the settings name.
            decide: decides on all rows together; None, or where it returns None, each row for itself.
            num_rows: for how many rows a tuned file is asked.
        """
        plan = self.plan(settings, num_rows)
        verifier = as_verifier(settings.verifier)
        if rng is None:
            rng = PhiloxRng(int(torch.randint(2**62, ()).item()) if settings.seed is None else settings.seed)
        together = decide(verifier, rng) if decide else None
        return Decoder(
            target or self.target,
            drafter or self.drafter(plan.drafter, verifier),
            verifier,
            logits_transform,
            rng,
            stop,
            budget or make_budget(plan.max_nodes, plan.adaptive, plan.costs),
            clock,
            together or BatchVerdicts(verifier, logits_transform, rng),
        )


def as_verifier(verifier: str | Verifier) -> Verifier:
    """The verifier that a name stands for."""
    return make_verifier(verifier) if isinstance(verifier, str) else verifier
