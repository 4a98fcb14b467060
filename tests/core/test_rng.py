"""Counter-based noise: the generator is Philox, the numbers are uniform, and different questions get independent answers.

Seeds are fixed, so nothing here is flaky; the odds in the docstrings are those of a false alarm after a correct change.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from chance import TwinNoise, g_test, scalar_philox
from enumeration import Loop, sample_many
from torch import Tensor
from toy import CERTAIN, INDEPENDENT, WITHOUT_REPLACEMENT, Kind, Tokens, ToyDrafter, full

from specdec.rng import PhiloxRng, PhiloxRowRng, Stream, _philox_torch, philox
from specdec.verifiers.rejection import RejectionVerifier

ONES = 0xFFFFFFFF
SAMPLE = torch.arange(32768)


def uniform(
    rng: PhiloxRowRng, depth: int = 0, stream: Stream = Stream.TARGET, index: int = 0, shift: int = 0
) -> Tensor:
    """Uniform numbers (32768,) behind the Gumbel noise of as many tokens."""
    return (-(-rng.gumbel(SAMPLE + shift, depth, stream, index)).exp()).exp()


def cells(values: Tensor, num_cells: int) -> list[int]:
    return (values * num_cells).long().tolist()


def philox_words(counter: Sequence[int], key: int) -> Tokens:
    first, second, third, fourth = counter
    return tuple(philox(torch.tensor([first]), second, third, fourth, key).flatten().tolist())


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    """The known-answer vectors of Random123 for philox4x32-10; guards sign errors of 64-bit products."""
    assert philox_words(counter, key) == words
    assert scalar_philox(counter, key) == words


def test_philox_agrees_with_a_second_implementation_in_plain_integers() -> None:
    pick = random.Random(1)
    for _ in range(200):
        counter, key = [pick.getrandbits(32) for _ in range(4)], pick.getrandbits(64)
        assert philox_words(counter, key) == scalar_philox(counter, key)


def test_the_fast_twin_of_the_tests_answers_as_the_real_noise_does() -> None:
    """Guards the statistics of test_exactness.py, which ask the twin."""
    pick = random.Random(2)
    for _ in range(300):
        seed, row, position, depth, index = (
            pick.getrandbits(64),
            pick.randrange(9999),
            pick.randrange(99999),
            pick.randrange(9),
            pick.randrange(40),
        )
        probs = torch.tensor(
            [pick.random() * pick.randrange(2) for _ in range(3)] + [pick.random()], dtype=torch.float64
        )
        real, twin = PhiloxRng(seed).at(row, position), TwinNoise(seed).at(row, position)
        for stream in Stream:
            assert real.draw(probs, depth, stream, index) == twin.draw(probs, depth, stream, index)
        prob = pick.random()
        assert real.bernoulli(prob, depth, index) == twin.bernoulli(prob, depth, index)


@pytest.mark.parametrize("kind", [CERTAIN, INDEPENDENT, WITHOUT_REPLACEMENT], ids=lambda kind: kind.name)
def test_whole_runs_with_the_twin_equal_runs_with_the_real_noise(kind: Kind) -> None:
    loop = Loop(ToyDrafter(kind, full(2, 2)), RejectionVerifier())
    assert list(sample_many(loop, PhiloxRng(2024), 3, 60)) == list(sample_many(loop, TwinNoise(2024), 3, 60))


@pytest.mark.parametrize("stream", Stream)
def test_numbers_are_uniform(stream: Stream) -> None:
    """G-test over 64 cells; odds 1e-6. Guards dropped high bits and blocks that repeat."""
    values = uniform(PhiloxRng(3).at(5, 7), 1, stream, 2)
    assert g_test(cells(values, 64), dict.fromkeys(range(64), 1 / 64)) > 1e-6
    assert len(set(values.tolist())) > 0.999 * len(values)


BASE = {"seed": 1, "row": 2, "position": 30, "depth": 1, "index": 0, "shift": 0}
OTHERS = [
    ("seed", 2, tuple(Stream)),
    ("seed", 1 + 2**32, tuple(Stream)),
    ("row", 3, tuple(Stream)),
    ("position", 31, tuple(Stream)),
    ("depth", 2, tuple(Stream)),
    ("shift", 1, tuple(Stream)),
    ("shift", 4, tuple(Stream)),
    ("index", 1, (Stream.DRAFT, Stream.COIN, Stream.RESIDUAL)),
]


def ask(stream: Stream, **question: int) -> Tensor:
    q = {**BASE, **question}
    return uniform(PhiloxRng(q["seed"]).at(q["row"], q["position"]), q["depth"], stream, q["index"], q["shift"])


def are_independent(a: Tensor, b: Tensor) -> bool:
    """G-test of 8 x 8 cells; odds 1e-6."""
    pairs = zip(cells(a, 8), cells(b, 8), strict=True)
    return g_test(pairs, dict.fromkeys(itertools.product(range(8), repeat=2), 1 / 64)) > 1e-6


@pytest.mark.parametrize(("name", "value", "streams"), OTHERS, ids=[f"{name}={value}" for name, value, _ in OTHERS])
def test_another_question_gets_an_independent_answer(name: str, value: int, streams: tuple[Stream, ...]) -> None:
    """Guards keys that leave something out: then the same numbers would serve two purposes."""
    for stream in streams:
        assert are_independent(ask(stream), ask(stream, **{name: value}))


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(Stream, 2)), ids=lambda pair: f"{pair[0].name}-{pair[1].name}"
)
def test_streams_are_independent(pair: tuple[Stream, Stream]) -> None:
    """Guards draft noise that judges drafts; at depth 0 too, where the keys are closest."""
    assert are_independent(ask(pair[0]), ask(pair[1]))
    assert are_independent(ask(pair[0], depth=0), ask(pair[1], depth=0))


def test_the_test_of_independence_finds_the_same_numbers() -> None:
    assert not are_independent(ask(Stream.COIN), ask(Stream.COIN))


def test_the_targets_noise_depends_on_the_decided_position_alone() -> None:
    """Guards token identity: depth 2 of a step at 10 decides what depth 0 of a step at 12 does. Other streams differ."""
    early, late = PhiloxRng(4).at(1, 10), PhiloxRng(4).at(1, 12)
    assert torch.equal(early.gumbel(SAMPLE, 2), late.gumbel(SAMPLE, 0))
    for stream in (Stream.DRAFT, Stream.COIN, Stream.RESIDUAL):
        assert are_independent(uniform(early, 2, stream), uniform(late, 0, stream))


def test_a_tokens_noise_does_not_depend_on_which_other_tokens_are_asked_for() -> None:
    """Guards the dense and the sparse way to compute it: top-k must not change what a token gets."""
    rng = PhiloxRng(9).at(0, 3)
    everything = rng.gumbel(torch.arange(5000), 1)
    for tokens in ([0], [4999], [7, 8, 9], [3, 1200, 4998], [11, 10, 9, 2, 1, 0], list(range(1, 5000, 2)), []):
        assert torch.equal(rng.gumbel(torch.tensor(tokens, dtype=torch.long), 1), everything[tokens])


@pytest.mark.parametrize("stream", Stream)
def test_draws_follow_their_probabilities(stream: Stream) -> None:
    """G-test, unnormalised weights of very different size, 2500 rows; odds 1e-6. Weight 0 is never drawn."""
    weights = torch.tensor([0.0, 6.0, 0.02, 3.0, 0.0, 0.5, 1.0])
    rng = PhiloxRng(17)
    drawn = (rng.at(row, 5).draw(weights, 0, stream) for row in range(2500))
    assert g_test(drawn, dict(enumerate((weights / weights.sum()).tolist()))) > 1e-6


@pytest.mark.parametrize("prob", [0.02, 0.5, 0.9])
def test_coins_fall_as_often_as_they_should(prob: float) -> None:
    """G-test over 2000 positions; odds 1e-6."""
    coins = (PhiloxRng(23).at(0, position).bernoulli(prob, 1, 3) for position in range(2000))
    assert g_test(coins, {True: prob, False: 1 - prob}) > 1e-6


def fixed_words(monkeypatch: pytest.MonkeyPatch, *words: int) -> PhiloxRowRng:
    """Real noise whose generator gives ``words`` over and over."""

    def words_for(counter: Tensor, *_: int) -> Tensor:
        return torch.tensor([words[i % len(words)] for i in range(4)])[:, None].expand(4, len(counter))

    monkeypatch.setattr("specdec.rng.philox", words_for)
    return PhiloxRng(0).at(0, 0)


@pytest.mark.parametrize(("word", "at_half"), [(0, True), (2**31, False), (ONES, False)])
def test_a_coin_of_probability_zero_never_falls_and_of_one_always_does(
    word: int, at_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards ``<=`` for ``<``: a token of probability 0 would be accepted whenever the uniform number is 0."""
    rng = fixed_words(monkeypatch, word)
    assert not rng.bernoulli(0.0, 0)
    assert rng.bernoulli(1.0, 0)
    assert rng.bernoulli(1.5, 0)
    assert rng.bernoulli(0.5, 0) == at_half


@pytest.mark.parametrize("word", [0, ONES])
def test_uniform_numbers_are_never_zero_or_one(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards log(0): the extreme words 0 and 2**32 - 1 must give finite Gumbel noise."""
    assert fixed_words(monkeypatch, word).gumbel(torch.arange(9), 0).isfinite().all()


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize(("word", "token"), [(0, 1), (ONES, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_numbers_draw_no_token_without_mass(
    stream: Stream, word: int, token: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the ends of the inverted distribution, where rounding can lead outside."""
    drawn = fixed_words(monkeypatch, word).draw(torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=dtype), 0, stream)
    assert drawn == (token if stream is not Stream.TARGET else 3)


def test_a_draw_has_more_than_float32_to_choose_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a uniform number rounded to float32, which is 1 at 1 - 2**-30: improbable tokens then never come."""
    rng = fixed_words(monkeypatch, 2**32 - 4, 0)
    probs = torch.tensor([1 - 2.0**-30, 2.0**-31, 2.0**-31], dtype=torch.float64)
    assert rng.draw(probs, 0, Stream.DRAFT) == 1


def test_a_race_is_draws_one_after_another_without_replacement() -> None:
    """G-test of the first two of four tokens, 2500 rows; odds 1e-6. No more tokens than have any mass."""
    weights = torch.tensor([0.5, 0.0, 3.0, 1.5, 1.0])
    rng = PhiloxRng(29)
    pairs = [tuple(rng.at(row, 5).sample_without_replacement(weights, 2, 1, 3)) for row in range(2500)]
    probs = (weights / weights.sum()).tolist()
    tokens = [token for token, prob in enumerate(probs) if prob > 0]
    expected = {(a, b): probs[a] * probs[b] / (1 - probs[a]) for a, b in itertools.permutations(tokens, 2)}
    assert g_test(pairs, expected) > 1e-6
    assert sorted(rng.at(0, 5).sample_without_replacement(weights, 9, 1)) == tokens


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be in"):
        PhiloxRng(seed)


@pytest.mark.parametrize(("depth", "index"), [(4096, 0), (-1, 0), (0, 65536), (0, -1)])
def test_keys_that_would_collide_are_refused(depth: int, index: int) -> None:
    with pytest.raises(ValueError, match="depth must be below 4096"):
        PhiloxRng(0).at(0, 0).bernoulli(0.5, depth, index)


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 12345])
def test_the_generator_on_a_cpu_and_that_of_other_devices_make_the_same_words(seed: int) -> None:
    counter = torch.tensor([0, 1, 5, 12_345, 2**32 - 1, 77])
    words = (2**32 - 1, 3, 2**31)
    assert torch.equal(philox(counter, *words, seed), _philox_torch(counter, *words, seed))


def test_a_draw_from_every_token_is_that_from_a_list_of_them() -> None:
    """The whole vocabulary takes a shorter way than a support with gaps."""
    probs = torch.rand(500, generator=torch.Generator().manual_seed(0)).double()
    gapped = torch.cat([probs, torch.zeros(1, dtype=probs.dtype)])
    for position in range(50):
        rng = PhiloxRowRng(3, 1, position)
        assert rng.draw(probs, 0) == rng.draw(gapped, 0)
        some = torch.tensor([499, 3, 250])
        assert torch.equal(rng.gumbel(some, 0), rng.gumbel(torch.arange(500), 0)[some])
