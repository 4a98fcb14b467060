"""Prompts to decode: the built-in suite, or the user's JSONL file; and their token ids for a given tokenizer.

It does not know models, methods or how the answers are made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
_BUILTIN_FILE = Path(__file__).parent.with_name("data") / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question: what the user says in each turn, the model answering in between."""

    question_id: str
    category: str
    turns: tuple[str, ...]
    is_raw: bool  # the line gave a bare "prompt", not "turns"


def load_prompts(source: str | Path, *, limit: int | None = None) -> list[Prompt]:
    """Read prompts from ``"builtin"`` or from a JSONL file; with ``limit``, only the first so many of them.

    A line is ``{"question_id": ..., "category": ..., "turns": [...]}`` (the form of Spec-Bench) or
    ``{"prompt": ...}``. Without a ``question_id`` the line number stands in, without a ``category`` the word
    "prompt"; other keys are ignored, empty lines skipped. The whole file is checked whatever the limit.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to take every prompt")
    if source == BUILTIN:
        name, data = "the built-in prompts", _BUILTIN_FILE.read_bytes()
    else:
        name, data = str(source), _read(Path(source).expanduser())
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, line in _lines(name, data):
        try:
            prompt = _parse(line, number)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        first = line_of.setdefault(prompt.question_id, number)
        if first != number:
            raise ValueError(
                f"{name}, line {number}: question_id {prompt.question_id!r} is already used on line {first}; "
                "give each line its own"
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f'{name} holds no prompts; write one JSON object a line, such as {{"prompt": "Hello"}}')
    return prompts[:limit]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read the prompts file {path} ({error.strerror}); name a JSONL file, or {BUILTIN!r} for the "
            "built-in prompts"
        ) from None


def _lines(name: str, data: bytes) -> list[tuple[int, str]]:
    """The numbered lines that are not blank. Not splitlines(): JSON strings may hold U+2028 and its like."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _parse(line: str, number: int) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); each line must be one whole JSON object") from None
    if not isinstance(entry, dict):
        raise ValueError(f'a line must be a JSON object such as {{"prompt": "Hello"}}, got {_kind(entry)}')
    if "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f'"turns" must be a list of at least one string, got {_kind(turns)}')
        texts = tuple(_text(turn, f'"turns" item {index}') for index, turn in enumerate(turns, start=1))
    elif "prompt" in entry:
        texts = (_text(entry["prompt"], '"prompt"'),)
    else:
        raise ValueError('the object has neither "turns" (a list of strings) nor "prompt" (a string)')
    question_id = entry.get("question_id", number)
    if isinstance(question_id, bool) or not isinstance(question_id, int | str) or question_id == "":
        raise ValueError(f'"question_id" must be a whole number or a string, got {_kind(question_id)}')
    category = _text(entry.get("category", "prompt"), '"category"')
    return Prompt(str(question_id), category, texts, is_raw="turns" not in entry)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{what} is blank; write some text or drop the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair at character {error.start}, which is no text") from None
    return value


def _kind(value: Any) -> str:
    if value is None or value in ([], "", {}):
        return json.dumps(value)
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def render_turns(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answers: Sequence[str]) -> list[int]:
    """The token ids of the conversation up to the next answer: all of ``answers`` given, turn ``len(answers)`` asked.

    With a chat template each turn is a user message; without one, turns and answers are joined by newlines.
    """
    if len(answers) >= len(prompt.turns):
        raise ValueError(
            f"question {prompt.question_id} has {len(prompt.turns)} turns, so at most {len(prompt.turns) - 1} answers "
            f"can come before the next one, got {len(answers)}"
        )
    asked = prompt.turns[: len(answers) + 1]
    messages = [{"role": "user", "content": asked[0]}]
    for answer, turn in zip(answers, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    if not len(ids):
        raise ValueError(f"question {prompt.question_id} has no tokens under this tokenizer; give it another prompt")
    return [int(token) for token in ids]
