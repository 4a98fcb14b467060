"""Requests with grammars beside free ones: tokens are those of ``generate(grammar=...)``, whoever runs beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from json_grammars import END, GRAMMARS
from tinychat import make_model, make_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

import specdec
from specdec.constraints import GrammarState
from specdec.distributions import ProcessorTransform
from specdec.errors import GrammarError
from specdec.grammar.inputs import Grammar
from specdec.grammar.masks import RowMask
from specdec.sampling import SamplingParams
from specdec.serving import job as job_module
from specdec.serving.engine import Engine
from specdec.serving.job import Job
from specdec.serving.request import RequestSettings
from specdec.serving.scheduler import Scheduler

SHORT = {
    "type": "object",
    "properties": {"tone": {"enum": ["warm", "cold", "wärmer"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99},
                   "s": {"type": "string", "maxLength": 4}},
    "required": ["tone", "n", "s"], "additionalProperties": False,
}  # fmt: skip
COMMON = "They all begin alike, so that they share blocks: "
ASKED: list[tuple[str, Grammar | None]] = [
    ("abc def abc", Grammar.json_schema(SHORT)),
    ("hello", GRAMMARS["choices"]),
    ("free text, free text", None),
    (COMMON + "foo", GRAMMARS["regex"]),
    (COMMON + "bar", None),
    (COMMON + '{"n": 1} {"n": 2}', Grammar.json_schema(SHORT)),
    (COMMON + "and more", GRAMMARS["person"]),
]
NUM_NEW, SEED = 48, 7
TOKENIZER = make_tokenizer()
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, float32
pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def target() -> LlamaForCausalLM:
    return make_model(eos=END)


@cache
def settings(temperature: float, grammar: Grammar | None, num_new: int = NUM_NEW) -> RequestSettings:
    return RequestSettings(max_new_tokens=num_new, temperature=temperature, seed=SEED, grammar=grammar)


def generated(text: str, grammar: Grammar | None, temperature: float, **options: Any) -> tuple[list[int], str]:
    """What ``generate()`` makes of one prompt without drafts, and why it ends."""
    ids = torch.tensor([TOKENIZER.encode(text)])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": SEED}
    out = specdec.generate(
        target(), ids, attention_mask=torch.ones_like(ids), grammar=grammar, tokenizer=TOKENIZER, drafter="none",
        max_new_tokens=NUM_NEW, return_dict_in_generate=True, pad_token_id=END, **(sampling | options),
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), out.finish_reasons[0]


alone = cache(generated)


@contextmanager
def engine(drafter: str = "auto", num_blocks: int = 100, **options: Any) -> Iterator[Engine]:
    draft = make_model(seed=1, eos=END) if "model" in drafter else None
    memory = num_blocks * 16 * BYTES_PER_TOKEN * (1 if draft is None else 2)
    arguments = {"tokenizer": TOKENIZER, "max_rows": 5, "accelerate": False, "token_budget": 48, "max_nodes": 12}
    with Engine(target(), drafter=drafter, draft_model=draft, kv_memory=memory, **(arguments | options)) as made:
        yield made


def differing(made: Engine) -> list[Any]:
    """The requests whose answers, all asked for at once, are not what they are alone."""
    asked = [(text, grammar, temperature) for temperature in (0.0, 1.0) for text, grammar in ASKED]
    handles = [made.submit(text, settings(temperature, grammar)) for text, grammar, temperature in asked]
    answers = [handle.result(60) for handle in handles]
    return [
        each
        for answer, each in zip(answers, asked, strict=True)
        if (answer.tokens, str(answer.finish_reason)) != alone(*each)
    ]


@pytest.mark.parametrize(("num_blocks", "sharing"), [(12, True), (12, False), (100, True)])
@pytest.mark.parametrize("drafter", ["none", "auto", "model:shape=2x2", "grammar:base=ngram"])
def test_a_crowd_gets_what_each_gets_alone(drafter: str, sharing: bool, num_blocks: int) -> None:
    with engine(drafter, num_blocks, prefix_sharing=sharing, adaptive=False) as made:
        assert differing(made) == []
        metrics = made.metrics()
    assert metrics.preemptions > 0 or num_blocks == 100
    assert metrics.cached_tokens > 0 or not sharing
    assert metrics.accepted_tokens > 0 or drafter == "none"


def test_both_ends_are_among_them() -> None:
    """Or the test above would prove less than it says."""
    reasons = {alone(text, grammar, temperature)[1] for text, grammar in ASKED for temperature in (0.0, 1.0) if grammar}
    assert reasons == {"stop", "length"}


def _forgetting(plain: Callable[[Scheduler, Job], None]) -> Callable[[Scheduler, Job], None]:
    def preempt(scheduler: Scheduler, job: Job) -> None:
        plain(scheduler, job)
        job.row.grammar = None

    return preempt


def test_a_row_that_lost_its_grammar_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_preempt", _forgetting(Scheduler._preempt))
    with engine("none", 12, prefix_sharing=False) as made:
        assert differing(made) != []


class Repetition(RepetitionPenaltyLogitsProcessor):  # type: ignore[misc]
    """Of a caller's."""

    is_rowwise = True


def differing_processed(made: Engine) -> list[str]:
    """The same with a processor of the caller's and a filter."""
    processors = [Repetition(1.4)]
    own = [replace(settings(1.5, grammar), top_p=0.6, logits_processors=processors) for _, grammar in ASKED]
    answers = made.run([text for text, _ in ASKED], own)
    return [
        text
        for answer, (text, grammar) in zip(answers, ASKED, strict=True)
        if answer.tokens != generated(text, grammar, 1.5, top_p=0.6, logits_processor=processors)[0]
    ]


def _mask_last(params: SamplingParams, processors: Sequence[Any]) -> ProcessorTransform:
    return ProcessorTransform([*processors, TopPLogitsWarper(params.top_p), RowMask()], params)


def test_the_mask_stands_between_processors_and_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as made:
        assert differing_processed(made) == []
    monkeypatch.setattr(job_module, "transform_for", _mask_last)
    with engine() as made, pytest.raises(ValueError, match="every token is excluded"):
        differing_processed(made)


def test_a_grammar_that_cannot_be_kept_is_refused_at_once() -> None:
    with engine() as made:
        for grammar, message in (
            (Grammar.lark("start: nonesuch"), "Lark grammar cannot be used"),
            (Grammar.json_schema({"type": "string", "uniqueItems": True}), "uniqueItems"),
        ):
            with pytest.raises(GrammarError, match=message):
                made.submit("abc", settings(0.0, grammar))
        with pytest.raises(ValueError, match="name one in stop_token_ids"):
            made.submit("abc", RequestSettings(grammar=GRAMMARS["json"], stop_token_ids=()))
        assert made.metrics().waiting == 0
        assert made.run(["hello"], settings(0.0, GRAMMARS["choices"]))[0].finish_reason == "stop"
    with engine(tokenizer=None) as made, pytest.raises(ValueError, match="needs a tokenizer"):
        made.submit([1, 2, 3], settings(0.0, GRAMMARS["json"]))
    with pytest.raises(ValueError, match=r"grammar must be a specdec.Grammar, got \{'type'"):
        RequestSettings(grammar={"type": "object"})  # type: ignore[arg-type]


def test_only_a_whole_text_is_told_to_have_stopped() -> None:
    digits = settings(0.0, Grammar.regex("[0-9]{1,40}"), 2)  # the grammar could end there, but the model did not
    inside = settings(0.0, ASKED[0][1], 9)
    cut = replace(settings(0.0, ASKED[0][1]), stop=['"n"'])
    whole = replace(settings(0.0, Grammar.choices(["a", "b"])), stop_token_ids=[300, 257])
    with engine() as made:
        answers = made.run(["abc"] * 4, [digits, inside, cut, whole])
    assert [answer.finish_reason for answer in answers] == ["length", "length", "length", "stop"]
    assert answers[2].text.startswith('{"tone":')
    assert answers[3].tokens[-1] == 257
    assert answers[3].text in ("a", "b")


def test_many_threads_submit_grammars_at_once() -> None:
    grammars = [Grammar.choices([f"{i} and no other", f"{i}"]) for i in range(24)]
    with engine() as made, ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda grammar: made.submit("a", settings(1.0, grammar)).result(60).text, grammars))
    assert all(text in (f"{i} and no other", f"{i}") for i, text in enumerate(texts))


@dataclass(slots=True)
class Breaking:
    """A state whose library meets a limit of its own behind a few tokens."""

    inner: GrammarState
    num_left: int = 6

    @property
    def is_complete(self) -> bool:
        return self.inner.is_complete

    def allowed(self) -> Tensor:
        self._check()
        return self.inner.allowed()

    def accept(self, token: int) -> bool:
        self._check()
        is_taken = self.inner.accept(token)
        self.num_left -= is_taken
        return is_taken

    def rollback(self, num_tokens: int) -> None:
        self.num_left += num_tokens
        self.inner.rollback(num_tokens)

    def fork(self) -> GrammarState:
        return Breaking(self.inner.fork(), self.num_left)

    def forced(self, limit: int) -> list[int]:
        self._check()
        return self.inner.forced(limit)

    def options(self, most: int) -> list[int]:
        return self.inner.options(most)

    def _check(self) -> None:
        if self.num_left <= 0:
            raise GrammarError("too long for the library")


@pytest.mark.parametrize("drafter", ["none", "auto"])
def test_a_grammar_that_fails_on_the_way_ends_its_own_row_alone(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Grammar.regex("[a-z]{30}")
    with engine(drafter) as made:
        start = type(made._grammars).start
        monkeypatch.setattr(
            type(made._grammars),
            "start",
            lambda self, grammar, ends: (
                Breaking(start(self, grammar, ends)) if grammar == broken else start(self, grammar, ends)
            ),
        )
        asked = [(text, grammar, 0.0) for text, grammar in ASKED]
        before = [made.submit(text, settings(0.0, grammar)) for text, grammar, _ in asked[:3]]
        fails = made.submit("abc", settings(0.0, broken))
        behind = [made.submit(text, settings(0.0, grammar)) for text, grammar, _ in asked[3:]]
        with pytest.raises(GrammarError, match="too long for the library"):
            fails.result(60)
        assert [handle.result(60).tokens for handle in (*before, *behind)] == [alone(*each)[0] for each in asked]
