"""A state depends on its text alone, whatever way it came there; and what it never allows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from json_grammars import END, GRAMMARS, compiler, walk
from mutants import mutated
from tinychat import VOCAB
from torch import Tensor

from specdec.constraints import GrammarState
from specdec.errors import GrammarError
from specdec.grammar import row as row_module
from specdec.grammar import trees as trees_module
from specdec.grammar.inputs import Grammar
from specdec.grammar.options import longest
from specdec.grammar.row import RowGrammar
from specdec.grammar.trees import grown, pruned
from specdec.interfaces import Limit
from specdec.tree import TokenTree

PROMPT = [5, 6, 7]
each_grammar = pytest.mark.parametrize("name", GRAMMARS)


def facts(state: GrammarState) -> tuple[Any, ...]:
    return state.allowed().tolist(), state.is_complete, tuple(state.forced(6))


def fresh(start: GrammarState, text: Sequence[int]) -> GrammarState | None:
    """A new matcher that was led along ``text``."""
    state = start.fork()
    return state if all(state.accept(token) for token in text) else None


def random_tree(start: GrammarState, text: Sequence[int], rng: random.Random, size: int = 12) -> TokenTree:
    """Nodes of which most are allowed and some are not."""
    tokens, parents, taken = [text[-1] if text else PROMPT[-1]], [-1], set[tuple[int, int]]()
    for _ in range(size):
        parent = rng.randrange(len(tokens))
        path, node = list[int](), parent
        while node:
            path.append(tokens[node])
            node = parents[node]
        state = fresh(start, [*text, *path[::-1]])
        choices = state.allowed().nonzero().flatten().tolist() if state and rng.random() < 0.8 else range(VOCAB)
        token = rng.choice(choices)
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    return TokenTree(tuple(tokens), tuple(parents))


def check_walks(start: GrammarState, row_grammar: Any, num_texts: int = 6) -> None:
    """Every node of random trees behind random texts, in random order, against a fresh matcher."""
    rng = random.Random(0)
    for _ in range(num_texts):
        text = walk(start.fork(), rng, rng.randrange(30), hurry=20)
        grammar = row_grammar(start.fork(), len(PROMPT))
        tokens = list(PROMPT)
        while True:
            tree = random_tree(start, tokens[len(PROMPT) :], rng)
            for node in rng.sample(range(len(tree)), len(tree)):
                path = tree.path_tokens(node)
                expected, state = fresh(start, [*tokens[len(PROMPT) :], *path]), grammar.find(tokens, path)
                assert (state is None) == (expected is None)
                assert state is None or expected is None or facts(state) == facts(expected)
            if len(tokens) == len(PROMPT) + len(text):
                break
            done = len(tokens) - len(PROMPT)
            tokens += text[done : done + rng.randrange(1, 8)]


@each_grammar
def test_the_state_at_every_node_of_random_trees_is_that_of_a_fresh_matcher(name: str) -> None:
    check_walks(compiler().start(GRAMMARS[name]), RowGrammar)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.state.rollback(len(self._taken) - num_common)", "pass"),
        ("self._taken.append(token)", "self._taken.append(token); self.state.accept(token)"),
    ],
    ids=["not rolled back", "accepted twice"],
)
def test_that_finds_states_that_stand_elsewhere(old: str, new: str) -> None:
    wrong = mutated(row_module, old, new)
    with pytest.raises((AssertionError, GrammarError)):
        check_walks(compiler().start(GRAMMARS["person"]), wrong.RowGrammar)


def allowed_nodes(start: GrammarState, text: Sequence[int], tree: TokenTree) -> set[tuple[int, ...]]:
    """The paths all of whose nodes are allowed by their parents' masks."""
    found = set[tuple[int, ...]]()
    for node in range(1, len(tree)):
        path, state = tree.path_tokens(node), fresh(start, text)
        if all(state is not None and bool(state.allowed()[token]) and state.accept(token) for token in path):
            found.add(tuple(path))
    return found


def check_pruning(start: GrammarState, prune: Any) -> None:
    rng = random.Random(1)
    for _ in range(10):
        text = walk(start.fork(), rng, rng.randrange(12))
        tree = random_tree(start, text, rng)
        cut = prune(tree, RowGrammar(start.fork(), len(PROMPT)), [*PROMPT, *text], drops_drawn=True)
        left = {tuple(cut.path_tokens(node)) for node in range(1, len(cut))}
        assert left == allowed_nodes(start, text, tree)


@each_grammar
def test_a_child_is_kept_if_the_mask_of_its_parent_allows_it(name: str) -> None:
    check_pruning(compiler().start(GRAMMARS[name]), pruned)


def test_that_finds_children_that_are_tested_with_their_own_mask() -> None:
    wrong = mutated(trees_module, "above = grammar.at(tokens, tree.path_tokens(tree.parents[node]))",
                    "above = grammar.find(tokens, tree.path_tokens(node)) or grammar.at(tokens)")  # fmt: skip
    with pytest.raises(AssertionError):
        check_pruning(compiler().start(GRAMMARS["person"]), wrong.pruned)


def check_ends(start: GrammarState) -> None:
    """Ends stand behind complete texts only, nothing else follows them, and no other special token stands anywhere."""
    rng = random.Random(2)
    for _ in range(12):
        state, text = start.fork(), list[int]()
        for token in walk(start.fork(), rng, 40):
            mask = state.allowed()
            assert bool(mask[END]) == state.is_complete
            assert not mask[END + 1 :].any(), "special tokens, and columns without a token"
            assert state.accept(END) == state.is_complete
            if state.is_complete:
                assert state.allowed().nonzero().flatten().tolist() == [END]
                assert not state.accept(65)
                assert state.forced(4) == []
                state.rollback(1)
            assert torch.equal(state.allowed(), mask)
            assert bool(mask[token])
            assert state.accept(token)
            text.append(token)


@each_grammar
def test_a_text_ends_where_it_is_complete_and_special_tokens_are_no_text(name: str) -> None:
    check_ends(compiler().start(GRAMMARS[name]))


@dataclass
class Wrong:
    """A state with one thing wrong."""

    state: Any
    extra: int | None = None  # a token that is always allowed
    is_blind: bool = False  # goes on behind the end

    @property
    def is_complete(self) -> bool:
        return bool(self.state.is_complete)

    def allowed(self) -> Tensor:
        ended, self.state._num_ended = self.state._num_ended, 0 if self.is_blind else self.state._num_ended
        mask: Tensor = self.state.allowed()
        self.state._num_ended = ended
        if self.extra is not None:
            mask[self.extra] = True
        return mask

    def accept(self, token: int) -> bool:
        return bool(self.state.accept(token))

    def rollback(self, num_tokens: int) -> None:
        self.state.rollback(num_tokens)

    def fork(self) -> Wrong:
        return Wrong(self.state.fork(), self.extra, self.is_blind)

    def forced(self, limit: int) -> list[int]:
        return list(self.state.forced(limit))

    def options(self, most: int) -> list[int]:
        return list(self.state.options(most))


@pytest.mark.parametrize(
    ("grammar", "wrong"),
    [("person", {"extra": END}), ("person", {"extra": END + 1}), ("lark", {"is_blind": True})],
    ids=["end allowed early", "special tokens inside strings", "mask asked after the end"],
)
def test_that_finds_wrong_ends(grammar: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_ends(Wrong(compiler().start(GRAMMARS[grammar]), **wrong))


@each_grammar
def test_what_is_forced_is_the_only_text_there_is(name: str) -> None:
    """With one token for each byte a forced token must be the only one that the mask allows."""
    start, rng = compiler().start(GRAMMARS[name]), random.Random(3)
    state = start.fork()
    for token in walk(start.fork(), rng, 40):
        forced = state.forced(5)
        for each in forced:
            assert state.allowed().nonzero().flatten().tolist() == [each]
            assert state.accept(each)
        if len(forced) < 5:
            assert int(state.allowed().sum()) > 1 or END in forced
        state.rollback(len(forced))
        assert state.accept(token)


def test_forced_tokens_are_grown_behind_every_node_within_the_limit() -> None:
    start = compiler().start(GRAMMARS["person"])
    grammar, tokens = RowGrammar(start.fork(), len(PROMPT)), list(PROMPT)
    tree = grown(TokenTree.root(PROMPT[-1]), grammar, tokens, Limit(30, 30))
    forced = start.fork().forced(30)
    assert list(tree.tokens[1:]) == forced == compiler().tokenizer.encode('{"name": "')
    assert grown(TokenTree.root(PROMPT[-1]), grammar, tokens, Limit(4, 30)).tokens[1:] == tuple(forced[:4])
    assert len(grown(TokenTree.root(PROMPT[-1]), grammar, tokens, Limit(30, 4))) == 5
    tokens += forced
    quote = compiler().tokenizer.encode('"')[0]
    other = compiler().tokenizer.encode("z")[0]
    guess = TokenTree((tokens[-1], other, quote), (-1, 0, 0), estimates=(1.0, 0.3, 0.5))
    tree = grown(guess, grammar, tokens, Limit(30, 30))
    behind = [tree.path_tokens(node) for node in range(len(tree))]
    assert compiler().tokenizer.encode('", "age": ') in behind
    assert all(tree.estimates[node] <= tree.estimates[tree.parents[node]] for node in range(1, len(tree)))
    chain = grown(guess, grammar, tokens, Limit(30, 30, chain_only=True))
    assert all(chain.parents.count(node) <= 1 for node in range(1, len(chain)))


def test_where_little_is_left_to_choose_every_choice_is_grown() -> None:
    """A boolean costs no pass of its own."""
    schema = {"type": "object", "properties": {"is_ok": {"type": "boolean"}, "n": {"type": "null"}}}
    start = compiler().start(Grammar.json_schema({**schema, "required": ["is_ok", "n"], "additionalProperties": False}))
    tree = grown(TokenTree.root(PROMPT[-1]), RowGrammar(start.fork(), len(PROMPT)), PROMPT, Limit(60, 60))
    texts = {compiler().tokenizer.decode(tree.path_tokens(node)) for node in range(1, len(tree))}
    for answer in ("true", "false"):
        assert f'{{"is_ok": {answer}, "n": null}}<eos>' in texts
    assert all(tree.estimates[node] <= tree.estimates[tree.parents[node]] for node in range(1, len(tree)))
    small = grown(TokenTree.root(PROMPT[-1]), RowGrammar(start.fork(), len(PROMPT)), PROMPT, Limit(60, 12))
    assert len(small) == 13


def test_options_are_the_longest_tokens() -> None:
    """A boolean has two, whatever tokens its first letters are."""
    texts = [b"t", b"true", b"tr", b"f", b"false", b"x"]
    mask = torch.tensor([True] * 5 + [False])
    assert longest(mask, 4, lambda token: texts[token]) == [1, 4]
    assert longest(mask, 1, lambda token: texts[token]) == []
    assert longest(torch.ones(100, dtype=torch.bool), 4, lambda token: texts[token]) == []


def test_a_forked_state_goes_its_own_way() -> None:
    state = compiler().start(GRAMMARS["choices"])
    before, other = facts(state), state.fork()
    assert other.accept(other.allowed().nonzero()[0, 0].item())
    assert facts(state) == before != facts(other)


def test_a_text_that_left_its_grammar_is_an_error() -> None:
    grammar = RowGrammar(compiler().start(Grammar.choices(["yes"])), 0)
    with pytest.raises(GrammarError, match="leaves its grammar at token 0"):
        grammar.at([3])
    assert grammar.find([3]) is None
