"""A small causal LM as drafter: the classic of speculative decoding, one chain for each row and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnsupportedModelError
from specdec.interfaces import DraftContext, Drafter, Limit, Row, Scores, Verdict
from specdec.noise import Noise, Stream
from specdec.sampling import SamplingParams, sampling_probs
from specdec.target import CausalLM
from specdec.tree import Draw, TokenTree


@dataclass(slots=True)
class _Chain:
    """One row's draft as it grows."""

    row: Row
    limit: int
    tokens: list[int]
    probs: list[Tensor] = field(default_factory=list)  # of (V,): what each token was drawn from, if sampled
    confidence: float = 1.0  # probability of the whole chain under the draft model


@dataclass(slots=True)
class ModelDrafter:
    """Drafts chains with a causal LM that shares the target's vocabulary; it keeps its own cache.

    With ``sampled`` each token is drawn from the draft model's distribution, warped like the target's, and handed on
    with it (for rejection rules). Otherwise tokens are picked with certainty: the most probable one under the noise
    that the ``match`` verifier will use for the same position, which at temperature 0 is the plain argmax.

    Args:
        engine: the draft model.
        num_tokens: the longest chain.
        min_confidence: no further token is drafted once the chain's probability under the draft model is lower. The
            token that made it fall stays: dropping a drawn token for its own probability would not be exact.
        sampled: draw from the draft distribution instead of picking.
    """

    engine: CausalLM
    num_tokens: int = 5
    min_confidence: float = 0.3
    sampled: bool = False
    name: str = "model"
    _num_scored: dict[Row, int] = field(default_factory=dict)  # nodes of the latest tree in the draft model's cache

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {self.num_tokens}")

    def begin(self, rows: Sequence[Row]) -> None:
        self.engine.open(rows)
        self._num_scored.update((row, 0) for row in rows)

    def propose(
        self, rows: Sequence[Row], limits: Sequence[Limit], params: SamplingParams, noise: Noise
    ) -> list[TokenTree]:
        chains = [
            _Chain(row, min(limit.depth, limit.nodes, self.num_tokens), [row.tokens[-1]])
            for row, limit in zip(rows, limits, strict=True)
        ]
        self._num_scored.update((row, 0) for row in rows)
        growing = [chain for chain in chains if chain.limit > 0]
        while growing:
            trees = [TokenTree.chain(chain.tokens[0], chain.tokens[1:]) for chain in growing]
            scores = self.engine.score([c.row for c in growing], trees, [len(c.tokens) - 1 for c in growing])
            for chain, score in zip(growing, scores, strict=True):
                self._num_scored[chain.row] = len(chain.tokens)
                self._extend(chain, score.logits[-1], params, noise)
            growing = [c for c in growing if len(c.tokens) <= c.limit and c.confidence >= self.min_confidence]
        return [TokenTree.chain(c.tokens[0], c.tokens[1:], torch.stack(c.probs) if c.probs else None) for c in chains]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], scores: Sequence[Scores]) -> None:
        # The last drafted token was never fed to the draft model: if accepted it is processed with the next root.
        kept = [[n for n in v.nodes if n < self._num_scored[row]] for row, v in zip(rows, verdicts, strict=True)]
        self.engine.commit(rows, kept)

    def end(self, rows: Sequence[Row]) -> None:
        begun = [row for row in rows if self._num_scored.pop(row, None) is not None]
        self.engine.close(begun)

    def _extend(self, chain: _Chain, logits: Tensor, params: SamplingParams, noise: Noise) -> None:
        depth = len(chain.tokens) - 1
        probs = sampling_probs(logits, params)
        row_noise = noise.at(chain.row.key, len(chain.row.tokens))
        if params.is_greedy:
            token = int(probs.argmax())
            chain.confidence *= float(logits.float().softmax(-1)[token])
        else:
            token = row_noise.draw(probs, depth, Stream.DRAFT if self.sampled else Stream.TARGET)
            chain.confidence *= float(probs[token])
            if self.sampled:
                chain.probs.append(probs)
        chain.tokens.append(token)


def build(context: DraftContext) -> Drafter:
    """Options: num_tokens, min_confidence, sampled."""
    if len(context.draft_models) != 1:
        raise ValueError(
            f"drafter 'model' needs one draft model, got {len(context.draft_models)}; "
            "pass draft_model=... (on the command line: --drafter-model NAME_OR_PATH)"
        )
    engine = CausalLM(context.draft_models[0])
    check_vocabulary(engine, context.target)
    # A verifier that couples through the noise wants the noise's own pick; the others gain from drawn tokens.
    options: dict[str, Any] = {"sampled": Draw.TOP_PLUS_ONE not in context.draws, **context.options}
    return ModelDrafter(engine, **options)


def check_vocabulary(engine: CausalLM, target: Any) -> None:
    """Refuse a draft model whose token ids cannot mean the same.

    Raises:
        UnsupportedModelError: the two vocabularies have different sizes.
    """
    if engine.vocab_size != target.vocab_size:
        raise UnsupportedModelError(
            f"the draft model has {engine.vocab_size} token ids and the target {target.vocab_size}: they do not share "
            "a tokenizer; use a draft model of the same family, or a drafter without a model such as 'ngram'"
        )
