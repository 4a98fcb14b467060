"""Training text on disk: one JSON line for each conversation, appended as it ends, so a run resumes where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from specdec.drafters.heads.checkpoint_io import read_json
from specdec.records.files import write_json, write_text

_LINES = "conversations.jsonl"
_FACTS = "data.json"


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
            on_disk = read_json(file)
            wrong = [
                f"{key} {on_disk.get(key)!r}, not {facts[key]!r}"
                for key in facts
                if key != "count" and on_disk.get(key) != facts[key]
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
        conversations = {}
        for number, line in enumerate(_whole_lines(file).splitlines() if file.exists() else (), start=1):
            try:
                item = json.loads(line)
                index, tokens = int(item["index"]), tuple(map(int, item["tokens"]))
                conversations[index] = Conversation(index, tokens, int(item["num_prompt"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is not a conversation ({error}); delete the line") from None
        return list(conversations.values())

    def missing(self) -> list[int]:
        """Numbers below ``count`` of the conversations that are still to be made."""
        there = {conversation.index for conversation in self.read()}
        return [index for index in range(self.settings.count) if index not in there]

    def append(self) -> IO[str]:
        """The file of conversations, open for more behind its last whole line. One process may do so at a time."""
        file = self.path / _LINES
        if file.exists() and len(whole := _whole_lines(file)) < file.stat().st_size:
            write_text(file, whole.decode("utf-8"))
        return file.open("a", encoding="utf-8")


def _whole_lines(file: Path) -> bytes:
    data = file.read_bytes()
    return data[: data.rfind(b"\n") + 1]
