"""What the models thought of a step: the optional fields of a trace, and what ``generate --explain`` shows.

All of it is of the model's own distribution, the softmax of its logits at temperature 1 before any processor: greedy
decoding would otherwise leave nothing but zeros and ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from specdec.decode import Emission


@dataclass(frozen=True, slots=True)
class Details:
    """One step's probabilities; n nodes in its tree, k kept ones."""

    node_probs: tuple[float, ...]  # (n,) of each node's token after its parent, by the target; 1 at the root
    draft_probs: tuple[float | None, ...]  # (n,) of what the node was drawn from; None: picked with certainty
    estimates: tuple[float, ...]  # (n,) the drafter's guess that the node is accepted; (): it made none
    token_probs: tuple[float, ...]  # (k,) of each emitted token, by the target
    entropies: tuple[float, ...]  # (k,) nats, of the target's distribution at each kept node

    def as_dict(self) -> dict[str, Any]:
        """Fields of a trace line, at four significant digits."""
        return {
            "node_probs": _short(self.node_probs),
            "draft_probs": _short(self.draft_probs),
            "estimates": _short(self.estimates),
            "token_probs": _short(self.token_probs),
            "entropies": _short(self.entropies),
        }


def details(emission: Emission) -> Details:
    """Look behind one step. Costs a softmax over all nodes: never inside what is timed."""
    step, tree = emission.step, emission.tree
    logs = emission.scores.logits.double().log_softmax(-1)  # (n, V)
    kept = list(step.nodes)
    parents = [max(parent, 0) for parent in tree.parents]
    nodes = logs[parents, list(tree.tokens)].exp().tolist()
    at_kept = logs[kept]
    entropies = -(at_kept.exp() * at_kept.clamp_min(-1e30)).sum(-1)
    emitted = at_kept.gather(-1, at_kept.new_tensor(step.tokens).long()[:, None])[:, 0].exp()
    return Details(
        node_probs=(1.0, *nodes[1:]),
        draft_probs=tuple(_drawn_with(emission, node) for node in range(len(tree))),
        estimates=tree.estimates,
        token_probs=tuple(emitted.tolist()),
        entropies=tuple(entropies.tolist()),
    )


def _drawn_with(emission: Emission, node: int) -> float | None:
    tree = emission.tree
    source = tree.source(node)
    if source < 0 or tree.draft_probs is None:
        return None
    return float(tree.draft_probs[source, tree.tokens[node]])


def _short(numbers: Iterable[float | None]) -> list[float | None]:
    return [None if number is None else float(f"{number:.4g}") for number in numbers]


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """The text that each token adds behind another one: some tokenizers drop the space before a first word."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    skipped = len(tokenizer.decode([anchor]))
    return {token: tokenizer.decode([anchor, token])[skipped:] for token in token_ids}
