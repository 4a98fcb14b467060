"""From what a request says to token ids: the model's chat template and its tokenizer.

The ids depend on the request alone. A conversation that goes on begins with the ids it had before, so the engine finds
its prefix; an answer is read back from its text, and shares as far as its tokens are those the tokenizer would choose.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from specdec.serve.bodies import ChatBody, Message, TextBody
from specdec.serve.errors import bad

T = TypeVar("T")


class Prompts:
    """Tokenizes, one request after another in a thread of its own: a tokenizer's settings are not safe for several."""

    def __init__(self, tokenizer: Any | None, vocab_size: int, max_tokens: int) -> None:
        self._tokenizer, self._vocab_size, self._max_tokens = tokenizer, vocab_size, max_tokens
        self._thread = ThreadPoolExecutor(1, "specdec-tokenizer")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def chat(self, body: ChatBody) -> list[int]:
        """The ids of a conversation.

        Raises:
            ApiError: no chat template, one that refuses these messages, or a prompt that is empty or too long.
        """
        return self._checked("messages", await self._run(partial(self._render, body)))

    async def text(self, body: TextBody) -> list[list[int]]:
        """The ids of each prompt.

        Raises:
            ApiError: a prompt that is empty, too long, or holds ids outside the vocabulary.
        """
        if not body.prompts:
            raise bad("prompt", "prompt is empty; write some text")
        encoded = [await self._run(partial(self._encode, each)) for each in body.prompts]
        return [self._checked("prompt", ids) for ids in encoded]

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise bad("prompt", "this model has no tokenizer: send token ids")
        _check_characters("prompt", prompt)
        return list(self._tokenizer(prompt)["input_ids"])

    def _render(self, body: ChatBody) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise bad("messages", "this model has no chat template: use /v1/completions", code="no_chat_template")
        for i, message in enumerate(body.messages):
            _check_characters(f"messages[{i}].content", message.text)
        options = body.chat_template_kwargs or {}
        taken = set(inspect.signature(tokenizer.apply_chat_template).parameters) & options.keys()
        if taken:
            raise bad("chat_template_kwargs", f"chat_template_kwargs may not hold {', '.join(sorted(taken))}")
        is_continued = bool(body.continue_final_message)
        is_asking = not is_continued if body.add_generation_prompt is None else body.add_generation_prompt
        try:
            ids = tokenizer.apply_chat_template(
                [_as_dict(message) for message in body.messages],
                add_generation_prompt=is_asking,
                continue_final_message=is_continued,
                tokenize=True,
                return_dict=False,
                **options,
            )
        except Exception as error:  # a template is a program of the model's, and may raise anything
            raise bad("messages", f"the model's chat template refuses these messages: {error}") from None
        return list(ids)

    def _checked(self, field: str, ids: list[int]) -> list[int]:
        if not ids:
            raise bad(field, f"{field} is empty: it has no tokens; write some text")
        if len(ids) > self._max_tokens:
            raise bad(
                field,
                f"{field} has {len(ids)} tokens, and this server takes at most {self._max_tokens}; shorten it",
                code="context_length_exceeded",
            )
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise bad(field, f"{field} holds token ids outside [0, {self._vocab_size})")
        return ids


def _as_dict(message: Message) -> dict[str, str]:
    """As a template expects it: models know no developers, who are OpenAI's newer word for the system."""
    role = "system" if message.role == "developer" else message.role
    name = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.text, **name}


def _check_characters(field: str, text: str) -> None:
    """JSON can spell half of a character; no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad(field, f"{field} holds half of a character (a lone surrogate) at {error.start}") from None
