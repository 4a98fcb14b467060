"""The core types: what a target, a drafter and a verifier promise each other.

Letters for shapes: n nodes of one tree, V vocabulary, H hidden size, F feature size, p prompt tokens not yet scored.
Everything is a batch of rows; one sequence is a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdec.constraints import TextGrammar
from specdec.rng import Rng, RowRng
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree


@dataclass(slots=True, eq=False)
class Row:
    """One sequence being generated. The decode loop appends to ``tokens``; everybody else only reads.

    ``key`` names the row's noise: the same key, seed and position give the same sample in any batch.
    """

    key: int
    tokens: list[int]  # prompt, then what was emitted
    max_tokens: int  # the length at which the row ends, prompt included
    grammar: TextGrammar | None = None  # what its text must keep to; None: it is free
    num_prompt: int = field(init=False)
    num_steps: int = field(init=False, default=0)
    num_new: int = field(init=False, default=0)  # tokens emitted by the latest step

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_emitted(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        return self.max_tokens - len(self.tokens)


@dataclass(frozen=True, slots=True)
class Limit:
    """How large a tree may be: more than ``depth`` accepted tokens would never be emitted.

    A drafter for which each level of a tree costs time of its own should draft no more than ``levels`` of them: deeper
    ones have not been paying. It is advice; others ignore it.
    """

    depth: int  # edges below the root
    nodes: int  # nodes below the root
    chain_only: bool = False  # the target cannot verify branches
    levels: int | None = None  # None: as many as ``depth``

    @property
    def num_levels(self) -> int:
        """How many levels are worth their time."""
        return self.depth if self.levels is None else min(self.depth, self.levels)


@dataclass(frozen=True, slots=True)
class Scores:
    """What one forward pass of the target says of one row's tree."""

    logits: Tensor  # (n, V) raw, in the model's dtype
    hidden: Tensor | None = None  # (p + n, H) input of the output matrix, if the drafter asked for it
    features: Tensor | None = None  # (p + n, F) chosen layers side by side, if the drafter asked for them


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier decided: ``tokens`` are emitted, ``nodes`` stay in the caches."""

    nodes: tuple[int, ...]  # the root, then the accepted nodes, a path
    tokens: tuple[int, ...]  # tokens of nodes[1:], then one from the target; as many as nodes

    @property
    def num_accepted(self) -> int:
        return len(self.nodes) - 1


class TargetDistributions(Protocol):
    """The target's next-token distribution at the nodes of one tree, after every processor and warper.

    Computed when asked for, because the verification walk visits at most depth + 1 nodes.
    """

    @property
    def is_greedy(self) -> bool:
        """Whether every distribution puts all its mass on one token."""

    def probs(self, node: int) -> Tensor:
        """The distribution (V,) of the token that follows ``node``."""

    def best(self, node: int) -> int:
        """The most probable token after ``node``."""


class Target(Protocol):
    """The model whose distribution is kept. ``score`` is ONE forward pass for all rows."""

    @property
    def vocab_size(self) -> int:
        """V: token ids are in [0, V)."""

    @property
    def chain_only(self) -> bool:
        """Whether it can verify chains only."""

    def open(self, rows: Sequence[Row]) -> None:
        """Make room for ``rows``, for all of them or none; their prompts are processed by the first ``score``."""

    def score(self, rows: Sequence[Row], trees: Sequence[TokenTree]) -> list[Scores]:
        """Logits of every node; the root of each tree is its row's newest token."""

    def commit(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> None:
        """Keep the cache entries of ``paths`` (root first) of the trees just scored and drop the others."""

    def close(self, rows: Sequence[Row]) -> None:
        """Free what ``rows`` hold; rows that were never opened are ignored."""


@runtime_checkable
class ModelTarget(Target, Protocol):
    """A target that runs a transformers model and shows its hidden states: what drafters with trained heads need."""

    @property
    def model(self) -> Any:
        """The transformers model."""

    @property
    def device(self) -> torch.device:
        """Where its embeddings are."""

    @property
    def hidden_size(self) -> int:
        """H."""

    def request(self, *, hidden: bool = False, layers: Sequence[int] = ()) -> None:
        """Return the input of the output matrix, and these entries of ``hidden_states``, with every pass from now on."""

    def rows_beside(self, num_layers: int) -> Any:
        """Where a network beside this one keeps the keys and values of its layers (``specdec.engine.layout.KVRows``)."""

    def hidden(self, scores: Scores) -> Tensor:
        """(p + n, H) the requested input of the output matrix."""

    def features(self, scores: Scores, layers: Sequence[int]) -> Tensor:
        """(p + n, F) the requested ``layers`` side by side, whatever others have requested."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. State belongs to rows that were begun and not yet ended.

    Inherit from this class for the defaults of the traits ``drafts_by_level``, ``is_drawing`` and ``model_s``; it adds
    nothing else.
    """

    @property
    def name(self) -> str:
        """Its name in tables and traces."""

    @property
    def drafts_by_level(self) -> bool:
        """Whether each level of a tree takes a pass of a network: a hybrid asks such a part last, and not always."""
        return False

    @property
    def model_s(self) -> float:
        """Seconds inside forward passes that it ran itself, so far."""
        return 0.0

    @property
    def is_drawing(self) -> bool:
        """Whether its trees may hold drawn nodes: a hybrid keeps these whole, and divides the limit beforehand."""
        return False

    def begin(self, rows: Sequence[Row]) -> None:
        """Rows join with their prompts."""

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, rng: Rng
    ) -> list[TokenTree]:
        """One tree for each row, rooted at the row's newest token and within its limit."""

    def observe(
        self, rows: Sequence[Row], trees: Sequence[TokenTree], verdicts: Sequence[Verdict], scores: Sequence[Scores]
    ) -> None:
        """What became of the step; ``row.tokens`` already holds the emitted tokens.

        ``trees`` are those that were verified, to which ``verdicts`` and ``scores`` refer: a part of what was
        proposed, or merged with what others proposed. A drafter finds its own nodes again by their tokens.
        """

    def end(self, rows: Sequence[Row]) -> None:
        """Rows leave; rows that never began are ignored."""


class BatchRule(StrEnum):
    """How a verifier decides on all rows of a pass at once, on the device of the logits."""

    FOLLOW = "follow"  # pick the target's token at every node, and follow the children that hold it
    REJECT = "reject"  # rejection sampling along the tree


@runtime_checkable
class Verifier(Protocol):
    """Decides which path of a tree is kept. Pure: no model, no global state, randomness from ``noise`` alone."""

    @property
    def name(self) -> str:
        """Its name in tables and traces."""

    @property
    def lossless(self) -> bool:
        """Whether the emitted tokens follow the target's distribution exactly."""

    @property
    def chain_only(self) -> bool:
        """Whether it takes chains only."""

    @property
    def shares_target_noise(self) -> bool:
        """Whether it decides by the noise of each position alone, which a drafter may share to be matched more often.

        With others a drafter samples from its own distribution and reports which one it was.
        """

    @property
    def looks_ahead(self) -> bool:
        """Whether, above temperature 0, it asks for distributions behind nodes that it then does not keep.

        Otherwise it asks on its way down only: behind the root, then behind each node that it keeps.
        """

    @property
    def draws(self) -> frozenset[Draw]:
        """The draws it is exact for (certain nodes always are); ``verify`` raises InexactDraftError for others."""

    def batch_rule(self, params: SamplingParams) -> BatchRule | None:
        """The rule by which a device decides as ``verify`` does; None: under ``params`` only ``verify`` can."""

    def verify(self, tree: TokenTree, target: TargetDistributions, rng: RowRng) -> Verdict:
        """The accepted path and the tokens to emit."""


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter is built from."""

    target: Target
    verifier: Verifier
    draft_models: Sequence[Any] = ()  # models of the caller's for drafters that run one
    options: Mapping[str, Any] = field(default_factory=dict)  # from "name:option=value,..."


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass did for one row: one line of a trace. Seconds are the row's equal share of the pass."""

    row: int  # the row's key
    index: int  # how many steps this row had before
    position: int  # absolute position of the first emitted token
    tokens: tuple[int, ...]  # emitted
    nodes: tuple[int, ...]  # the root and the accepted nodes
    tree_tokens: tuple[int, ...]
    tree_parents: tuple[int, ...]
    num_rows: int  # rows in this pass
    draft_s: float
    score_s: float
    verify_s: float
    finished: bool

    @property
    def num_drafted(self) -> int:
        return len(self.tree_tokens) - 1

    @property
    def num_accepted(self) -> int:
        return len(self.nodes) - 1
