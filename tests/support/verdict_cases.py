"""Random passes to decide, and the host's verdicts with their margins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from kernel_cases import random_parents
from torch import Tensor

from specdec.distributions import LogitsTransform
from specdec.interfaces import Row, Scores, Verdict, Verifier
from specdec.rng import PhiloxRng, PhiloxRowRng, Stream
from specdec.sampling import SamplingParams
from specdec.tree import Draw, TokenTree

NOISE = PhiloxRng(0x9ABCDEF012345678)
PARAMS = [
    SamplingParams(),
    SamplingParams(0.6, top_k=7),
    SamplingParams(0.9, top_p=0.8),
    SamplingParams(1.3, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(min_p=0.1),
]


@dataclass(frozen=True, slots=True)
class Pass:
    """What a step has when it is time to decide."""

    rows: list[Row]
    trees: list[TokenTree]
    scores: list[Scores]


def some_tree(logits: Tensor, chance: random.Random, is_drawn: bool, reach: int) -> TokenTree:
    """A random tree of likely tokens over ``logits`` (n, V); children by turns certain and drawn in both ways."""
    parents, vocab = random_parents(len(logits), chance.randrange(10**6), reach), logits.shape[1]
    generator = torch.Generator().manual_seed(chance.randrange(10**6))
    tokens, sources, probs, draws = [chance.randrange(vocab)], [-1], list[Tensor](), list[Draw]()
    for node, parent in enumerate(parents[1:], 1):
        taken = [tokens[i] for i in range(1, node) if parents[i] == parent]
        sharpened = (logits[parent].float() * 1.5 + torch.randn(vocab, generator=generator) * 0.3).softmax(-1)
        kind = chance.choice((None, *Draw)) if is_drawn else None
        if kind is not Draw.INDEPENDENT:
            sharpened[taken] = 0
        tokens.append(int(torch.multinomial(sharpened, 1, generator=generator)))
        sources.append(-1 if kind is None else len(draws))
        if kind is not None:
            draws.append(kind)
            probs.append(sharpened / sharpened.sum())
    if not draws:
        return TokenTree(tuple(tokens), tuple(parents))
    return TokenTree(tuple(tokens), tuple(parents), tuple(sources), torch.stack(probs), tuple(draws))


def some_pass(
    seed: int,
    is_drawn: bool = False,
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = (20, 1, 14, 6),
    reach: int = 3,
) -> Pass:
    """Rows of different keys, lengths and trees; chains with a ``reach`` of one."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, trees, scores = list[Row](), list[TokenTree](), list[Scores]()
    for key, size in enumerate(sizes):
        logits = (torch.randn(size, 40, generator=generator) * 4).to(dtype)
        trees.append(some_tree(logits, chance, is_drawn, reach))
        rows.append(Row(3 * key + seed, [1] * chance.randrange(1, 40) + [trees[-1].tokens[0]], 99))
        scores.append(Scores(logits))
    return Pass(rows, trees, scores)


@dataclass
class Margins:
    """Philox noise of one row that notes how near to a tie its answers were."""

    inner: PhiloxRowRng
    least: float = 1.0
    others: list[float] = field(default_factory=list)

    def draw(self, probs: Tensor, depth: int, stream: Stream = Stream.TARGET, index: int = 0) -> int:
        if stream is Stream.TARGET:
            scores = probs.double().log() + self.inner.gumbel(torch.arange(len(probs)), depth)
            best = scores.topk(2).values
            self._note(float(best[0] - best[1]))
        else:
            words = self.inner._words(torch.arange(2), depth, stream, index).double()
            uniform = (words[0] * 2.0**32 + words[1] + 0.5) * 2.0**-64
            self._note(float((probs.double().cumsum(-1) / probs.double().sum() - uniform).abs().min()))
        return self.inner.draw(probs, depth, stream, index)

    def bernoulli(self, prob: float, depth: int, index: int = 0) -> bool:
        word = self.inner._words(torch.zeros(1, dtype=torch.long), depth, Stream.COIN, index)
        self._note(abs((int(word) + 0.5) * 2.0**-32 - prob))
        return self.inner.bernoulli(prob, depth, index)

    def _note(self, margin: float) -> None:
        self.least = min(self.least, margin)


def on_host(verifier: Verifier, logits_transform: LogitsTransform, given: Pass) -> list[tuple[Verdict, float]]:
    """The verdict of each row, and how near to a tie its choices were."""
    found = []
    for row, tree, scores in zip(given.rows, given.trees, given.scores, strict=True):
        rng = Margins(NOISE.at(row.key, len(row.tokens)))
        found.append((verifier.verify(tree, logits_transform.target_probs(row, tree, scores), rng), rng.least))
    return found
