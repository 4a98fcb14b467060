"""What an answer cost, and what speculation did for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.interfaces import Step
from specdec.serve.pieces import Pieces, Vocabulary
from specdec.serving.request import Completion


def usage_of(texts: Sequence[Completion], choices_per_prompt: int) -> dict[str, Any]:
    """OpenAI's ``usage``, with our ``speculation`` beside its details. A prompt with several answers counts once."""
    prompt = sum(len(each.prompt_tokens) for each in texts[::choices_per_prompt])
    cached = sum(each.num_cached for each in texts[::choices_per_prompt])
    generated = sum(len(each.tokens) for each in texts)
    drafts, drafted, accepted = (
        sum(counts)
        for counts in zip(
            *((s.num_drafts, s.num_draft_tokens, s.num_accepted_tokens) for s in (each.stats for each in texts)),
            strict=True,
        )
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "speculation": {
            "num_drafts": drafts,
            "num_draft_tokens": drafted,
            "num_accepted_tokens": accepted,
            "acceptance_rate": accepted / drafted if drafted else 0.0,
            "mean_acceptance_length": 1 + accepted / drafts if drafts else 1.0,
        },
    }


def speculation_of(step: Step, tokens: Sequence[int], pieces: Pieces, words: Vocabulary) -> dict[str, Any]:
    """One pass for whoever wants to look: the emitted ``tokens``, of which the first ``accepted`` were drafted, and the
    tree they come from. ``nodes`` is the accepted path through it, the root first.
    """
    texts = pieces.split(tokens)
    return {
        "tokens": [{"id": token, "text": text} for token, text in zip(tokens, texts, strict=True)],
        "accepted": min(step.num_accepted, len(tokens)),
        "tree": {
            "tokens": list(step.tree_tokens),
            "texts": [words.text(token) for token in step.tree_tokens],
            "parents": list(step.tree_parents),
            "nodes": list(step.nodes),
        },
        "rows": step.num_rows,
        "seconds": step.draft_s + step.score_s + step.verify_s,
    }
