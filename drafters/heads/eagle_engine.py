"""Runs an EAGLE head over token trees: its own cache, all rows and all nodes of a level in one pass.

Slot t of a row holds the head's keys and values for [embedding of token t + 1; state at t], so that its text is the
row's without the first token. States are made of the target's features as far as these are known, up to the root;
below it they are the head's own outputs. What was computed from the head's own outputs is overwritten after every
step. Letters: B rows, T columns, H hidden size, F feature size, Vd draft vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.cpu.packed_linear import is_packed
from specdec.drafters.heads.eagle_cell import EagleCell, FeatureCell, pack_cell
from specdec.drafters.heads.eagle_config import EagleConfig
from specdec.drafters.heads.eagle_reading import NUM_FEATURES
from specdec.drafters.heads.shipped import draft_dtype
from specdec.engine.causal_lm import PREFILL_CHUNK
from specdec.engine.layout import KVRows
from specdec.engine.offload import loaded
from specdec.engine.passes import RowPass
from specdec.errors import CheckpointError
from specdec.interfaces import ModelTarget, Row, Scores
from specdec.tree import TokenTree


class EagleEngine:
    """An EAGLE head beside its target.

    Args:
        cell: the network; it moves to the target's device, and its layers are packed if the target's are.
        target: asked for the features that the head reads, with every pass.
        clock: seconds; the time spent inside the head is added up in ``model_s``.
    """

    def __init__(
        self, cell: EagleCell | FeatureCell, target: ModelTarget, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.target = target
        if isinstance(cell, EagleCell):
            share_output(cell, target.model)
        self.dtype = draft_dtype(target)
        self.cell = cell.to(target.device, self.dtype).eval()
        if is_packed(target.model):
            pack_cell(self.cell)
        self.layers: tuple[int, ...] = ()
        if isinstance(cell, EagleCell):
            self.layers = head_layers(cell.config, target.model.config.get_text_config().num_hidden_layers)
        target.request(hidden=not self.layers, layers=self.layers)
        self._embed: Any = cell.embed_tokens or target.model.get_input_embeddings()
        self._output: Any = cell.logits if isinstance(cell, EagleCell) else target.model.get_output_embeddings()
        self._rows: KVRows = target.rows_beside(cell.num_layers)
        self._features: dict[Row, list[Tensor]] = {}  # (k, F) true ones that the cache lacks
        self._states: dict[Row, Tensor] = {}  # (n, H) the head's outputs at the nodes of the tree being grown
        self._clock = clock
        self.model_s = 0.0

    def open(self, rows: Sequence[Row]) -> None:
        """Give each row a line of the cache."""
        self._rows.open(rows)
        self._features.update((row, []) for row in rows)

    def read(self, row: Row, scores: Scores, num_nodes: int, path: Sequence[int]) -> None:
        """Take the true features of what the target has processed: pending tokens, then ``path`` of a tree."""
        seen = self.target.features(scores, self.layers) if self.layers else self.target.hidden(scores)
        num_pending = seen.shape[0] - num_nodes
        kept = [*range(num_pending), *(num_pending + node for node in path)]
        index = torch.tensor(kept, device=seen.device)
        self._features[row].append(seen.index_select(0, index).to(self.target.device))

    def is_ready(self, row: Row) -> bool:
        """Whether the features of every token before the newest are known."""
        known = self._rows[row].length + sum(map(len, self._features[row]))
        return known > 0 and known == len(row.tokens) - 1

    @torch.no_grad()
    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree], num_scored: Sequence[int]) -> list[Scores]:
        """Draft logits (k, Vd) of the nodes behind the first ``num_scored`` ones of each tree, in one pass."""
        row_passes: list[RowPass] = []
        states: list[Tensor] = []
        for row, tree, done in zip(rows, trees, num_scored, strict=True):
            cache_row = self._rows[row]
            if done:
                parents = torch.tensor(tree.parents[done:], device=self.target.device)
                states.append(self._states[row].index_select(0, parents))
                row_passes.append(RowPass(cache_row, [], tree, done))
            else:
                pending, fused = self._prefill(row)
                states.append(fused)
                row_passes.append(RowPass(cache_row, pending, tree, 0))
        results: list[Scores | None] = [None] * len(row_passes)
        started = self._clock()
        for group in self._rows.groups(row_passes):
            after = self._forward([row_passes[i] for i in group], [states[i] for i in group])
            logits = torch.split(self._logits(torch.cat(after)), [len(each) for each in after])
            for i, new, share in zip(group, after, logits, strict=True):
                self._states[rows[i]] = torch.cat([self._states[rows[i]], new]) if num_scored[i] else new
                results[i] = Scores(share)
        self.model_s += self._clock() - started
        for row_pass in row_passes:
            row_pass.cache_row.length = row_pass.base
        return [result for result in results if result is not None]

    def commit(self, rows: Sequence[Row]) -> None:
        """Keep the roots just scored: everything below was computed from the head's own states."""
        for row in rows:
            if self._states.pop(row, None) is not None:
                self._rows[row].length += 1

    def close(self, rows: Sequence[Row]) -> None:
        """Free what ``rows`` hold."""
        self._rows.close(rows)
        for row in rows:
            del self._features[row]
            self._states.pop(row, None)

    def _prefill(self, row: Row) -> tuple[list[int], Tensor]:
        """Process what a long prompt has beyond one chunk; the pending tokens and states (p + 1, H) that are left."""
        cache_row = self._rows[row]
        pending = row.tokens[cache_row.length + 1 : -1]
        fused = self.cell.fuse(torch.cat(self._features[row]).to(self.dtype))
        self._features[row] = []
        while len(pending) > PREFILL_CHUNK:
            row_pass = RowPass(cache_row, pending[:PREFILL_CHUNK], None, 0)
            self._forward([row_pass], [fused[:PREFILL_CHUNK]])
            cache_row.length = row_pass.base
            pending, fused = pending[PREFILL_CHUNK:], fused[PREFILL_CHUNK:]
        return pending, fused

    def _logits(self, states: Tensor) -> Tensor:
        own = isinstance(self.cell, EagleCell)
        logits: Tensor = self._output(states if own else states.to(self.target.model.dtype))
        return logits

    def _forward(self, row_passes: Sequence[RowPass], states: Sequence[Tensor]) -> list[Tensor]:
        """The head's outputs at each part's new nodes, from ``states`` (p + k, H) at its new columns."""
        layout = self._rows.lay_out(row_passes, self.target.device)
        embeds = self._embed(layout.ids).to(self.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return layout.attend(q, *self._rows.layer(layer).update(k, v))

        return layout.at_nodes(self.cell(embeds, layout.placed(states), layout.positions, attend))


@torch.no_grad()
def share_output(cell: EagleCell, model: Any) -> None:
    """Give a head that was stored without an output matrix that of its target."""
    if cell.config.shares_output:
        with loaded(model.get_output_embeddings()) as output:
            cell.lm_head.weight.copy_(output.weight[cell.target_ids().to(output.weight.device)])
        cell.config = replace(cell.config, shares_output=False)  # from now on it has its own


def head_layers(config: EagleConfig, num_layers: int) -> tuple[int, ...]:
    """What a head reads of a target with ``num_layers`` layers: entries of its ``hidden_states``; (): its last state.

    Raises:
        CheckpointError: the target has no such layers, or the head does not say which it reads.
    """
    if config.num_features == 0:
        return ()
    if config.feature_layers is None and config.num_features != NUM_FEATURES:
        raise CheckpointError(
            f"the head reads {config.num_features} layers of its target and does not say which; name entries of "
            "hidden_states with the option layers, such as layers=2+16+29"
        )
    layers = config.feature_layers or feature_layers(num_layers)
    if max(layers) >= num_layers:
        raise CheckpointError(
            f"the head reads hidden_states{list(layers)} of its target, which has {num_layers} layers: the entries 0 to "
            f"{num_layers - 1}; was it made for another target? Others can be named with the option layers"
        )
    return layers


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's features of a target with ``num_layers`` layers: these entries of its ``hidden_states``.

    Raises:
        ValueError: fewer than three layers.
    """
    if num_layers < 3:
        raise ValueError(f"EAGLE-3 reads three layers of its target, which has {num_layers}; use another drafter")
    return 2, num_layers // 2, num_layers - 3
