"""The proofs prove something: our own code with one thing wrong fails them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from enumeration import exact_joint, softmax_law, total_variation, whole_joint
from exact_cases import SMALL, TOLERANCE
from mutants import mutated
from toy import PROMPT
from toy_grammar import END, REGEXES, llguidance_backend, loop, masked_law, start, toy_drafter

from specdec.drafters.grammar import GrammarDrafter
from specdec.errors import GrammarError
from specdec.grammar import masks, row, with_llguidance
from specdec.grammar.inputs import Grammar
from specdec.sampling import SamplingParams
from specdec.verifiers import make_verifier

FOUND = 1e-3


def error(begin: Any, *, transform: Any = masks.GrammarTransform, row_grammar: Any = row.RowGrammar) -> float:
    """Total variation between whole runs and plain constrained decoding; 1 if the loop breaks."""
    rule = make_verifier("match")
    drafter = GrammarDrafter(toy_drafter(SMALL["certain unbalanced"]), drops_drawn=True)
    runs = loop(drafter, rule, begin, transform=transform(SamplingParams()), row_grammar=row_grammar)
    right = partial(start(REGEXES[0], "llguidance").fork)
    expected = exact_joint(runs.target, PROMPT, 4, masked_law(right, softmax_law), stop_token=END)
    try:
        return total_variation(whole_joint(runs, 4), expected)
    except GrammarError:
        return 1.0


def test_without_a_mutation_there_is_no_error() -> None:
    assert error(partial(start(REGEXES[0], "llguidance").fork)) <= TOLERANCE


PATH = "masked_at(row, length, tree.path_tokens(node), scores)"
MASKS = {
    "the mask of the parent": (PATH, PATH.replace("(node)", "(max(tree.parents[node], 0))")),
    "the mask of the child": (PATH, PATH.replace("(node)", "(min(node + 1, len(tree) - 1))")),
    "the mask of the root": (PATH, PATH.replace("tree.path_tokens(node)", "()")),
    "the mask of another text": ("row.tokens[:length]", "row.tokens[: length - 1]"),
    "no mask": ("scores.masked_fill(~allowed.to(scores.device), -torch.inf)", "scores"),
}
ROWS = {
    "not rolled back": ("self.state.rollback(len(self._taken) - num_common)", "pass"),
    "rolled back too far": ("rollback(len(self._taken) - num_common)", "rollback(len(self._taken))"),
    "accepted twice": ("self._taken.append(token)", "self._taken.append(token); self.state.accept(token)"),
    "not accepted": ("if not self.state.accept(token):", "if False:"),
    "the prompt is taken for the text": ("tokens[self.start :]", "tokens[self.start - 1 :]"),
}
STATES = {
    "the end is allowed early": ("mask[list(self.ends)] = self.is_complete", "mask[list(self.ends)] = True"),
    "the end is never allowed": ("mask[list(self.ends)] = self.is_complete", "mask[list(self.ends)] = False"),
}


@pytest.mark.parametrize("mutation", MASKS)
def test_enumeration_finds_masks_of_the_wrong_place(mutation: str) -> None:
    wrong = mutated(masks, *MASKS[mutation])
    assert error(partial(start(REGEXES[0], "llguidance").fork), transform=wrong.GrammarTransform) > FOUND


@pytest.mark.parametrize("mutation", ROWS)
def test_enumeration_finds_states_that_stand_elsewhere(mutation: str) -> None:
    wrong = mutated(row, *ROWS[mutation])
    assert error(partial(start(REGEXES[0], "llguidance").fork), row_grammar=wrong.RowGrammar) > FOUND


@pytest.mark.parametrize("mutation", STATES)
def test_enumeration_finds_ends_in_the_wrong_place(mutation: str) -> None:
    wrong = mutated(with_llguidance, *STATES[mutation])
    backend = wrong.LlguidanceBackend(llguidance_backend().tokenizer, (END,))
    assert error(partial(backend.compile(Grammar.regex(REGEXES[0])).fork)) > FOUND
