"""Processors and criteria that a caller brings see what generate() shows them, or are refused for what they do."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from chance import TwinNoise, g_test
from enumeration import exact_joint, product
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from toy import INDEPENDENT, PROMPT, ToyDrafter, ToyTarget, full
from transformers import (
    EosTokenCriteria,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)

import specdec
from specdec.decode import Decoder
from specdec.distributions import ProcessorTransform
from specdec.errors import UnsupportedOptionError
from specdec.generation.lockstep import LockstepPolicy, LockstepVerdicts
from specdec.generation.snapshot import Snapshot, UnreadableStateError
from specdec.interfaces import Row, Step
from specdec.sampling import SamplingParams
from specdec.verifiers import make_verifier

VOCAB = 61
ENDS = [2, 17, 40, 41, 42, 7, 33]
DRAFTERS = ["none", "ngram", "model:shape=2x2x1x1"]
Make = Callable[[], Any]


def tiny(seed: int, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny(0)


@pytest.fixture(scope="module")
def draft_model() -> LlamaForCausalLM:
    """Right often enough that blocks of several tokens are accepted."""
    return tiny(0, layers=1)


def prompts(num_rows: int) -> dict[str, Tensor]:
    rows = [[5, 9, 12, 7], [8, 9, 10, 8, 9, 10, 8, 9], [30], [11, 3]][:num_rows]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def ours(model: Any, drafter: str, draft_model: Any, **kwargs: Any) -> Any:
    return specdec.generate(
        model, drafter=drafter, draft_model=draft_model if "model" in drafter else None, adaptive=False, **kwargs
    )


def bias(num_rows: int) -> Tensor:
    return 3.0 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(5))


class RowBias(LogitsProcessor):  # type: ignore[misc]
    """Another bias for each row; with two dimensions, so it cannot be applied to a batch of another size."""

    def __init__(self, num_rows: int) -> None:
        self.bias = bias(num_rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert len(scores) == len(self.bias)
        return scores + self.bias


class RowBans(LogitsProcessor):  # type: ignore[misc]
    """Other banned tokens in each row, in a list of lists; works on as many rows as it is shown."""

    def __init__(self, num_rows: int) -> None:
        self.banned = [[(7 * row + k) % VOCAB for k in range(25)] for row in range(num_rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, banned in zip(range(len(scores)), self.banned, strict=False):
            scores[row, banned] = -float("inf")
        return scores


@dataclass
class Matcher:
    """A grammar's: it advances by one token and is asked for what may follow; wrong tokens and late ones are errors.

    Padding is taken for the end: a criterion may end a row at any token.
    """

    state: int = 0
    is_over: bool = False

    def accept(self, token: int) -> None:
        assert not self.is_over, "asked behind the end"
        assert token in [0, *self.allowed()], "a token that was not allowed"
        self.state = (5 * self.state + token + 1) % 23
        self.is_over = token in [0, *ENDS]

    def allowed(self) -> list[int]:
        return [token for token in range(3, VOCAB) if (token + self.state) % 4]


class Grammar(LogitsProcessor):  # type: ignore[misc]
    """As those of xgrammar and outlines: a matcher for each row, which consumes the newest token of each call."""

    def __init__(self) -> None:
        self.matchers: list[Matcher] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.matchers:
            self.matchers = [Matcher() for _ in input_ids]
        else:
            assert len(input_ids) == len(self.matchers)
            for ids, matcher in zip(input_ids, self.matchers, strict=True):
                if not matcher.is_over:
                    matcher.accept(int(ids[-1]))
        mask = torch.full_like(scores, -float("inf"))
        for row, matcher in enumerate(self.matchers):
            mask[row, matcher.allowed()] = 0
        return scores + mask


class GrowingPenalty(LogitsProcessor):  # type: ignore[misc]
    """Counts its calls, and hands out one tensor again and again."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.answer: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        if self.answer is None:
            self.answer = torch.empty_like(scores)
        self.answer.copy_(scores)
        self.answer[:, (self.num_calls * 7) % VOCAB :: 5] -= 1.5 * self.num_calls
        return self.answer


class Diverse(LogitsProcessor):  # type: ignore[misc]
    """Rows that repel each other: what one has written, and what it would like, counts against the others."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - 0.4 * (counts.sum(0) - counts) - 0.3 * scores.softmax(-1).sum(0)


@dataclass
class Recorder:
    """A processor and a criterion in one that write down what they are shown."""

    calls: list[Any] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.calls.append((type(scores).__name__, input_ids))
        return scores if isinstance(scores, Tensor) else False

    def seen(self) -> list[tuple[str, list[list[int]]]]:
        return [(name, ids.tolist()) for name, ids in self.calls]


def shout(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A processor that is a plain function."""
    scores[:, input_ids[:, -1]] -= 4.0
    return scores


PROCESSORS: dict[str, Callable[[int], Any]] = {
    "bias of each row": RowBias,
    "banned in each row": RowBans,
    "grammar": lambda _: Grammar(),
    "counts calls": lambda _: GrowingPenalty(),
    "coupled rows": lambda _: Diverse(),
    "function": lambda _: shout,
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_of_any_kind_equal_generate(
    model: Any, draft_model: Any, name: str, num_rows: int, drafter: str
) -> None:
    """Guards rows that get the parameters of row 0, and grammars that are asked too often, too early or too late."""
    settings = {**prompts(num_rows), "max_new_tokens": 24, "do_sample": False, "eos_token_id": ENDS}
    make = lambda: LogitsProcessorList([PROCESSORS[name](num_rows)])  # noqa: E731
    expected = model.generate(**settings, logits_processor=make())
    got = ours(model, drafter, draft_model, **settings, logits_processor=make())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("verifier", ["match", "rejection", "block", "traversal", "typical"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_decoding_looks_ahead_by_no_verifier(model: Any, draft_model: Any, name: str, verifier: str) -> None:
    """Guards a promise that `block` and `traversal` keep at temperature 0."""
    settings = {**prompts(3), "max_new_tokens": 16, "do_sample": False, "eos_token_id": ENDS}
    make = lambda: LogitsProcessorList([PROCESSORS[name](3)])  # noqa: E731
    expected = model.generate(**settings, logits_processor=make())
    got = ours(model, "model:shape=chain", draft_model, verifier=verifier, **settings, logits_processor=make())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("verifier", ["match", "rejection"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_samples_do_not_depend_on_the_drafter(
    model: Any, draft_model: Any, name: str, num_rows: int, verifier: str
) -> None:
    """`match` is token-identical to plain decoding; under `rejection` every token was allowed, or a matcher raises."""
    settings = {**prompts(num_rows), "max_new_tokens": 20, "do_sample": True, "eos_token_id": ENDS, "seed": 4}
    make = lambda: LogitsProcessorList([PROCESSORS[name](num_rows)])  # noqa: E731
    plain = ours(model, "none", None, **settings, logits_processor=make())
    for drafter in DRAFTERS[1:]:
        got = ours(model, drafter, draft_model, verifier=verifier, **settings, logits_processor=make())
        assert verifier != "match" or torch.equal(got, plain)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize("ends", [ENDS, None], ids=["ends", "no ends"])
def test_every_call_is_one_of_generate(
    model: Any, draft_model: Any, num_rows: int, drafter: str, ends: list[int] | None
) -> None:
    """The promise itself: the same calls with the same ids, in the same order, of processors and criteria together."""
    settings = {**prompts(num_rows), "max_new_tokens": 20, "do_sample": False, "eos_token_id": ends}
    seen = []
    for run in (model.generate, lambda **k: ours(model, drafter, draft_model, **k)):
        recorder = Recorder()
        run(
            **settings,
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=StoppingCriteriaList([recorder]),
        )
        seen.append(recorder.seen())
    assert seen[1] == seen[0]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_prefix_allowed_tokens_are_those_of_each_row(model: Any, draft_model: Any, num_rows: int) -> None:
    """It is called with the number of the row, which was always 0."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        return [token for token in range(3, VOCAB) if (token + len(ids) + 3 * row) % 5 > row % 3]

    settings = {**prompts(num_rows), "max_new_tokens": 20, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    expected = model.generate(**settings)
    for drafter in DRAFTERS:
        assert torch.equal(ours(model, drafter, draft_model, **settings), expected)


OPTIONS: list[dict[str, Any]] = [
    {"encoder_repetition_penalty": 1.8},
    {"encoder_no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 0.6, "repetition_penalty": 1.3},
    {"encoder_repetition_penalty": 1.8, "num_return_sequences": 2},
    {"encoder_no_repeat_ngram_size": 1, "num_return_sequences": 2},
    {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)},
    {"bad_words_ids": [[11], [12, 13], [9, 10]], "sequence_bias": [[[7], -5.0], [[20, 21], 3.0]]},
]


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_options_that_are_bound_to_rows_or_keep_state_equal_generate(
    model: Any, draft_model: Any, options: dict[str, Any], num_rows: int
) -> None:
    """They were refused by the names of their classes. Two samples of a prompt share the prompt's parameters."""
    settings = {**prompts(num_rows), "max_new_tokens": 16, "do_sample": False, "eos_token_id": ENDS, **options}
    if "num_return_sequences" in options:
        settings |= {"do_sample": True, "top_k": 1}  # a sample that is the best token
    expected = model.generate(**settings)
    for drafter in DRAFTERS:
        assert torch.equal(ours(model, drafter, draft_model, **settings), expected)


class RowLengths(StoppingCriteria):  # type: ignore[misc]
    """Another length for each row."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] - 8 >= torch.tensor([9, 3, 14, 6])[: len(input_ids)]


class AllAtOnce(StoppingCriteria):  # type: ignore[misc]
    """One bool for the whole batch, by what all rows have written."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        return int((input_ids[:, -6:] % 3 == 1).sum()) >= 3 + len(input_ids)


class ZeroDimensional(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids % 7 == 0).sum() >= 3 * len(input_ids)


class CountsCalls(StoppingCriteria):  # type: ignore[misc]
    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        self.num_calls += 1
        return self.num_calls == 11


class Confident(StoppingCriteria):  # type: ignore[misc]
    """Reads the scores of the newest column, of each row."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return scores[-1].softmax(-1).amax(-1) > 0.5


class ConfidentTogether(StoppingCriteria):  # type: ignore[misc]
    """Reads the scores of all columns and rows, also of those that have ended, and answers for all."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        assert len(scores) == input_ids.shape[1] - 8
        return len(scores) > 5 and float(torch.stack(scores).softmax(-1).amax(-1).mean(1)[-4:].mean()) > 0.19


class SecondEnd(EosTokenCriteria):  # type: ignore[misc]
    """Of a class of transformers that is known, but does something else."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, 8:], self.eos_token_id).sum(-1) >= 2


class LateLength(MaxLengthCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > self.max_length)


CRITERIA: dict[str, Make] = {
    "a length for each row": RowLengths,
    "one bool for all": AllAtOnce,
    "no dimension": ZeroDimensional,
    "counts calls": CountsCalls,
    "reads scores": Confident,
    "reads all scores": ConfidentTogether,
    "second end": lambda: SecondEnd(ENDS),
    "late length": lambda: LateLength(12),
    "longer than the config": lambda: MaxLengthCriteria(35),
    "shorter than the config": lambda: MaxLengthCriteria(11),
    "own ends": lambda: EosTokenCriteria([5, 9, 11, 13, 21, 34, 50]),
    "one own end": lambda: EosTokenCriteria(torch.tensor(9)),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("ends", [ENDS, None], ids=["ends", "no ends"])
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_of_any_kind_stop_where_generate_stops(
    model: Any, draft_model: Any, name: str, ends: list[int] | None, num_rows: int, drafter: str
) -> None:
    """Guards answers for row 0 given to all rows, answers for all that end one row, and scores of None."""
    inputs = {key: value[:num_rows] for key, value in prompts(4).items()}  # eight columns
    settings = {**inputs, "max_new_tokens": 22, "do_sample": False, "eos_token_id": ends}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**settings, stopping_criteria=StoppingCriteriaList([CRITERIA[name]()]))
    got = ours(model, drafter, draft_model, **settings, stopping_criteria=StoppingCriteriaList([CRITERIA[name]()]))
    assert torch.equal(got.sequences, expected.sequences)
    assert got.stats.num_accepted_tokens + got.stats.num_drafts == got.stats.num_tokens
    assert len(got.scores) == len(expected.scores)


class DeclaredLengths(RowLengths):
    is_rowwise = True


@pytest.mark.parametrize("ends", [ENDS, None], ids=["ends", "no ends"])
def test_a_declared_criterion_still_has_its_own_parameters_for_each_row(
    model: Any, draft_model: Any, ends: list[int] | None
) -> None:
    """Rows run ahead of each other, or, without end tokens, go on until all have ended."""
    settings = {**prompts(4), "max_new_tokens": 22, "do_sample": False, "eos_token_id": ends}
    make = lambda: StoppingCriteriaList([DeclaredLengths()])  # noqa: E731
    expected = model.generate(**settings, stopping_criteria=make())
    for drafter in DRAFTERS:
        assert torch.equal(ours(model, drafter, draft_model, **settings, stopping_criteria=make()), expected)


@pytest.mark.parametrize("drafter", ["recycling", "hybrid:parts=ngram+model"])
def test_every_drafter_stands_rows_that_wait_for_each_other(model: Any, draft_model: Any, drafter: str) -> None:
    """Their rows emit fewer tokens than were accepted."""
    settings = {**prompts(4), "max_new_tokens": 30, "do_sample": False, "eos_token_id": ENDS}
    expected = model.generate(**settings, logits_processor=LogitsProcessorList([RowBans(4)]))
    got = ours(model, drafter, draft_model, **settings, logits_processor=LogitsProcessorList([RowBans(4)]))
    assert torch.equal(got, expected)


def test_without_kept_scores_criteria_are_shown_none(model: Any) -> None:
    """As in generate(): a criterion that needs them must fail there and here."""
    for run in (model.generate, lambda **k: specdec.generate(model, **k)):
        with pytest.raises(TypeError, match="NoneType"):
            run(**prompts(1), max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Confident()]))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_processor_and_a_criterion_may_share_state(model: Any, draft_model: Any, num_rows: int) -> None:
    """A grammar that says that its text is complete; guards processors that run ahead of criteria."""

    class Complete(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, grammar: Grammar) -> None:
            self.grammar = grammar

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([matcher.state % 5 == 3 for matcher in self.grammar.matchers])

    results = []
    for run in (model.generate, *(lambda d=d, **k: ours(model, d, draft_model, **k) for d in DRAFTERS)):
        grammar = Grammar()
        results.append(
            run(
                **prompts(num_rows),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=ENDS,
                logits_processor=LogitsProcessorList([grammar]),
                stopping_criteria=StoppingCriteriaList([Complete(grammar)]),
            )
        )
    assert all(torch.equal(each, results[0]) for each in results[1:])


def test_the_hook_of_generate_shows_the_same(model: Any) -> None:
    """custom_generate= is the other way in."""
    settings = {**prompts(3), "max_new_tokens": 20, "do_sample": False, "eos_token_id": ENDS}
    make = lambda: {  # noqa: E731
        "logits_processor": LogitsProcessorList([Grammar(), RowBans(3)]),
        "stopping_criteria": StoppingCriteriaList([RowLengths()]),
    }
    got = model.generate(**settings, **make(), custom_generate=specdec.custom_generate("ngram"))
    assert torch.equal(got, model.generate(**settings, **make()))


class Collector:
    def __init__(self) -> None:
        self.parts: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(-1).tolist())

    def end(self) -> None: ...


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_streams_steps_and_statistics_agree_with_the_text(model: Any, draft_model: Any, drafter: str) -> None:
    """Rows that wait for each other, and padding behind ended ones, must not be counted or shown twice."""
    settings = {**prompts(3), "max_new_tokens": 20, "do_sample": False, "eos_token_id": ENDS}
    expected, got = Collector(), Collector()
    text = model.generate(**settings, logits_processor=LogitsProcessorList([RowBias(3)]), streamer=expected)
    steps: list[Step] = []
    out = ours(
        model, drafter, draft_model, **settings, logits_processor=LogitsProcessorList([RowBias(3)]), streamer=got,
        on_step=steps.append, return_dict_in_generate=True,
    )  # fmt: skip
    assert got.parts == expected.parts
    assert out.stats.num_tokens == sum(len(step.tokens) for step in steps)
    for row in range(3):
        tokens = [token for step in steps if step.row == row for token in step.tokens]
        new = text[row, 8:].tolist()
        assert new == tokens + [0] * (len(new) - len(tokens))
        assert [step.finished for step in steps if step.row == row][-1]


class Declared(RowBans):
    is_rowwise = True


def test_rows_run_ahead_of_each_other_where_the_caller_says_that_they_may(model: Any, draft_model: Any) -> None:
    """The declaration must be worth something: fewer passes, the same text, under verifiers that look ahead too."""
    settings = {**prompts(3), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    passes = {}
    for kind in (RowBans, Declared):
        expected = model.generate(**settings, logits_processor=LogitsProcessorList([kind(3)]))
        steps: list[Step] = []
        got = ours(
            model, "model:shape=chain", draft_model, **settings, logits_processor=LogitsProcessorList([kind(3)]),
            on_step=steps.append,
        )  # fmt: skip
        assert torch.equal(got, expected)
        passes[kind] = len(steps)
    assert passes[Declared] < passes[RowBans]
    sampled = {**settings, "do_sample": True, "verifier": "traversal"}
    out = ours(model, "model:shape=chain", draft_model, **sampled, logits_processor=LogitsProcessorList([Declared(3)]))
    banned = RowBans(3).banned
    assert all(not set(out[row, 8:].tolist()) & set(banned[row]) for row in range(3))


class Pure(LogitsProcessor):  # type: ignore[misc]
    """Prepares something at its first call, and keeps nothing after that."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.bias is None:
            self.bias = torch.zeros_like(scores[0]).index_fill_(0, torch.tensor([3, 4, 5]), -float("inf"))
        return scores + self.bias


def counting() -> Any:
    """State in a closure."""
    count = 0

    def count_up(input_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return scores

    return count_up


class InClass(LogitsProcessor):  # type: ignore[misc]
    """State in a class."""

    seen: ClassVar[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(len(input_ids))
        return scores


class InTensor(LogitsProcessor):  # type: ignore[misc]
    """State in a tensor that stays the same object."""

    def __init__(self) -> None:
        self.counts = torch.zeros(VOCAB)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.counts[input_ids[:, -1]] += 1
        return scores - self.counts


class Native(LogitsProcessor):  # type: ignore[misc]
    """State that nobody can look at, as in matchers of extension modules."""

    def __init__(self) -> None:
        self.tokens = iter(range(1000))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        next(self.tokens)
        return scores


STATEFUL: dict[str, Make] = {
    "grammar": Grammar,
    "counts calls": GrowingPenalty,
    "in a closure": counting,
    "in its class": InClass,
    "in a tensor": InTensor,
    "out of sight": Native,
}


@pytest.mark.parametrize("verifier", ["block", "traversal", "typical"])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_and_looking_ahead_do_not_go_together(model: Any, draft_model: Any, name: str, verifier: str) -> None:
    """These verifiers ask about nodes that are then not kept: a matcher would advance along texts that never were."""
    settings = {**prompts(1), "max_new_tokens": 20, "do_sample": True, "verifier": verifier}
    with pytest.raises(UnsupportedOptionError, match=rf"{verifier}.*state.*match.*is_rowwise"):
        ours(
            model,
            "model:shape=chain",
            draft_model,
            **settings,
            logits_processor=LogitsProcessorList([STATEFUL[name]()]),
        )


@pytest.mark.parametrize("verifier", ["block", "traversal"])
def test_a_processor_without_state_may_be_asked_ahead_for_one_row_but_not_for_several(
    model: Any, draft_model: Any, verifier: str
) -> None:
    """One row is all that there is to see; of several nobody knows whether they hang together."""
    settings = {"max_new_tokens": 20, "do_sample": True, "verifier": verifier, "eos_token_id": ENDS}
    make = lambda: {  # noqa: E731
        "logits_processor": LogitsProcessorList([Pure(), shout]),
        "stopping_criteria": StoppingCriteriaList([CountsCalls()]),
    }
    out = ours(model, "model:shape=chain", draft_model, **prompts(1), **settings, **make())
    assert not set(out[0, 4:].tolist()) & {3, 4, 5}
    assert out.shape[1] <= 4 + 11
    with pytest.raises(UnsupportedOptionError, match=rf"{verifier}.*Pure.*other rows.*is_rowwise"):
        ours(model, "model:shape=chain", draft_model, **prompts(2), **settings, **make())


def test_under_looking_ahead_criteria_still_see_columns(model: Any, draft_model: Any) -> None:
    """Criteria do not take part in looking ahead: nothing that they may do must be refused."""
    settings = {**prompts(4), "max_new_tokens": 20, "do_sample": True, "verifier": "traversal", "eos_token_id": ENDS}
    for scores in (False, True):
        recorder = Recorder()
        out = ours(
            model, "model:shape=2x2x1x1", draft_model, **settings, seed=3, return_dict_in_generate=True,
            output_scores=scores, stopping_criteria=StoppingCriteriaList([recorder]),
        )  # fmt: skip
        columns = [ids for _, ids in recorder.seen()]
        assert columns == [out.sequences[:, : 9 + i].tolist() for i in range(len(columns))]
        assert columns[-1] == out.sequences.tolist()


@pytest.mark.parametrize(
    "thing", [threading.Lock(), iter([1]), re.compile("x"), Tokenizer(BPE())], ids=lambda thing: type(thing).__name__
)
def test_what_cannot_be_looked_at_is_not_taken_for_unchanged(thing: Any) -> None:
    """Instances of extension modules' classes hide what they hold."""
    with pytest.raises(UnreadableStateError, match=type(thing).__name__):
        Snapshot({"inside": [thing]})


class WritesIds(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        input_ids[:, 0] = 3
        return scores


class OneRow(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[0]


class HoldsModel(LogitsProcessor):  # type: ignore[misc]
    """Holds the model for its config, or to run it."""

    def __init__(self, model: Any, runs: bool) -> None:
        self.anything, self.runs = model, runs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.anything.config.bos_token_id] = -float("inf")
        return scores + self.anything(input_ids).logits[:, -1] if self.runs else scores


class TwoAnswers(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.zeros(len(input_ids), 1, dtype=torch.bool)


def test_what_cannot_be_right_is_refused_for_what_it_does(model: Any) -> None:
    """No list of names: any class that does the same is refused, and by its own name."""
    refused: Sequence[tuple[Any, str]] = [
        (WritesIds(), "WritesIds writes into input_ids"),
        (OneRow(), r"OneRow returned \(61,\)"),
        (HoldsModel(model, runs=True), "HoldsModel runs the model for every token"),
    ]
    for processor, message in refused:
        with pytest.raises(UnsupportedOptionError, match=message):
            specdec.generate(model, **prompts(2), max_new_tokens=6, logits_processor=LogitsProcessorList([processor]))
    assert not model._forward_pre_hooks
    with pytest.raises(UnsupportedOptionError, match=r"TwoAnswers answered with the shape \(2, 2\)"):
        specdec.generate(model, **prompts(2), max_new_tokens=6, stopping_criteria=StoppingCriteriaList([TwoAnswers()]))
    harmless = LogitsProcessorList([HoldsModel(model, runs=False)])
    settings = {**prompts(2), "max_new_tokens": 9, "do_sample": False, "logits_processor": harmless}
    assert torch.equal(specdec.generate(model, **settings), model.generate(**settings))


@pytest.mark.parametrize("verifier", ["rejection", "traversal"])
def test_rows_that_wait_for_each_other_still_follow_the_targets_law(verifier: str) -> None:
    """What a row emits is cut where another row stops: that must not depend on what is cut off.

    The samples are fixed by their seeds; of other seeds one in 2000 would raise a false alarm for each verifier.
    """
    target, num_tokens, shape = ToyTarget(), 4, full(2, 1, 1)
    results = []
    for seed in range(600):
        rows = [Row(key, list(PROMPT), len(PROMPT) + num_tokens) for key in range(2)]
        params = SamplingParams()
        logits_transform = LockstepPolicy(
            torch.tensor([PROMPT, PROMPT]), [shout_nothing], [MaxLengthCriteria(len(PROMPT) + num_tokens)], params, None,
            by_node=ProcessorTransform([shout_nothing], params) if verifier == "traversal" else None,
        )  # fmt: skip
        rule, rng = make_verifier(verifier), TwinNoise(seed)
        decide = LockstepVerdicts(logits_transform, rule, rng)
        drafter = ToyDrafter(INDEPENDENT, shape)
        decoder = Decoder(target, drafter, rule, logits_transform, rng, logits_transform.stop, decide=decide)
        steps = [emission.step for emission in decoder.run(rows)]
        assert len({(step.index, len(step.tokens)) for step in steps}) == len(steps) / 2, "in lockstep"
        results.append(tuple(tuple(row.tokens[len(PROMPT) :]) for row in rows))
    one = exact_joint(target, num_tokens=num_tokens)
    assert g_test(results, product(one, one)) > 1 / 2000
    assert all(g_test([result[row] for result in results], one) > 1 / 2000 for row in range(2))


def shout_nothing(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores
