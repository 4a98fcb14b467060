"""Verdicts of all rows at once are the host's, row by row: the same nodes and tokens from the same noise, near ties apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import kernel_cache, simulated  # noqa: F401
from tape import Taping, taped_kernels  # noqa: F401
from tinychat import make_model
from torch import Tensor
from toy import ToyTarget
from verdict_cases import NOISE, PARAMS, Pass, on_host, some_pass

import specdec
from specdec.cuda import batch_verdicts
from specdec.cuda.batch_verdicts import BatchVerdicts, TreeBatch, decide, verdicts_on_device
from specdec.decode import Decoder
from specdec.distributions import LogitsTransform, NodeDistributions, ProcessorTransform, WarperTransform
from specdec.drafters.none import NoDrafter
from specdec.errors import InexactDraftError, NonFiniteLogitsError
from specdec.interfaces import BatchRule, Row, Scores, Verdict, Verifier
from specdec.kernels import pick
from specdec.kernels.walk import MAX_NODES
from specdec.sampling import GREEDY, SamplingParams, sampling_probs
from specdec.tree import Draw, TokenTree
from specdec.verifiers import make_verifier
from specdec.verifiers.match import MatchVerifier
from specdec.verifiers.rejection import RejectionVerifier

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["torch", "sim"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sim":
        request.getfixturevalue("simulated")
    else:
        monkeypatch.setenv("SPECDEC_KERNELS", "torch")
    return str(request.param)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "torch")


def on_device(verifier: Verifier, logits_transform: LogitsTransform, given: Pass) -> list[Verdict]:
    decided = verdicts_on_device(verifier, logits_transform, NOISE, given.rows, given.trees, given.scores)
    assert decided is not None
    return decided


# ----- the same verdicts -----


@pytest.mark.parametrize("verifier", ["match", "rejection", "block", "traversal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_verdicts_are_the_hosts_ties_included(verifier: str, dtype: torch.dtype, backend: str) -> None:
    """Guards another tie rule than the host's argmax: logits in steps of one half are full of ties for the best."""
    rule, accepted = make_verifier(verifier), 0
    for seed in range(4):
        given = some_pass(seed, True, dtype, reach=1 if rule.chain_only else 3)
        rounded = [Scores((scores.logits * 2).round().clamp(-6, 6) / 2) for scores in given.scores]
        assert any(int((s.logits == s.logits.max(-1, keepdim=True).values).sum()) > 20 for s in rounded)
        for each in (given, replace(given, scores=rounded)):
            found = on_device(rule, WarperTransform(GREEDY), each)
            assert found == [verdict for verdict, _ in on_host(rule, WarperTransform(GREEDY), each)]
            accepted += sum(verdict.num_accepted for verdict in found)
    assert accepted > 10


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize(("verifier", "is_drawn"), [("match", True), ("rejection", False), ("rejection", True)])
def test_sampled_verdicts_are_the_hosts(verifier: str, is_drawn: bool, params: SamplingParams, backend: str) -> None:
    """Guards noise, filters, draft probabilities and padding that are another row's or node's."""
    rule, accepted = make_verifier(verifier), list[int]()
    for seed in range(4 if backend == "sim" else 12):
        given = some_pass(seed, is_drawn, DTYPES[seed % 2 * 2])  # bfloat16 ties at the border of top-p
        found = on_device(rule, WarperTransform(params), given)
        for got, (expected, margin) in zip(found, on_host(rule, WarperTransform(params), given), strict=True):
            assert got == expected or margin < 1e-5
            accepted.append(got.num_accepted)
    assert max(accepted) > 1
    assert min(accepted) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_filters_keep_what_the_hosts_keep(dtype: torch.dtype, backend: str) -> None:
    """Guards another rule for equal logits: those of 16 bits tie at the borders of top-k and top-p."""
    logits = (torch.randn(6, 300, generator=torch.Generator().manual_seed(8)) * 3).to(dtype)
    for params in PARAMS[1:]:
        filters = pick.Filters(params.temperature, params.top_k, params.top_p, params.min_p)
        keys = pick.RngKeys(torch.tensor([1]), torch.arange(6), torch.arange(6))
        picked = pick.pick_rows(logits, filters, keys)
        kept = torch.stack([sampling_probs(each, params) > 0 for each in logits])
        assert torch.equal(pick.is_kept(logits.double(), picked.bounds, picked.lasts), kept)


def nearly_tied(num_rows: int, vocab: int) -> tuple[list[Row], Tensor]:
    """Logits whose two best scores are as near to each other as float32 can say."""
    generator = torch.Generator().manual_seed(5)
    rows = [Row(key, [1, 2], 9) for key in range(num_rows)]
    logits = torch.randn(num_rows, vocab, generator=generator) * 2
    for row, each in zip(rows, logits, strict=True):
        scores = each.double() + NOISE.at(row.key, 2).gumbel(torch.arange(vocab), 0)
        best, second = scores.topk(2).indices.tolist()
        each[second] += float(scores[best] - scores[second])
    return rows, logits


def test_sampled_tokens_differ_at_near_ties_only(backend: str) -> None:
    """None of some hundred random ones (twin: thousands); of those made to tie some do, so that this is no empty claim."""
    num_rows = 300 if backend == "sim" else 3000
    rows, tied = nearly_tied(num_rows, 50)
    free = torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(6)) * 2
    counts = []
    for logits in (free, tied):
        given = Pass(rows, [TokenTree.root(2)] * num_rows, [Scores(each[None]) for each in logits])
        logits_transform, rule = WarperTransform(SamplingParams()), MatchVerifier()
        pairs = zip(on_device(rule, logits_transform, given), on_host(rule, logits_transform, given), strict=True)
        margins = [margin for got, (expected, margin) in pairs if got != expected]
        assert all(margin < 1e-5 for margin in margins)
        counts.append(len(margins))
    assert counts[0] == 0
    assert 0 < counts[1] < 0.6 * num_rows


@pytest.mark.parametrize("verifier", ["match", "rejection"])
def test_rows_do_not_depend_on_their_batch(verifier: str, backend: str) -> None:
    """Each row alone, without padding, is decided as beside larger trees."""
    given, logits_transform = some_pass(3, True), WarperTransform(SamplingParams(top_p=0.9))
    together = on_device(make_verifier(verifier), logits_transform, given)
    for i, verdict in enumerate(together):
        alone = Pass(given.rows[i : i + 1], given.trees[i : i + 1], given.scores[i : i + 1])
        assert on_device(make_verifier(verifier), logits_transform, alone) == [verdict]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams()], ids=["greedy", "sampled"])
def test_matches_know_no_largest_tree(params: SamplingParams, twins: None) -> None:
    """The kernels end at 256 nodes: a larger tree must not fall back to the host's rounding, or plain decoding differs."""
    given, logits_transform = some_pass(1, False, sizes=(MAX_NODES + 40, 3)), WarperTransform(params)
    assert on_device(MatchVerifier(), logits_transform, given) == [
        v for v, _ in on_host(MatchVerifier(), logits_transform, given)
    ]
    found = verdicts_on_device(RejectionVerifier(), logits_transform, NOISE, given.rows, given.trees, given.scores)
    assert (found is None) != params.is_greedy


# ----- what is not a number -----


@pytest.mark.parametrize("params", [GREEDY, PARAMS[0], PARAMS[3]], ids=str)
@pytest.mark.parametrize("verifier", ["match", "rejection"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_logits_without_a_token_to_pick_raise_the_hosts_error(
    bad: float, verifier: str, params: SamplingParams, backend: str
) -> None:
    """Guards NaN that becomes a token; at nodes that nobody visits it does not matter."""
    rule, logits_transform = make_verifier(verifier), WarperTransform(params)
    given = some_pass(2)
    verdict = next(v for v in on_device(rule, logits_transform, given) if v.num_accepted)
    row = on_device(rule, logits_transform, given).index(verdict)
    size = len(given.trees[row])
    for node in (verdict.nodes[-1], next(n for n in range(size) if n not in verdict.nodes)):
        logits = given.scores[row].logits.clone()
        logits[node, 3 if bad != -torch.inf else slice(None)] = bad
        scores = [*given.scores]
        scores[row] = Scores(logits)
        spoiled = replace(given, scores=scores)
        if node in verdict.nodes:
            with pytest.raises(NonFiniteLogitsError) as expected:
                on_host(rule, logits_transform, spoiled)
            with pytest.raises(NonFiniteLogitsError) as got:
                on_device(rule, logits_transform, spoiled)
            assert str(got.value) == str(expected.value)
        else:
            assert on_device(rule, logits_transform, spoiled) == on_device(rule, logits_transform, given)


@pytest.mark.parametrize("filters", [pick.Filters(), *(pick.Filters(1.0, 5, p, m) for p in (1, 0.5) for m in (0, 0.1))])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("count", [1, 2, 40])
def test_no_filter_hides_what_is_not_a_number(bad: float, count: int, filters: pick.Filters, backend: str) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    logits[1, 40 - count :] = bad
    rng = pick.RngKeys(torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([4, 4]))
    assert pick.pick_rows(logits, filters, rng).lse.isfinite().tolist() == [True, False]


# ----- when -----


class Custom(MatchVerifier):
    """A verifier of somebody's own, which knows nothing of batches."""

    def batch_rule(self, params: SamplingParams) -> None:  # type: ignore[override]
        return None


def cases() -> Iterator[tuple[str, Verifier, LogitsTransform, Any]]:
    sampled = WarperTransform(SamplingParams())
    yield "match", MatchVerifier(), sampled, NOISE
    yield "greedy needs no noise", RejectionVerifier(), WarperTransform(GREEDY), object()
    yield "not block above 0", make_verifier("block"), sampled, NOISE
    yield "not traversal above 0", make_verifier("traversal"), sampled, NOISE
    yield "not a verifier of somebody's own", Custom(), sampled, NOISE
    yield "not typical", make_verifier("typical"), WarperTransform(GREEDY), NOISE
    yield "not other noise", MatchVerifier(), sampled, object()
    yield "not with processors", MatchVerifier(), ProcessorTransform([], GREEDY), NOISE


@pytest.mark.parametrize(
    ("name", "verifier", "logits_transform", "rng"), list(cases()), ids=[case[0] for case in cases()]
)
def test_what_is_decided_together(
    name: str, verifier: Verifier, logits_transform: LogitsTransform, rng: Any, twins: None
) -> None:
    given = some_pass(0, sizes=(1, 1))
    found = verdicts_on_device(verifier, logits_transform, rng, given.rows, given.trees, given.scores)
    assert (found is None) == name.startswith("not")


@pytest.mark.parametrize("mode", ["", "auto"])
def test_on_a_cpu_nothing_changes_unless_asked_for(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", mode)
    given = some_pass(0)
    arguments = (MatchVerifier(), WarperTransform(GREEDY), NOISE, given.rows, given.trees, given.scores)
    assert verdicts_on_device(*arguments) is None


def test_logits_in_float64_stay_with_the_host(twins: None) -> None:
    given = some_pass(0, dtype=torch.float64)
    arguments = (MatchVerifier(), WarperTransform(GREEDY), NOISE, given.rows, given.trees, given.scores)
    assert verdicts_on_device(*arguments) is None


def test_draws_that_a_verifier_is_not_exact_for_are_left_to_its_refusal(twins: None) -> None:
    given = some_pass(0, True)
    narrow = RejectionVerifier(draws=frozenset({Draw.INDEPENDENT}))
    for verifier in (narrow, make_verifier("block")):
        for params in (GREEDY, SamplingParams()):
            decoder = decoder_of(verifier, params)
            with pytest.raises(InexactDraftError):
                decoder.decide(given.rows, given.trees, given.scores, probs_of(given, params))


def probs_of(given: Pass, params: SamplingParams) -> list[Any]:
    logits_transform = WarperTransform(params)
    return [logits_transform.target_probs(*each) for each in zip(given.rows, given.trees, given.scores, strict=True)]


def decoder_of(verifier: Verifier, params: SamplingParams) -> Decoder:
    target: Any = None
    logits_transform = WarperTransform(params)
    decide = BatchVerdicts(verifier, logits_transform, NOISE)
    return Decoder(target, NoDrafter(), verifier, logits_transform, NOISE, lambda row: False, decide=decide)


def test_nothing_is_read_before_the_one_copy(taped_kernels: None) -> None:  # noqa: F811
    """Guards reads that would wait for a GPU, by the strict tape of the captured passes; one copy to the device, too."""
    for is_drawn, rule, params in (
        (False, BatchRule.FOLLOW, GREEDY),
        (True, BatchRule.FOLLOW, PARAMS[3]),
        (True, BatchRule.REJECT, PARAMS[3]),
    ):
        given = some_pass(1, is_drawn)
        decide(rule, TreeBatch.of(given.rows, given.trees, given.scores, params, 5))
        with Taping([]):
            decided = decide(rule, TreeBatch.of(given.rows, given.trees, given.scores, params, 5))
        depth = 1 + max(max(tree.depths()) for tree in given.trees)
        assert decided.shape == (4, 2, depth)
        assert decided.dtype == torch.int64


def test_logits_that_lie_side_by_side_are_not_copied() -> None:
    whole = torch.randn(4, 3, 5)
    same = batch_verdicts._joined(list(whole))
    assert same.data_ptr() == whole.data_ptr()
    assert torch.equal(same, whole)
    assert torch.equal(batch_verdicts._joined(list(whole)[1:3]), whole[1:3])
    for parts in ([whole[0], whole[2]], [whole[1], whole[0]], [whole[0], whole[1, :2]], [whole[0], whole[1].clone()]):
        joined = batch_verdicts._joined(parts)
        assert joined.data_ptr() != whole.data_ptr()
        for line, part in zip(joined, parts, strict=True):
            assert torch.equal(line[: len(part)], part)
            assert not line[len(part) :].any()


def test_probabilities_are_still_there_for_whoever_asks(twins: None) -> None:
    """Traces with probabilities read them behind the step; nothing computes them before."""
    target = ToyTarget()
    target.logits = target.logits.float()
    decoder = replace(decoder_of(MatchVerifier(), SamplingParams(top_k=2)), target=target)
    rows = [Row(key, [0, 1], 9) for key in range(2)]
    target.open(rows)
    for emission in decoder.step(rows):
        assert isinstance(emission.probs, NodeDistributions)
        assert not emission.probs._scores
        expected = sampling_probs(emission.scores.logits[0], SamplingParams(top_k=2))
        assert torch.equal(emission.probs.probs(0), expected)


# ----- whole texts -----


PROMPTS = torch.tensor([[97, 98, 99, 97, 98, 99, 97, 98], [5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 3, 4, 1, 2, 3, 4]])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass decided together."""
    seen: list[int] = []
    original = batch_verdicts.verdicts_on_device

    def counted(*arguments: Any) -> list[Verdict] | None:
        found = original(*arguments)
        if found is not None:
            seen.append(len(found))
        return found

    monkeypatch.setattr(batch_verdicts, "verdicts_on_device", counted)
    return seen


@pytest.mark.parametrize("verifier", ["match", "rejection"])
@pytest.mark.parametrize("drafter", ["none", "ngram", "recycling"])
def test_greedy_text_is_generates(drafter: str, verifier: str, backend: str, passes: list[int]) -> None:
    model = make_model()
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    found = specdec.generate(model, PROMPTS, drafter=drafter, verifier=verifier, adaptive=False, **options)
    assert torch.equal(found, model.generate(PROMPTS, **options))
    assert passes
    assert passes[0] == 3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}], ids=str)
def test_sampled_text_is_that_of_plain_decoding(options: dict[str, Any], backend: str, passes: list[int]) -> None:
    """Sample-and-match under one backend, whatever the drafter and the batch; the host's is the same, near ties apart."""
    model = make_model()
    options = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0, "seed": 3, "adaptive": False, **options}
    plain = specdec.generate(model, PROMPTS, drafter="none", **options)
    assert torch.equal(specdec.generate(model, PROMPTS, drafter="ngram", **options), plain)
    assert torch.equal(specdec.generate(model, PROMPTS[:1], drafter="recycling", **options)[0], plain[0])
    assert passes


def test_the_hosts_sampled_text_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = make_model(), {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0, "seed": 3}
    texts = []
    for mode in ("auto", "torch"):
        monkeypatch.setenv("SPECDEC_KERNELS", mode)
        texts.append(specdec.generate(model, PROMPTS, drafter="ngram", **options))
    assert torch.equal(*texts)
