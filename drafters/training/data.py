"""Training text: conversations that the target itself answers, and for which it can also write the questions.

A data folder holds one JSON line for each conversation, appended as it ends, so an interrupted run goes on where it
stopped. What a conversation holds depends on the folder's seed and its number alone, never on the batch.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from specdec.decode import Decoder
from specdec.distributions import WarperTransform
from specdec.drafters.heads.checkpoint_io import read_json
from specdec.drafters.none import NoDrafter
from specdec.interfaces import Row, Scores, Target, TargetDistributions, Verifier
from specdec.records.files import write_json, write_text
from specdec.rng import PhiloxRng
from specdec.sampling import GREEDY, SamplingParams
from specdec.tree import TokenTree

_LINES = "conversations.jsonl"
_FACTS = "data.json"
_MARK = "\ue000"  # stands for the user's text in the chat template; no tokenizer merges it with its neighbours
OPENERS = Path(__file__).with_name("openers.jsonl")


@dataclass(frozen=True, slots=True)
class DataSettings:
    """What decides the content of a data folder.

    ``answer_temperatures`` are taken in turn; 0 is greedy. Questions are sampled at temperature 1 from the 64 best
    tokens: training needs many different ones more than good ones.
    """

    target: str
    count: int  # conversations
    source: str = "self"  # or the sha256 of a file of questions
    seed: int = 0
    max_question_tokens: int = 128
    max_answer_tokens: int = 256
    answer_temperatures: tuple[float, ...] = (0.0, 0.7)

    def __post_init__(self) -> None:
        for name in ("count", "max_question_tokens", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.answer_temperatures or min(self.answer_temperatures) < 0:
            raise ValueError(f"answer_temperatures needs numbers that are not negative, got {self.answer_temperatures}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question with the target's answer, as token ids of the whole chat."""

    index: int
    tokens: tuple[int, ...]
    num_prompt: int  # tokens before the answer

    @property
    def num_answer(self) -> int:
        return len(self.tokens) - self.num_prompt


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
        before, found, behind = text.partition(_MARK)
        if not found or not behind:
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
class DataFolder:
    """A folder of conversations on disk."""

    path: Path
    settings: DataSettings

    def open(self) -> None:
        """Make the folder, or check that what lies there was made by the same settings (``count`` may grow).

        Raises:
            ValueError: it holds data of other settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        facts = json.loads(json.dumps(asdict(self.settings)))
        file = self.path / _FACTS
        if file.exists():
            known = read_json(file)
            wrong = [
                f"{key} {known.get(key)!r}, not {facts[key]!r}"
                for key in facts
                if key != "count" and known.get(key) != facts[key]
            ]
            if wrong:
                raise ValueError(
                    f"{self.path} holds data made with other settings ({'; '.join(wrong)}); "
                    "name another folder, or delete this one"
                )
        write_json(file, facts)

    def read(self) -> list[Conversation]:
        """All that is there so far, in the order in which it ended; a last line that was cut short is left out.

        More may be there than ``count``. What was read once stays the beginning of what is read later.
        """
        file = self.path / _LINES
        found = {}
        for number, line in enumerate(_whole_lines(file).splitlines() if file.exists() else (), start=1):
            try:
                item = json.loads(line)
                index, tokens = int(item["index"]), tuple(map(int, item["tokens"]))
                found[index] = Conversation(index, tokens, int(item["num_prompt"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is not a conversation ({error}); delete the line") from None
        return list(found.values())

    def missing(self) -> list[int]:
        """Numbers below ``count`` of the conversations that are still to be made."""
        done = {conversation.index for conversation in self.read()}
        return [index for index in range(self.settings.count) if index not in done]

    def append(self) -> IO[str]:
        """The file of conversations, open for more behind its last whole line. One process may do so at a time."""
        file = self.path / _LINES
        if file.exists() and len(whole := _whole_lines(file)) < file.stat().st_size:
            write_text(file, whole.decode("utf-8"))
        return file.open("a", encoding="utf-8")


def _whole_lines(file: Path) -> bytes:
    data = file.read_bytes()
    return data[: data.rfind(b"\n") + 1]


@dataclass(slots=True)
class _RowPolicy:
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
        target: the engine, such as ``CausalLM``.
        verifier: how tokens are picked (``match`` for plain sampling).
        ends: ids that end a text.
        chat: the template's ids.
        openers: first words of questions; without any, the target chooses the topic alone.
        questions: ids of given questions; the target then writes none itself.
    """

    target: Target
    verifier: Verifier
    ends: frozenset[int]
    chat: Chat
    settings: DataSettings
    openers: Sequence[str] = ()
    questions: Sequence[Sequence[int]] | None = None
    batch_size: int = 32
    _policy: _RowPolicy = field(default_factory=_RowPolicy, init=False)

    def run(self, folder: DataFolder) -> Iterator[Conversation]:
        """Make what is missing in ``folder``, and yield each conversation once it is on disk."""
        queue = _Queue(map(self._start, folder.missing()))
        decoder = Decoder(
            self.target, NoDrafter(), self.verifier, self._policy, PhiloxRng(self.settings.seed), self._stops
        )
        with folder.append() as file:
            for emission in decoder.run(queue, self.batch_size):
                if not emission.step.finished:
                    continue
                row = emission.row
                del self._policy.by_key[row.key]
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
        self._policy.by_key[2 * index] = SamplingParams(temperature=1.0, top_k=64)
        return Row(2 * index, tokens, len(tokens) + self.settings.max_question_tokens)

    def _answer(self, index: int, question: Sequence[int]) -> Row:
        temperatures = self.settings.answer_temperatures
        temperature = temperatures[index // max(len(self.openers), 1) % len(temperatures)]
        self._policy.by_key[2 * index + 1] = SamplingParams(temperature, 64 if temperature else 0)
        tokens = self.chat.prompt(question)
        return Row(2 * index + 1, tokens, len(tokens) + self.settings.max_answer_tokens)
