"""Training text from the target itself: it answers questions, and can also write them.

What a conversation holds depends on the decoder's seed and the conversation's number alone, never on the batch.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdec.decode import Decoder
from specdec.distributions import LogitsTransform, WarperTransform
from specdec.drafters.training.data import Conversation, DataFolder, DataSettings
from specdec.interfaces import Row, Scores, TargetDistributions
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree

_MARK = "\ue000"  # stands for the user's text in the chat template; no tokenizer merges it with its neighbours
OPENERS = Path(__file__).with_name("openers.jsonl")

MakeDecoder = Callable[[LogitsTransform, Callable[[Row], bool]], Decoder]


@dataclass(frozen=True, slots=True)
class Chat:
    """What is needed to let a chat model speak for the user: the ids around the user's text.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not show the user's text as it is.
    """

    opening: tuple[int, ...]  # before the user's text
    closing: tuple[int, ...]  # behind it, up to where the answer starts
    encode: Callable[[str], list[int]]

    @classmethod
    def of(cls, tokenizer: Any) -> Chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the target has no chat template, so it cannot write questions; give a file of prompts")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        before, mark, behind = text.partition(_MARK)
        if not mark or not behind:
            raise ValueError("the chat template does not show the user's text as it is; give a file of prompts")
        opening, closing = (tuple(_encoded(tokenizer, part)) for part in (before, behind))
        return cls(opening, closing, lambda text: _encoded(tokenizer, text))

    @classmethod
    def plain(cls, tokenizer: Any) -> Chat:
        """For given prompts that are continued as they stand: nothing around them but what begins every text."""
        return cls(tuple(tokenizer("")["input_ids"]), (), lambda text: _encoded(tokenizer, text))

    def prompt(self, question: Sequence[int]) -> list[int]:
        return [*self.opening, *question, *self.closing]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(slots=True)
class _RowSampling:
    """Sampling parameters of each row's own."""

    by_key: dict[int, SamplingParams] = field(default_factory=dict)
    params: SamplingParams = GREEDY  # what a drafter should imitate; there is none

    def target_probs(self, row: Row, tree: TokenTree, scores: Scores) -> TargetDistributions:
        return WarperTransform(self.by_key[row.key]).target_probs(row, tree, scores)


class _Queue(Iterator[Row]):
    """Rows that wait. Answers go first; empty for now is not the end, because a question's end adds its answer."""

    def __init__(self, starts: Iterator[Row]) -> None:
        self._starts = starts
        self.answers: deque[Row] = deque()

    def __next__(self) -> Row:
        return self.answers.popleft() if self.answers else next(self._starts)


@dataclass(slots=True)
class Generator:
    """Lets a target write and answer questions, many rows in each pass.

    Args:
        make_decoder: a decode loop without drafts for the way rows are sampled and for where they end.
        ends: ids that end a text.
        chat: the template's ids.
        openers: first words of questions; without any, the target chooses the topic alone.
        questions: ids of given questions; the target then writes none itself.
    """

    make_decoder: MakeDecoder
    ends: frozenset[int]
    chat: Chat
    settings: DataSettings
    openers: Sequence[str] = ()
    questions: Sequence[Sequence[int]] | None = None
    batch_size: int = 32
    _sampling: _RowSampling = field(default_factory=_RowSampling, init=False)

    def run(self, folder: DataFolder) -> Iterator[Conversation]:
        """Make what is missing in ``folder``, and yield each conversation once it is on disk."""
        queue = _Queue(map(self._start, folder.missing()))
        decoder = self.make_decoder(self._sampling, self._stops)
        with folder.append() as file:
            for emission in decoder.run(queue, self.batch_size):
                if not emission.step.finished:
                    continue
                row = emission.row
                del self._sampling.by_key[row.key]
                if self._is_question(row):
                    question = [t for t in row.tokens[len(self.chat.opening) :] if not self._closes(t)]
                    queue.answers.append(self._answer(row.key >> 1, question))
                    continue
                conversation = Conversation(row.key >> 1, tuple(row.tokens), row.num_prompt)
                file.write(json.dumps(asdict(conversation)) + "\n")
                file.flush()
                yield conversation

    # A row's key: twice the conversation's number for a question, one more for its answer.

    def _is_question(self, row: Row) -> bool:
        return row.key % 2 == 0

    def _closes(self, token: int) -> bool:
        return token in self.ends or token == self.chat.closing[0]

    def _stops(self, row: Row) -> bool:
        return self._closes(row.tokens[-1]) if self._is_question(row) else row.tokens[-1] in self.ends

    def _start(self, index: int) -> Row:
        if self.questions is not None:
            return self._answer(index, self.questions[index])
        opener = self.openers[index % len(self.openers)] if self.openers else ""
        tokens = [*self.chat.opening, *self.chat.encode(opener)]
        self._sampling.by_key[2 * index] = SamplingParams(temperature=1.0, top_k=64)
        return Row(2 * index, tokens, len(tokens) + self.settings.max_question_tokens)

    def _answer(self, index: int, question: Sequence[int]) -> Row:
        temperatures = self.settings.answer_temperatures
        temperature = temperatures[index // max(len(self.openers), 1) % len(temperatures)]
        self._sampling.by_key[2 * index + 1] = SamplingParams(temperature, 64 if temperature else 0)
        tokens = self.chat.prompt(question)
        return Row(2 * index + 1, tokens, len(tokens) + self.settings.max_answer_tokens)
