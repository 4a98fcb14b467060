"""An unmodified transformers causal LM as a Target: all rows and all tree nodes in one forward pass.

A row's tokens that the cache lacks ("pending": the whole prompt at first) are processed in the same pass as the tree
behind them. Columns of a pass are aligned at the right, so that the last columns are the trees'; slots of the cache
are aligned at the left, without holes. Letters: B rows, T columns, n nodes, p pending tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.engine.attention import NAME as OUR_ATTENTION
from specdec.engine.cache import RaggedCache
from specdec.engine.hidden_states import HiddenStateHooks, joined
from specdec.engine.layout import KVRows
from specdec.engine.masks import MaskStyle
from specdec.engine.model_state import ModelState
from specdec.engine.offload import input_device
from specdec.engine.paged_rows import PagedRows
from specdec.engine.passes import RowPass, in_order
from specdec.engine.probe import Support, inspect_model, probe
from specdec.engine.ragged_rows import RaggedRows
from specdec.engine.replay import Replay, ReplayPool
from specdec.engine.wrapped import model_inside, takes
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row, Scores
from specdec.paging.pool import BlockPool
from specdec.paging.tables import BlockTables
from specdec.tree import TokenTree

PREFILL_CHUNK = 1024  # tokens a row: a longer prompt is processed in several passes, which bounds the mask's memory


class CausalLM:
    """A transformers causal LM as a target (or as the model behind a drafter).

    Args:
        model: any ``PreTrainedModel`` with a language-model head, or a module that wraps one (an adapter, a compiled
            module); it stays unmodified.
        capture_hidden: also return the input of the output matrix for each new token (see ``request``).
        feature_layers: also return these entries of ``hidden_states`` (0 = embeddings), side by side.
        replays: where recorded passes come from (``specdec.cuda.graphs.graph_pool``); None: nothing is recorded. They
            and the cache stay for the next engine on ``model`` once all rows are closed.
        tables: keep keys and values in pages, in the blocks of these tables, which draft models share; None: in lines.
        is_owner: whether rows get and lose their blocks here (the target); draft models follow.
        clock: seconds; the time spent inside the model is added up in ``model_s``.

    Raises:
        UnsupportedModelError: the model keeps a recurrent state, is an encoder-decoder, or fails the probe.
    """

    def __init__(
        self,
        model: Any,
        *,
        capture_hidden: bool = False,
        feature_layers: Sequence[int] = (),
        replays: ReplayPool | None = None,
        tables: BlockTables | None = None,
        is_owner: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.module = model  # what runs
        self.model = model = model_inside(model)
        self.model_s = 0.0
        self.num_passes = 0
        self.support: Support = inspect_model(self.module)
        head = model.get_output_embeddings()
        self.vocab_size: int = getattr(head, "out_features", None) or head.weight.shape[0]
        self.device: torch.device = input_device(model)
        self._clock = clock
        self._config = model.config.get_text_config()
        self.hidden_size: int = self._config.hidden_size
        self._new_rows: Callable[[], KVRows] = self._lines
        self._rows = self._new_rows()
        self.tables: BlockTables | None = None
        self._queued: dict[Row, int] = {}  # tokens of prompts that the next pass is to process
        self._processed: dict[Row, list[Scores]] = {}  # what earlier ones said of them
        self.replays: ReplayPool | None = None  # the probe takes the ordinary path
        self.replay: Replay | None = None
        self._takes_keep = takes(self.module, "logits_to_keep")
        self._capture = HiddenStateHooks(model, capture_hidden, tuple(feature_layers))
        self._built_for = self._settings()
        # Once for each model object: generate() builds a CausalLM at every call.
        key = ("support", *self._built_for.values(), self.support)
        self.support = ModelState.of(self.module).keep(key, self._probe)
        if tables is not None:
            self._move_into(tables, is_owner)
        else:
            self.replays = replays

    def _move_into(self, tables: BlockTables, is_owner: bool) -> None:
        """Keep rows in pages: one behind the other in a pass where the model takes our attention and passes a trial."""
        style = self.support.style
        takes_pages = not self.chain_only and isinstance(style, MaskStyle) and style.takes_pages

        def pages(tables: BlockTables, is_owner: bool, is_flat: bool) -> PagedRows:
            layers = self._config.num_hidden_layers
            return PagedRows(tables, layers, is_owner=is_owner, is_flat=is_flat, takes_pages=takes_pages)

        def is_flat() -> bool:
            if self.chain_only or self._config._attn_implementation != OUR_ATTENTION:
                return False
            self._new_rows = lambda: pages(BlockTables(BlockPool(8, 4)), is_owner=True, is_flat=True)
            self._rows = self._new_rows()
            return not probe(self, branching=True)

        key = ("flat", *self._built_for.values())
        is_flat_here = ModelState.of(self.module).keep(key, is_flat)
        self.tables, self._new_rows = tables, lambda: pages(tables, is_owner, is_flat_here)
        self._rows = self._new_rows()

    def request(self, *, hidden: bool = False, layers: Sequence[int] = ()) -> None:
        """Return these hidden states, too, with every pass from now on; what was asked for earlier stays.

        Raises:
            ValueError: the model has no such layers.
        """
        self._capture = self._capture.including(hidden, layers)

    def features(self, scores: Scores, layers: Sequence[int]) -> Tensor:
        """(p + n, F) the requested ``layers`` of ``scores`` side by side, whatever others have requested.

        Raises:
            ValueError: they were not asked for, or another engine made ``scores``.
        """
        return self._capture.pick(scores.features, layers)

    def hidden(self, scores: Scores) -> Tensor:
        """(p + n, H) the requested input of the output matrix.

        Raises:
            ValueError: it was not asked for, or another engine made ``scores``.
        """
        if scores.hidden is None:
            raise ValueError(
                "the last hidden states were not asked for; a drafter must be built with the engine that runs"
            )
        return scores.hidden

    def rows_beside(self, num_layers: int) -> KVRows:
        """Where a head that follows this model keeps the keys and values of its layers, in pages if they are here."""
        if self.tables is None:
            return RaggedRows(RaggedCache(num_layers))
        return PagedRows(self.tables, num_layers, must_follow=True)

    @property
    def in_line(self) -> bool:
        """Whether rows stand one behind the other in a pass, so that it has no padding."""
        return isinstance(self._rows, PagedRows) and self._rows.is_flat

    @property
    def chain_only(self) -> bool:
        """Whether only chains can be verified (see ``support.reason``)."""
        return not self.support.can_tree

    @property
    def context_length(self) -> int | None:
        """The positions that the model has, or was made for; None if its config does not say."""
        limits = (self.support.max_positions, getattr(self._config, "max_position_embeddings", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def open(self, rows: Sequence[Row], *, may_outgrow: bool = False) -> None:
        """Give each row a line of the cache.

        With ``may_outgrow`` a row may end behind the model's last position: the caller closes it before.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, or more positions than the model has.
        """
        for row in rows:
            self.check(row, may_outgrow)
        style = self.support.style
        if self.replays and style and not len(self._rows) and not self.chain_only:
            cache, self.replay = self.replays.borrow(style, self._new_cache)
            self._rows = RaggedRows(cache)
        self._rows.open(rows)

    def score(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], num_scored: Sequence[int] | None = None
    ) -> list[Scores]:
        """Logits of every node of each row's tree, in one forward pass.

        ``num_scored`` says how many leading nodes of each tree an earlier call has scored since the last commit: only
        the nodes after them are processed and returned (how a drafter grows a tree level by level).

        Raises:
            ValueError: the model's attention, mode, dtype or device is not what it was when the engine was built.
        """
        self._check_settings()
        scored = num_scored or [0] * len(rows)
        queued, self._queued = self._queued, {}
        row_passes = [RowPass(self._rows[row], self.pending(row)[:count], None, 0) for row, count in queued.items()]
        earlier: list[list[Scores]] = [[]] * len(queued)
        for row, tree, done in zip(rows, trees, scored, strict=True):
            cache_row = self._rows[row]
            pending = [] if done else self.pending(row)
            chunks = self._prefill(row, pending)
            earlier.append(self._processed.pop(row, []) + chunks)
            compact, cache_row.nodes = tree.compact()
            num_done = len(set(cache_row.nodes[:done]))
            row_passes.append(RowPass(cache_row, pending[len(chunks) * PREFILL_CHUNK :], compact, num_done))
        results: list[Scores | None] = [None] * len(row_passes)
        for group in self._groups(row_passes):
            for i, scores in zip(group, self._forward([row_passes[i] for i in group]), strict=True):
                results[i] = joined([*earlier[i], scores])
        for row_pass in row_passes:
            row_pass.cache_row.length = row_pass.base
        for row, result in zip(queued, results, strict=False):
            if result is not None and self._capture.is_active:
                self._processed.setdefault(row, []).append(result)
        trees_behind = slice(len(queued), None)
        return [
            expanded(r, row_pass.cache_row.nodes[done:], row_pass.num_scored)
            for r, row_pass, done in zip(results[trees_behind], row_passes[trees_behind], scored, strict=True)
            if r is not None
        ]

    def pending(self, row: Row) -> list[int]:
        """The tokens of ``row`` before its newest that the cache lacks."""
        return row.tokens[self._rows[row].length : -1]

    def num_pending(self, row: Row) -> int:
        """How many these are."""
        return max(len(row.tokens) - 1 - self._rows[row].length, 0)

    def num_kept(self, row: Row) -> int:
        """How many tokens of ``row`` the cache holds."""
        return self._rows[row].length

    def queue_prefill(self, row: Row, num_tokens: int) -> None:
        """Let the next ``score`` process so many of the row's pending tokens beside what it scores, in the same pass.

        What else it has pending follows later; hidden states come with the row's first scores.
        """
        self._queued[row] = num_tokens

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        """Keep the slots of the nodes ``paths`` (root first); they become the rows' next slots."""
        cache_rows = [self._rows[row] for row in rows]
        self._rows.keep(
            [(row, [row.nodes[node] for node in path]) for row, path in zip(cache_rows, paths, strict=True)]
        )

    def close(self, rows: Sequence[Row]) -> None:
        """Free the lines of ``rows``; rows that were never opened are ignored."""
        self._rows.close(rows)
        for row in rows:
            self._queued.pop(row, None)
            self._processed.pop(row, None)
        if self.replays and self.replay and rows and not len(self._rows):
            assert isinstance(self._rows, RaggedRows)
            self.replays.give_back(self._rows.cache, self.replay)
            self._rows = self._new_rows()

    def reset(self) -> None:
        """Forget all rows and free the cache."""
        self._rows, self.replay = self._new_rows(), None

    def _probe(self) -> Support:
        """Try what the config promises, so that no model can be wrong in silence."""
        module, support = self.module, self.support
        fault = probe(self, support.can_tree)
        if fault and support.can_tree:
            support = self.support = replace(support, can_tree=False, reason=fault)
            fault = probe(self, branching=False)
        if fault:
            hint = ""
            if self.model.training:
                hint = "; it is in training mode: call model.eval() before"
            elif module is not self.model:
                hint = f"; if the {type(self.model).__name__} inside can be, use that, or merge what wraps it"
            raise UnsupportedModelError(f"{type(module).__name__} cannot be verified: {fault}{hint}")
        self.model_s, self.num_passes = 0.0, 0
        return support

    def _settings(self) -> dict[str, Any]:
        """What the probe's answer depends on and a caller can change."""
        weight = self.model.get_input_embeddings().weight
        attention = self._config._attn_implementation
        device = self.device if weight.is_meta else weight.device  # an offloaded one is loaded where it was before
        return {"attention": attention, "training": self.model.training, "dtype": weight.dtype, "device": device}

    def _check_settings(self) -> None:
        now, then = self._settings(), self._built_for
        if now != then:
            changed = ", ".join(f"{key} {now[key]!r} instead of {then[key]!r}" for key in now if now[key] != then[key])
            raise ValueError(
                f"the model was changed after its engine was built ({changed}); set it back, or build another engine"
            )

    def _new_cache(self) -> RaggedCache:
        return RaggedCache(self._config.num_hidden_layers)

    def _lines(self) -> KVRows:
        return RaggedRows(self._new_cache())

    def kv_bytes_per_token(self) -> int:
        """What a token's keys and values take in all layers; asked before any row is open."""
        row = Row(0, [0], 2)
        self._rows.open([row])
        try:
            self.score([row], [TokenTree.root(0)])
            assert isinstance(self._rows, RaggedRows)
            buffers = [buffer for pair in self._rows.cache.pairs if pair for buffer in pair]
        finally:
            self.close([row])
            self.model_s, self.num_passes = 0.0, 0
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in buffers)

    def check(self, row: Row, may_outgrow: bool = False) -> None:
        """Whether ``row`` can be opened, as ``open`` says it."""
        if not row.tokens:
            raise ValueError("a row needs at least one prompt token, got an empty prompt")
        worst = max(max(row.tokens), -min(row.tokens))
        if min(row.tokens) < 0 or worst >= self.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}) (the model's vocabulary), got {min(row.tokens)} to {max(row.tokens)}"
            )
        limit = self.support.max_positions
        needed = max(row.num_prompt, row.max_tokens - 1)  # the last token is never read
        if limit is not None and needed > limit and not may_outgrow:
            room = limit + 1 - row.num_prompt
            advice = f"or ask for at most {room} new tokens" if room > 0 else f"to {limit} or fewer"
            raise ValueError(
                f"prompt and new tokens, without the last one, need {needed} positions, but {self.support.limit_reason} "
                f"{limit}; shorten the prompt ({row.num_prompt} tokens) {advice}"
            )

    def _groups(self, row_passes: Sequence[RowPass]) -> list[list[int]]:
        """Which parts share a forward pass, each in the order of the cache's lines."""
        return [[i] for i in in_order(row_passes)] if self.chain_only else self._rows.groups(row_passes)

    def _prefill(self, row: Row, pending: list[int]) -> list[Scores]:
        """Process what a long prompt has beyond one chunk, chunk by chunk."""
        cache_row = self._rows[row]
        chunks = []
        for first in range(0, len(pending) - PREFILL_CHUNK, PREFILL_CHUNK):
            row_pass = RowPass(cache_row, pending[first : first + PREFILL_CHUNK], None, 0)
            chunks += self._forward([row_pass])
            cache_row.length = row_pass.base
        return chunks

    def _forward(self, row_passes: Sequence[RowPass]) -> list[Scores]:
        """One forward pass over parts that stand in neighbouring lines of the cache."""
        if self.replay is None:
            return self._run(row_passes)
        started = self._clock()
        assert isinstance(self._rows, RaggedRows)
        replayed = self.replay.score(self.module, row_passes, self._rows.cache, self._capture)
        if replayed is None:
            return self._run(row_passes)
        self.model_s += self._clock() - started
        self.num_passes += 1
        if self.replay.needs_check:
            ordinary = self._run(row_passes)
            self.replay.check(replayed, ordinary)
            return ordinary
        return replayed

    @torch.no_grad()
    def _run(self, row_passes: Sequence[RowPass]) -> list[Scores]:
        """The ordinary path: whatever the model, the parts and the device."""
        layout = self._rows.lay_out(row_passes, self.device)
        inputs: dict[str, Any] = {
            "input_ids": layout.ids,
            "past_key_values": self._rows.past_key_values,
            "use_cache": True,
        }
        if self.chain_only:
            self._check_chains(row_passes)
        else:
            assert isinstance(self.support.style, MaskStyle)
            inputs["position_ids"] = layout.positions
            mask = layout.mask(self.support.style)
            if mask is not None:
                inputs["attention_mask"] = mask
        if self._takes_keep and not self._capture.needs_all_logits:
            kept = layout.kept(must_be_index=self._capture.is_active)
            if kept is not None:
                inputs["logits_to_keep"] = kept
        started = self._clock()
        with self._capture, layout.attending():
            logits: Tensor = self.module(**inputs).logits
            captured = self._capture.take(layout.num_columns)
        self.model_s += self._clock() - started
        self.num_passes += 1
        return layout.scores(logits, captured)

    def _check_chains(self, row_passes: Sequence[RowPass]) -> None:
        if not all(row_pass.tree is None or row_pass.tree.is_chain for row_pass in row_passes):
            raise ValueError(f"this model can verify chains only ({self.support.reason}); got a tree with branches")


def expanded(scores: Scores, nodes: Sequence[int], num_scored: int) -> Scores:
    """``scores`` of united nodes for every node: ``nodes`` says which of them, ``num_scored`` are not in ``scores``."""
    new = [node - num_scored for node in nodes]
    count = scores.logits.shape[0]
    if new == list(range(count)):
        return scores
    index = torch.tensor(new, device=scores.logits.device)
    if min(new, default=0) < 0:
        raise ValueError("a node that repeats an elder sibling must be scored together with it")

    def behind(states: Tensor | None) -> Tensor | None:
        # Prompt tokens stand before the nodes.
        return None if states is None else torch.cat([states[:-count], states[-count:][index.to(states.device)]])

    return Scores(scores.logits[index], behind(scores.hidden), behind(scores.features))
