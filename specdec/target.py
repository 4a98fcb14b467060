"""An unmodified transformers causal LM as a Target: all rows and all tree nodes in one forward pass.

A row's tokens that the cache lacks ("pending": the whole prompt at first) are processed in the same pass as the tree
behind them. Columns of a pass are aligned at the right, so that the last columns are the trees'; slots of the cache
are aligned at the left, without holes. Letters: B rows, T columns, n nodes, p pending tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specdec.attention import MaskPlan, MaskStyle
from specdec.cache import RaggedCache
from specdec.capture import Capture, joined
from specdec.errors import UnsupportedModelError
from specdec.interfaces import Row, Scores
from specdec.probe import Support, inspect_model, probe
from specdec.tree import TokenTree

PASS_COLUMNS = 128  # padded columns that are worth a pass of their own to avoid
PREFILL_CHUNK = 1024  # tokens a row: a longer prompt is processed in several passes, which bounds the mask's memory


# What the probe found, for as long as the model lives: generate() builds a CausalLM at every call.
_PROBED: WeakKeyDictionary[Any, tuple[Any, Support]] = WeakKeyDictionary()


@dataclass(slots=True)
class _Line:
    """A row's place in the cache."""

    index: int  # buffer row
    length: int = 0  # slots that hold kept tokens
    nodes: list[int] = field(default_factory=list)  # of the tree just scored: behind which slot each node stands


@dataclass(frozen=True, slots=True)
class _Part:
    """One row's share of a pass."""

    line: _Line
    pending: list[int]  # (p,)
    tree: TokenTree | None  # None while a long prompt is processed
    num_scored: int  # nodes that an earlier pass scored

    @property
    def new_tokens(self) -> list[int]:
        return self.pending + list(self.tree.tokens[self.num_scored :]) if self.tree else self.pending

    @property
    def base(self) -> int:
        """The slot of the root."""
        return self.line.length + len(self.pending)

    @property
    def start(self) -> int:
        """The slot of the first new token."""
        return self.line.length + self.num_scored


class CausalLM:
    """A transformers causal LM as a target (or as the model behind a drafter).

    Args:
        model: any ``PreTrainedModel`` with a language-model head; it stays unmodified.
        capture_hidden: also return the input of the output matrix for each new token.
        feature_layers: also return these entries of ``hidden_states`` (0 = embeddings), side by side.
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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.model_s = 0.0
        self.num_passes = 0
        self.support: Support = inspect_model(model)
        head = model.get_output_embeddings()
        self.vocab_size: int = getattr(head, "out_features", None) or head.weight.shape[0]
        self._clock = clock
        self._config = model.config.get_text_config()
        self._lines: dict[Row, _Line] = {}
        self._by_index: list[Row] = []
        self._cache = self._new_cache()
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._capture = Capture(model, capture_hidden, tuple(feature_layers))
        self._probe()

    @property
    def chain_only(self) -> bool:
        """Whether only chains can be verified (see ``support.reason``)."""
        return not self.support.can_tree

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def open(self, rows: Sequence[Row]) -> None:
        """Give each row a line of the cache.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, or more positions than the model has.
        """
        for row in rows:
            self._check(row)
        for row in rows:
            self._lines[row] = _Line(len(self._by_index))
            self._by_index.append(row)
        self._cache.reserve_rows(len(self._by_index))

    def score(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], num_scored: Sequence[int] | None = None
    ) -> list[Scores]:
        """Logits of every node of each row's tree, in one forward pass.

        ``num_scored`` says how many leading nodes of each tree an earlier call has scored since the last commit: only
        the nodes after them are processed and returned (how a drafter grows a tree level by level).
        """
        scored = num_scored or [0] * len(rows)
        parts: list[_Part] = []
        earlier: list[list[Scores]] = []
        for row, tree, done in zip(rows, trees, scored, strict=True):
            line = self._lines[row]
            pending = [] if done else row.tokens[line.length : -1]
            chunks = self._prefill(row, pending)
            earlier.append(chunks)
            compact, line.nodes = tree.compact()
            num_done = len(set(line.nodes[:done]))
            parts.append(_Part(line, pending[len(chunks) * PREFILL_CHUNK :], compact, num_done))
        results: list[Scores | None] = [None] * len(parts)
        for group in self._groups(parts):
            for i, scores in zip(group, self._forward([parts[i] for i in group]), strict=True):
                results[i] = joined([*earlier[i], scores])
        for part in parts:
            part.line.length = part.base
        return [
            expanded(r, part.line.nodes[done:], part.num_scored)
            for r, part, done in zip(results, parts, scored, strict=True)
            if r is not None
        ]

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        """Keep the slots of the nodes ``paths`` (root first); they become the rows' next slots."""
        for row, path in zip(rows, paths, strict=True):
            line = self._lines[row]
            path = [line.nodes[node] for node in path]
            first = next((i for i, node in enumerate(path) if node != i), len(path))
            if first < len(path):
                source = torch.tensor([line.length + node for node in path[first:]], device=self.device)
                self._cache.move_slots(line.index, source, slice(line.length + first, line.length + len(path)))
            line.length += len(path)

    def close(self, rows: Sequence[Row]) -> None:
        """Forget ``rows``; the last line of the cache moves into each gap, so that lines in use stay together."""
        for row in rows:
            hole = self._lines.pop(row).index
            last = self._by_index.pop()
            if last is not row:
                line = self._lines[last]
                self._cache.move_row(line.index, hole, line.length)
                line.index = hole
                self._by_index[hole] = last

    def reset(self) -> None:
        """Forget all rows and free the cache."""
        self._lines.clear()
        self._by_index.clear()
        self._cache = self._new_cache()

    def _probe(self) -> None:
        """Try what the config promises, so that no model can be wrong in silence; once for each model object."""
        model = self.model
        key = (model.dtype, self.device, self._config._attn_implementation, self.support)
        if _PROBED.get(model, (None, None))[0] == key:
            self.support = _PROBED[model][1]
            return
        branching = self.support.can_tree
        fault = probe(self, branching)
        if fault and branching:
            self.support = replace(self.support, can_tree=False, reason=fault)
            fault = probe(self, branching=False)
        if fault:
            raise UnsupportedModelError(f"{type(self.model).__name__} cannot be verified: {fault}")
        self.model_s, self.num_passes = 0.0, 0
        _PROBED[model] = (key, self.support)

    def _new_cache(self) -> RaggedCache:
        return RaggedCache(self._config.num_hidden_layers)

    def _check(self, row: Row) -> None:
        if not row.tokens:
            raise ValueError("a row needs at least one prompt token, got an empty prompt")
        worst = max(max(row.tokens), -min(row.tokens))
        if min(row.tokens) < 0 or worst >= self.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}) (the model's vocabulary), got {min(row.tokens)} to {max(row.tokens)}"
            )
        context = getattr(self._config, "max_position_embeddings", None)
        if context is not None and row.num_prompt > context:
            raise ValueError(
                f"the prompt has {row.num_prompt} tokens, but the model's context ends at {context}; shorten it"
            )
        limit = self.support.max_positions
        if limit is not None and row.max_tokens > limit:
            raise ValueError(
                f"prompt and new tokens need {row.max_tokens} positions, but {self.support.limit_reason} {limit}; "
                f"shorten the prompt ({row.num_prompt} tokens) or ask for at most {max(limit - row.num_prompt, 0)} new tokens"
            )

    def _groups(self, parts: Sequence[_Part]) -> list[list[int]]:
        """Which parts share a forward pass, each in the order of the cache's lines."""
        order = sorted(range(len(parts)), key=lambda i: parts[i].line.index)
        if self.chain_only:
            return [[i] for i in order]
        indices = [parts[i].line.index for i in order]
        runs = grouped(indices, [len(parts[i].new_tokens) for i in order])
        return [order[run] for run in runs]

    def _prefill(self, row: Row, pending: list[int]) -> list[Scores]:
        """Process what a long prompt has beyond one chunk, chunk by chunk."""
        line = self._lines[row]
        chunks = []
        for first in range(0, len(pending) - PREFILL_CHUNK, PREFILL_CHUNK):
            part = _Part(line, pending[first : first + PREFILL_CHUNK], None, 0)
            chunks += self._forward([part])
            line.length = part.base
        return chunks

    @torch.no_grad()
    def _forward(self, parts: Sequence[_Part]) -> list[Scores]:
        """One forward pass over parts that stand in neighbouring lines of the cache."""
        columns = [part.new_tokens for part in parts]
        num_columns = max(map(len, columns))
        input_ids = torch.tensor([[0] * (num_columns - len(c)) + c for c in columns], device=self.device)
        is_plain = self._is_plain(parts)
        start = max(part.start for part in parts)
        width = start + num_columns if is_plain else max(part.start + num_columns for part in parts)
        slots = None if is_plain else _slots(parts, num_columns).to(self.device)
        self._cache.begin_pass(parts[0].line.index, start, width, slots)
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "past_key_values": self._cache.past_key_values,
            "use_cache": True,
        }
        if not self.chain_only:
            style, plan = self.support.style, _plan(parts, num_columns, width, self.device)
            assert isinstance(style, MaskStyle)
            inputs["position_ids"] = plan.positions
            if not is_plain:
                inputs["attention_mask"] = style.build(plan)
        num_nodes = [len(part.tree) - part.num_scored if part.tree else 0 for part in parts]
        num_kept = max(1, *num_nodes)
        if self._takes_keep and num_kept < num_columns and not self._capture.needs_all_logits:
            # Given a number, Gemma 4 drops the other columns in the middle of the model.
            kept = torch.arange(num_columns - num_kept, num_columns, device=self.device)
            inputs["logits_to_keep"] = kept if self._capture.is_active else num_kept
        started = self._clock()
        with self._capture:
            logits: Tensor = self.model(**inputs).logits
            captured = self._capture.take(num_columns)
        self.model_s += self._clock() - started
        self.num_passes += 1
        return [captured.scores(logits[b], len(columns[b]), num_nodes[b], b) for b in range(len(parts))]

    def _is_plain(self, parts: Sequence[_Part]) -> bool:
        """Whether the model's own causal mask is right: chains in lockstep."""
        if self.chain_only:
            if not all(part.tree is None or part.tree.is_chain for part in parts):
                raise ValueError(f"this model can verify chains only ({self.support.reason}); got a tree with branches")
            return True
        first = parts[0]
        size = len(first.new_tokens)
        return all(
            part.start == first.start and len(part.new_tokens) == size and (part.tree is None or part.tree.is_chain)
            for part in parts
        )


def grouped(lines: Sequence[int], sizes: Sequence[int]) -> list[slice]:
    """Which of neighbouring parts share a pass: those with the least padded columns in all, each pass counting too.

    A pass reads a run of neighbouring ``lines`` as one slice and is as wide as the largest of its ``sizes``. Without
    this, one row that joins with its prompt would make every row of the batch as wide as that prompt.
    """
    if len(set(sizes)) <= 1 and lines[-1] - lines[0] == len(lines) - 1:
        return [slice(0, len(lines))]
    best, cuts = [0], [0]  # of the first i parts: the least columns, and where the last group starts
    for end in range(1, len(lines) + 1):
        widest, least, cut = 0, float("inf"), end - 1
        for first in range(end - 1, -1, -1):
            if lines[first] + end - 1 - first != lines[end - 1]:
                break
            widest = max(widest, sizes[first])
            columns = best[first] + widest * (end - first) + PASS_COLUMNS
            if columns < least:
                least, cut = columns, first
        best.append(int(least))
        cuts.append(cut)
    runs, end = [], len(lines)
    while end:
        runs.append(slice(cuts[end], end))
        end = cuts[end]
    return runs[::-1]


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


def _slots(parts: Sequence[_Part], num_columns: int) -> Tensor:
    """(B, T) slots of the columns: real ones from the row's start on, padding behind them where nothing is kept."""
    columns = torch.arange(num_columns)
    starts = torch.tensor([part.start for part in parts])[:, None]
    padding = torch.tensor([num_columns - len(part.new_tokens) for part in parts])[:, None]
    return starts + (columns - padding) % num_columns


def _plan(parts: Sequence[_Part], num_columns: int, width: int, device: torch.device) -> MaskPlan:
    limits, positions, blocks, depths = [], [], [], []
    for part in parts:
        length, base = part.line.length, part.base
        pad = num_columns - len(part.new_tokens)
        node_depths = part.tree.depths() if part.tree else []
        new_depths = node_depths[part.num_scored :]
        pending = range(length, base)
        # A padding column sees slot 0, so that its softmax has something to sum.
        limits.append([1] * pad + [slot + 1 for slot in pending] + [base] * len(new_depths))
        positions.append([0] * pad + list(pending) + [base + d for d in new_depths])
        block = torch.zeros(num_columns, len(node_depths), dtype=torch.bool)
        if part.tree:
            block[num_columns - len(new_depths) :] = torch.from_numpy(part.tree.ancestors()[part.num_scored :])
        blocks.append(block.to(device))
        depths.append(torch.tensor(node_depths, dtype=torch.long, device=device))
    bases = tuple(part.base for part in parts)
    return MaskPlan(
        torch.tensor(limits, device=device),
        torch.tensor(positions, device=device),
        bases,
        tuple(blocks),
        tuple(depths),
        width,
    )
