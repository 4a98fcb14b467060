"""Workloads: many requests with their arrival times, from the built-in prompts or a JSONL file.

It does not know engines or models; a tokenizer renders the prompts. The same spec gives the same requests everywhere.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.records.prompts import BUILTIN, load_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = "ragged|prefix|chat|samples[:n=N,...]|poisson:RATE[,n=N,...]|FILE"
_DEFAULT_N = {"ragged": 32, "prefix": 32, "chat": 8, "samples": 8, "poisson": 32}
_SAMPLES_TEMPERATURE = 0.8  # greedy samples would all be one text
_NUM_DOCUMENTS = (0, 0, 0, 0, 1, 1, 2, 6)  # behind a ragged question: half have none, one in eight is very long
_FOLLOW_UPS = (
    "Say the most important part of that again in one short sentence.",
    "What would be a good counter-argument?",
    "Now explain it to a ten-year-old.",
    "Give one concrete example of what you mean.",
)
_FILE_KEYS = {"prompt", "messages", "max_new_tokens", "temperature", "seed", "arrival_s", "request_id"}

Message = Mapping[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload."""

    request_id: str
    messages: tuple[Message, ...]  # behind those of ``follows`` and its answer
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    arrival_s: float = 0.0  # from the beginning; of one that follows another: from that one's end
    follows: str | None = None  # the request_id whose conversation goes on here


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where the workload does not say."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Spec:
    """A workload by name."""

    name: str  # of ``_DEFAULT_N``, or the path of a file
    n: int
    seed: int
    rate: float | None  # arrivals a second; None: all at once
    tokens: int  # of the shared prefix

    @property
    def is_file(self) -> bool:
        return self.name not in _DEFAULT_N


def parse_workload(text: str) -> Spec:
    """The workload that ``text`` names, in the form of ``FORM``.

    Raises:
        ValueError: an unknown option, or a number outside its range.
    """
    name, _, rest = text.partition(":")
    if name not in _DEFAULT_N:
        return Spec(text, 0, 0, None, 0)
    parts = [part for part in rest.split(",") if part]
    if name == "poisson" and parts and "=" not in parts[0]:
        parts[0] = f"rate={parts[0]}"
    given = dict(part.partition("=")[::2] for part in parts)
    if unknown := given.keys() - {"n", "seed", "rate", "tokens"}:
        raise ValueError(f"a workload is written {FORM}; {name} has no option {min(unknown)!r} in {text!r}")
    try:
        n, seed, tokens = (
            int(given.get(key, default)) for key, default in (("n", _DEFAULT_N[name]), ("seed", 0), ("tokens", 1000))
        )
        rate = float(given["rate"]) if "rate" in given else None
    except ValueError:
        raise ValueError(f"the options of a workload are numbers, got {text!r}") from None
    if name == "poisson" and rate is None:
        raise ValueError(f"poisson needs a rate in requests a second, such as poisson:2, got {text!r}")
    if n < 1 or tokens < 1 or not (rate is None or 0 < rate < math.inf):
        raise ValueError(f"n and tokens must be 1 or more and the rate a positive number, got {text!r}")
    return Spec(name, n, seed, rate, tokens)


def build_workload(spec: Spec, defaults: Defaults, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """The requests of ``spec``, those that arrive first in front; one that follows another stands behind it.

    Raises:
        ValueError: a file that cannot be read or is no workload; the message names the line.
    """
    if spec.is_file:
        return _from_file(Path(spec.name).expanduser(), defaults)
    made = {"prefix": _prefix, "chat": _chat, "samples": _samples}.get(spec.name, _ragged)(spec, defaults, tokenizer)
    if spec.rate is None:
        return made
    clock, rng, timed = 0.0, random.Random(spec.seed), []
    for request in made:
        if request.follows is None:
            clock += rng.expovariate(spec.rate)
            request = replace(request, arrival_s=clock)
        timed.append(request)
    return timed


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids (p,) up to the answer, with the chat template if there is one, else the contents line by line."""
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    return [int(token) for token in ids]


def conversation(request: Request, requests: Mapping[str, Request], answers: Mapping[str, str]) -> list[Message]:
    """All messages up to the answer of ``request``; ``answers`` are those of the requests before it."""
    if request.follows is None:
        return list(request.messages)
    before = conversation(requests[request.follows], requests, answers)
    return [*before, {"role": "assistant", "content": answers[request.follows]}, *request.messages]


def waves(requests: Sequence[Request]) -> list[list[Request]]:
    """The requests by how many answers come before theirs."""
    depth: dict[str, int] = {}
    for request in requests:
        depth[request.request_id] = 0 if request.follows is None else depth[request.follows] + 1
    return [[r for r in requests if depth[r.request_id] == level] for level in range(max(depth.values()) + 1)]


def _ask(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _ragged(spec: Spec, defaults: Defaults, _: Any) -> list[Request]:
    """Prompts from a line to several pages, answers from a quarter of ``max_new_tokens`` to all of it."""
    rng, questions = random.Random(spec.seed), load_prompts(BUILTIN)
    documents = [prompt.turns[0] for prompt in questions if prompt.category in ("summarisation", "retrieval")]
    rng.shuffle(questions)
    requests, known = list[Request](), set[str]()
    for i in range(spec.n):
        parts = [questions[i % len(questions)].turns[0], *rng.sample(documents, rng.choice(_NUM_DOCUMENTS))]
        while (text := "\n\n".join(parts)) in known:  # a prompt asked twice would be known to a cache of prefixes
            parts.append(rng.choice(documents))
        known.add(text)
        length = rng.randint(max(defaults.max_new_tokens // 4, 1), defaults.max_new_tokens)
        requests.append(Request(f"ragged-{i}", _ask(text), length, defaults.temperature, defaults.seed + i))
    return requests


def _prefix(spec: Spec, defaults: Defaults, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """One text of about ``tokens`` tokens, and another question about it each time."""
    prompts = load_prompts(BUILTIN)
    words = " ".join(prompt.turns[0] for prompt in prompts if prompt.category == "summarisation").split(" ")
    words *= 1 + spec.tokens // len(words)  # at most one word a token, nearly always
    low, high = 0, len(words)
    while low < high:  # the most words whose tokens are not too many
        middle = (low + high + 1) // 2
        fits = len(tokenizer(" ".join(words[:middle]))["input_ids"]) <= spec.tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    shared = " ".join(words[:low])
    asked = [prompt.turns[0] for prompt in prompts if prompt.category in ("qa", "chat", "maths", "code")]
    return [
        Request(
            f"prefix-{i}",
            _ask(f"{shared}\n\n{i + 1}. {asked[i % len(asked)]}"),
            defaults.max_new_tokens, defaults.temperature, defaults.seed + i,
        )
        for i in range(spec.n)
    ]  # fmt: skip


def _chat(spec: Spec, defaults: Defaults, _: Any) -> list[Request]:
    """Conversations of two turns; the second contains the first answer."""
    rng, prompts = random.Random(spec.seed), load_prompts(BUILTIN)
    rng.shuffle(prompts)
    how = defaults.max_new_tokens, defaults.temperature
    first = [
        Request(f"chat-{i}.1", _ask(prompts[i % len(prompts)].turns[0]), *how, defaults.seed + 2 * i)
        for i in range(spec.n)
    ]
    second = [
        Request(
            f"chat-{i}.2", _ask(rng.choice(_FOLLOW_UPS)), *how, defaults.seed + 2 * i + 1, follows=first[i].request_id
        )
        for i in range(spec.n)
    ]
    return first + second


def _samples(spec: Spec, defaults: Defaults, _: Any) -> list[Request]:
    """``n`` samples of one prompt, each with a seed of its own."""
    prompts = load_prompts(BUILTIN)
    asked = _ask(prompts[spec.seed % len(prompts)].turns[0])
    temperature = defaults.temperature or _SAMPLES_TEMPERATURE
    return [
        Request(f"sample-{i}", asked, defaults.max_new_tokens, temperature, defaults.seed + i) for i in range(spec.n)
    ]


def _from_file(path: Path, defaults: Defaults) -> list[Request]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the workload {path} ({error}); a workload is {FORM}") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                requests.append(_parse(json.loads(line), number, defaults))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise ValueError(f'{path} holds no requests; write one JSON object a line, such as {{"prompt": "Hello"}}')
    if len({request.request_id for request in requests}) < len(requests):
        raise ValueError(f"{path}: two requests have the same request_id; give each its own")
    return sorted(requests, key=lambda request: request.arrival_s)


def _parse(entry: Any, number: int, defaults: Defaults) -> Request:
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ValueError('a line must be a JSON object with either "prompt" (text) or "messages"')
    if unknown := entry.keys() - _FILE_KEYS:
        raise ValueError(f"unknown key {min(unknown)!r}; a request has {', '.join(sorted(_FILE_KEYS))}")
    messages = _ask(entry["prompt"]) if "prompt" in entry else tuple(entry["messages"])
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'a prompt is text, and a message has "role" and "content", both text; got {message!r}')
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("the prompt is blank; write some text or drop the line")
    length, seed = (entry.get(key, default) for key, default in (
        ("max_new_tokens", defaults.max_new_tokens), ("seed", defaults.seed + number - 1),
    ))  # fmt: skip
    temperature, arrival_s = float(entry.get("temperature", defaults.temperature)), float(entry.get("arrival_s", 0))
    if not (isinstance(length, int) and length >= 1 and isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"max_new_tokens must be 1 or more and seed in [0, 2**64), got {length!r} and {seed!r}")
    if not (0 <= temperature < math.inf and 0 <= arrival_s < math.inf):
        raise ValueError(f"temperature and arrival_s must be 0 or more, got {temperature} and {arrival_s}")
    return Request(str(entry.get("request_id", f"line-{number}")), messages, length, temperature, seed, arrival_s)
