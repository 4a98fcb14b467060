"""Grammars over an alphabet of two letters, for proofs: tokens a, b, ab and the end of a text; and a toy backend.

The toy backend is a list of words and nothing else, so it is right by inspection. llguidance runs on the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from enumeration import Law, Loop
from exact_cases import Case
from llguidance import LLTokenizer, TokenizerWrapper
from torch import Tensor
from toy import CERTAIN, PROMPT, Tokens, ToyDrafter, ToyTarget, table

from specdec.constraints import GrammarState
from specdec.distributions import LogitsTransform
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import GrammarTransform
from specdec.grammar.row import RowGrammar
from specdec.grammar.with_llguidance import LlguidanceBackend
from specdec.interfaces import Drafter, Row, Verifier
from specdec.sampling import SamplingParams

TEXTS = ("a", "b", "ab", "")
END = 3
VOCAB = 4

REGEXES = ("(a|ba)b?(ab)*", "ab(a|b)?", "(ab){1,2}", "[ab]{2}b*", "a*")


class LettersTokenizer:
    """What llguidance asks of a tokenizer."""

    eos_token_id = END
    bos_token_id = None
    tokens = (b"a", b"b", b"ab", b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        letters = text.decode() if isinstance(text, bytes) else text
        return [TEXTS.index(part) for part in re.findall("ab|a|b", letters)]


def llguidance_backend() -> LlguidanceBackend:
    return LlguidanceBackend(LLTokenizer(TokenizerWrapper(LettersTokenizer())), (END,))


@dataclass(frozen=True, slots=True)
class Words:
    """A finite language, and what its words begin with."""

    words: frozenset[str]
    beginnings: frozenset[str]

    @classmethod
    def of(cls, pattern: str, longest: int = 8) -> Words:
        """The words that ``pattern`` matches, up to a length that no test reaches."""
        every = ("".join(letters) for length in range(longest + 1) for letters in product("ab", repeat=length))
        words = frozenset(word for word in every if re.fullmatch(pattern, word))
        return cls(words, frozenset(word[:length] for word in words for length in range(len(word) + 1)))


@dataclass(slots=True)
class WordsState:
    """The toy backend: a text may become a word of ``language``, letter by letter, whatever its tokens."""

    language: Words
    history: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: [""])  # behind each token

    @property
    def is_complete(self) -> bool:
        return self.texts[-1] in self.language.words

    def allowed(self) -> Tensor:
        return torch.tensor([self._can_follow(token) for token in range(VOCAB)])

    def _can_follow(self, token: int) -> bool:
        if token == END or END in self.history[-1:]:
            return token == END and self.is_complete
        return self.texts[-1] + TEXTS[token] in self.language.beginnings

    def accept(self, token: int) -> bool:
        if not self._can_follow(token):
            return False
        self.history.append(token)
        self.texts.append(self.texts[-1] + TEXTS[token])
        return True

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.history)
        del self.history[len(self.history) - num_tokens :]
        del self.texts[len(self.texts) - num_tokens :]

    def fork(self) -> WordsState:
        return WordsState(self.language, list(self.history), list(self.texts))

    def forced(self, limit: int) -> list[int]:
        found: list[int] = []
        while END not in self.history and len(found) < limit:
            only = [token for token in range(VOCAB) if self._can_follow(token)]
            if len(only) != 1 or not self.accept(only[0]):
                break
            found += only
        self.rollback(len(found))
        return found

    def options(self, most: int) -> list[int]:
        tokens = self.allowed().nonzero().flatten().tolist()
        return tokens if len(tokens) <= most and END not in self.history else []


def start(pattern: str, backend: str = "words") -> GrammarState:
    if backend == "words":
        return WordsState(Words.of(pattern))
    return llguidance_backend().compile(Grammar.regex(pattern))


class GrammarTarget(ToyTarget):
    """A toy target all of whose rows get a grammar when they join. No token is impossible to it."""

    def __init__(self, begin: Callable[[], GrammarState], seed: int = 1, row_grammar: type[RowGrammar] = RowGrammar):
        super().__init__(seed, VOCAB)
        self.logits = table(seed, VOCAB, spread=1.5, holes=0)
        self.begin, self.row_grammar = begin, row_grammar

    def open(self, rows: Sequence[Row]) -> None:
        super().open(rows)
        for row in rows:
            row.grammar = self.row_grammar(self.begin(), row.num_prompt)


class PartDrafter(ToyDrafter):
    """A toy drafter that others can be built on."""

    drafts_by_level = False

    @property
    def is_drawing(self) -> bool:
        return self.kind is not CERTAIN


def toy_drafter(case: Case) -> PartDrafter:
    return PartDrafter(case.kind, case.shape, VOCAB, case.min_prob)


def loop(
    drafter: Drafter, verifier: Verifier, begin: Callable[[], GrammarState], *,
    transform: LogitsTransform | None = None, row_grammar: type[RowGrammar] = RowGrammar,
) -> Loop:  # fmt: skip
    target = GrammarTarget(begin, row_grammar=row_grammar)
    return Loop(drafter, verifier, target, transform or GrammarTransform(SamplingParams()), stop_token=END)


def masked_law(begin: Callable[[], GrammarState], then: Law, prompt: Tokens = PROMPT) -> Law:
    """Plain constrained decoding: a fresh state at every token, its mask on the logits, then ``then``."""

    def law(logits: Tensor, history: Sequence[int]) -> Tensor:
        state = begin()
        assert all(state.accept(token) for token in history[len(prompt) :])
        return then(logits.masked_fill(~state.allowed(), -torch.inf), history)

    return law
