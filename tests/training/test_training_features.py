"""Features on disk are what the target gives for each text alone, and every text is in every epoch once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import tiny_target
from transformers import LlamaForCausalLM

from specdec.drafters.training.batches import MIN_LENGTH, Split, padded, text_batches
from specdec.drafters.training.data import Conversation
from specdec.drafters.training.features import SHARD, TOP, FeatureStore, Text
from specdec.drafters.training.vocabulary import choose_vocabulary

LAYERS = (2, 2, 1)
VOCAB = 97


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target(vocab=VOCAB, layers=4)


def conversations(count: int, seed: int = 0, longest: int = 40) -> list[Conversation]:
    """Of any length from 1 on, and some of the same."""
    chooser = random.Random(seed)
    sizes = [1, 2, MIN_LENGTH - 1, MIN_LENGTH, *(chooser.randint(1, longest) for _ in range(count - 4))]
    return [Conversation(i, tuple(chooser.randrange(VOCAB) for _ in range(n)), 1) for i, n in enumerate(sizes)]


TEXTS = conversations(3 * SHARD)


@pytest.fixture(scope="module")
def store(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("features"), LAYERS)
    assert list(store.build(model, TEXTS, batch_tokens=200)) == [
        sum(len(text.tokens) for text in TEXTS[first : first + SHARD]) for first in range(0, len(TEXTS), SHARD)
    ]
    assert len(store) == 3
    return store


@torch.no_grad()
def agrees(model: LlamaForCausalLM, text: Text, tokens: Sequence[int]) -> bool:
    """Whether ``text`` is what a pass over ``tokens`` alone gives, up to the rounding of storage."""
    result = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    logprobs = result.logits[0].log_softmax(-1)
    best = logprobs.topk(min(TOP, VOCAB))
    features = torch.cat([result.hidden_states[i][0] for i in LAYERS], -1)

    def near(stored: Tensor, true: Tensor, bits: int) -> bool:
        return stored.shape == true.shape and bool(torch.allclose(stored.float(), true, rtol=2.0**-bits, atol=1e-5))

    return (
        text.tokens.tolist() == list(tokens)
        and near(text.hidden, result.hidden_states[-1][0], 8)  # bfloat16 keeps 8 bits, float16 11
        and near(text.features, features, 8)
        and near(text.top_logprobs, best.values, 11)
        and near(text.top_logprobs, logprobs.gather(-1, text.top_ids), 10)  # near ties may change places
        and bool((text.top_ids[:, 0] == best.indices[:, 0]).all())
    )


def test_a_shard_holds_what_each_text_gives_alone(model: LlamaForCausalLM, store: FeatureStore) -> None:
    """Guards against padding that is seen, and texts that change places when they are sorted by length."""
    for shard in range(3):
        texts = store.read(shard)
        assert store.sizes(shard) == [len(text.tokens) for text in texts]
        for text, conversation in zip(texts, TEXTS[shard * SHARD :], strict=False):
            assert agrees(model, text, conversation.tokens)


class LeftPadded(FeatureStore):
    """The mutant: texts stand at the right, without a mask."""

    def _forward(self, model: Any, texts: Sequence[list[int]]) -> Iterator[tuple[Tensor, ...]]:
        width = max(map(len, texts))
        whole = super()._forward(model, [[0] * (width - len(text)) + text for text in texts])
        for text, columns in zip(texts, whole, strict=True):
            yield tuple(column[width - len(text) :] for column in columns)


class Unsorted(FeatureStore):
    """The mutant: results are handed out in the wrong order."""

    def _forward(self, model: Any, texts: Sequence[list[int]]) -> Iterator[tuple[Tensor, ...]]:
        yield from reversed(list(super()._forward(model, texts)))


@pytest.mark.parametrize("mutant", [LeftPadded, Unsorted])
def test_that_check_finds_a_mutant(model: LlamaForCausalLM, tmp_path: Path, mutant: type[FeatureStore]) -> None:
    alike = [Conversation(0, tuple(range(i, i + 9 + i % 2)), 1) for i in range(SHARD)]
    for kind, most, least in ((mutant, SHARD // 2 + 1, 0), (FeatureStore, SHARD, SHARD)):
        store = kind(tmp_path / kind.__name__, LAYERS)
        list(store.build(model, alike))
        good = [agrees(model, text, c.tokens) for text, c in zip(store.read(0), alike, strict=True)]
        assert least <= sum(good) <= most


def test_long_texts_are_cut(model: LlamaForCausalLM, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, LAYERS, max_length=10)
    list(store.build(model, TEXTS[:SHARD]))
    for text, conversation in zip(store.read(0), TEXTS, strict=False):
        assert agrees(model, text, conversation.tokens[:10])


def test_without_layers_there_are_no_features(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Targets of two layers have none to offer."""
    store = FeatureStore(tmp_path, ())
    list(store.build(model, TEXTS[:SHARD]))
    assert store.read(0)[5].features.shape == (len(TEXTS[5].tokens), 0)


# ----- what is there is kept -----


def files(store: FeatureStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.path.iterdir())}


def test_a_store_grows_and_its_shards_are_kept(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The rest that fills no shard waits for more text."""
    store = FeatureStore(tmp_path, LAYERS)
    list(store.build(model, TEXTS[: SHARD + 7]))
    assert len(store) == 1
    before, stamp = files(store), (tmp_path / "00000.safetensors").stat().st_mtime_ns
    list(store.build(model, TEXTS[: 2 * SHARD]))
    assert len(store) == 2
    assert (tmp_path / "00000.safetensors").stat().st_mtime_ns == stamp
    after = files(store)
    assert all(after[name] == content for name, content in before.items())


def test_a_shard_of_other_text_is_made_anew(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Guards against features of a text that was deleted and written again."""
    store = FeatureStore(tmp_path, LAYERS)
    list(store.build(model, TEXTS[:SHARD]))
    others = conversations(SHARD, seed=1)
    list(store.build(model, others))
    assert all(agrees(model, text, c.tokens) for text, c in zip(store.read(0), others, strict=True))


def test_a_store_that_was_stopped_has_whole_shards_only(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path, LAYERS)
    with monkeypatch.context() as patch:
        patch.setattr("specdec.drafters.training.features.save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            list(store.build(model, TEXTS[:SHARD]))
    assert len(store) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.json"]
    list(store.build(model, TEXTS[:SHARD]))
    assert len(store) == 1


def half_written(_: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (FeatureStore(Path(), (1, 2, 3)), r"layers \[2, 2, 1\], not \[1, 2, 3\]"),
        (FeatureStore(Path(), LAYERS, max_length=9), "max_length 1024, not 9"),
    ],
    ids=["layers", "length"],
)
def test_features_of_another_kind_are_refused(
    model: LlamaForCausalLM, store: FeatureStore, other: FeatureStore, fault: str
) -> None:
    other.path = store.path
    before = files(store)
    with pytest.raises(ValueError, match=rf"{fault}.*name another folder"):
        next(other.build(model, TEXTS))
    assert files(store) == before


@pytest.mark.parametrize("changes", [{"vocab": VOCAB + 1}, {"size": 16}, {"layers": 5}], ids=str)
def test_features_of_another_model_are_refused(store: FeatureStore, changes: dict[str, int]) -> None:
    other = tiny_target(**{"vocab": VOCAB, "layers": 4, **changes})
    with pytest.raises(ValueError, match="holds other features"):
        next(store.build(other, TEXTS))


def test_other_weights_of_the_same_sizes_are_refused_and_another_precision_is_not(
    model: LlamaForCausalLM, store: FeatureStore
) -> None:
    assert next(store.build(tiny_target(vocab=VOCAB, layers=4, dtype=torch.bfloat16), TEXTS)) > 0
    other = tiny_target(vocab=VOCAB, layers=4)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="other weights"):
        next(store.build(other, TEXTS))


def test_a_folder_without_a_fingerprint_is_taken_at_its_sizes(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The first folders had none."""
    store = FeatureStore(tmp_path, LAYERS)
    list(store.build(model, TEXTS[:SHARD]))
    file = tmp_path / "features.json"
    facts = json.loads(file.read_text())
    del facts["fingerprint"]
    file.write_text(json.dumps(facts))
    list(store.build(model, TEXTS[: 2 * SHARD]))
    assert len(store) == 2


DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no hidden states": lambda tensors: tensors.pop("hidden"),
    "a token less": lambda tensors: tensors.update(tokens=tensors["tokens"][1:]),
    "a state more": lambda tensors: tensors.update(hidden=torch.cat([tensors["hidden"], tensors["hidden"][:1]])),
}


@pytest.mark.parametrize("damage", ["half", "empty", *DAMAGE])
def test_a_damaged_shard_is_named_and_made_again_once_deleted(
    model: LlamaForCausalLM, tmp_path: Path, damage: str
) -> None:
    store = FeatureStore(tmp_path, LAYERS)
    list(store.build(model, TEXTS[:SHARD]))
    file = tmp_path / "00000.safetensors"
    whole = file.read_bytes()
    if damage in DAMAGE:
        tensors = load_file(file)
        DAMAGE[damage](tensors)
        save_file(tensors, file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "half" else b"")
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged \(.*\); delete it, and it is made again"):
        store.read(0)
    file.unlink()
    list(store.build(model, TEXTS[:SHARD]))
    assert file.read_bytes() == whole


def test_conversations_of_another_vocabulary_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    foreign = Conversation(7, (3, VOCAB), 1)
    with pytest.raises(ValueError, match=rf"conversation 7 holds token ids that the model \({VOCAB}\) has not"):
        next(FeatureStore(tmp_path, LAYERS).build(model, [*TEXTS[:SHARD], foreign]))


# ----- batches -----


@pytest.mark.parametrize(
    ("num_shards", "share", "train", "held_out"),
    [(2, 0.04, 1, 1), (10, 0.04, 9, 1), (100, 0.04, 96, 4), (4, 0.5, 2, 2), (37, 0.04, 36, 1)],
)
def test_the_last_shards_are_held_out(num_shards: int, share: float, train: int, held_out: int) -> None:
    split = Split.of(num_shards, share)
    assert split.train == tuple(range(train))
    assert split.held_out == tuple(range(train, train + held_out))


@pytest.mark.parametrize("num_shards", [0, 1])
def test_nothing_can_be_held_out_of_one_shard(num_shards: int) -> None:
    with pytest.raises(ValueError, match=f"two shards of data.*got {num_shards}"):
        Split.of(num_shards)


Epoch = list[list[tuple[int, ...]]]


def epoch(store: FeatureStore, number: int, seed: int | None = 3, start: int = 0) -> Epoch:
    """The texts of each batch, without padding."""
    batches = text_batches(store, (0, 1, 2), 100, seed).start_at(number, start)
    return [
        [tuple(row[:length].tolist()) for row, length in zip(batch["tokens"], batch["lengths"], strict=True)]
        for batch in batches
    ]


def test_an_epoch_has_every_text_that_is_long_enough_once(store: FeatureStore) -> None:
    expected = sorted(text.tokens for text in TEXTS if len(text.tokens) >= MIN_LENGTH)
    assert len(expected) < len(TEXTS)
    for number in (0, 1):
        assert sorted(text for batch in epoch(store, number) for text in batch) == expected
    assert text_batches(store, (0, 1, 2), 100, 3).num_batches == len(epoch(store, 0))


def test_batches_keep_to_their_size_unless_one_text_is_larger(store: FeatureStore) -> None:
    for batch in text_batches(store, (0, 1, 2), 30, 3).epoch(0):
        rows, width = batch["tokens"].shape
        assert rows * width <= 30 or rows == 1
        assert width == batch["lengths"].max()


def test_the_same_epoch_has_the_same_batches_and_another_has_another_order(store: FeatureStore) -> None:
    assert epoch(store, 0) == epoch(store, 0)
    assert epoch(store, 0) != epoch(store, 1)
    assert epoch(store, 0) != epoch(store, 0, seed=4)
    assert epoch(store, 0, None) == epoch(store, 1, None)


@pytest.mark.parametrize("start", [0, 1, 7, 10_000])
def test_starting_late_skips_exactly_so_many(store: FeatureStore, start: int) -> None:
    """Guards against a resumed run that learns from some batches twice, and never from others."""
    assert epoch(store, 1, start=start) == epoch(store, 1)[start:]


def test_padding_stands_at_the_right_of_every_tensor(store: FeatureStore) -> None:
    texts = store.read(0)[4:9]
    batch = padded(texts)
    assert batch["lengths"].tolist() == [len(text.tokens) for text in texts]
    for row, text in enumerate(texts):
        n = len(text.tokens)
        for name in ("tokens", "hidden", "features", "top_ids", "top_logprobs"):
            assert torch.equal(batch[name][row, :n], getattr(text, name))
            assert not batch[name][row, n:].any()


# ----- draft vocabulary -----


def test_the_vocabulary_is_the_ids_that_the_target_uses_most(store: FeatureStore) -> None:
    mass = torch.zeros(VOCAB, dtype=torch.float64)
    for shard in (0, 1):
        for text in store.read(shard):
            for ids, logprobs in zip(text.top_ids.tolist(), text.top_logprobs.double().exp().tolist(), strict=True):
                for token, prob in zip(ids, logprobs, strict=True):
                    mass[token] += prob
    chosen = choose_vocabulary(store, (0, 1), (2,), VOCAB, 20)
    assert chosen.ids.tolist() == sorted(mass.topk(20).indices.tolist())
    best = [token for text in store.read(2) for token in text.top_ids[:, 0].tolist()]
    assert chosen.coverage == pytest.approx(sum(token in chosen.ids.tolist() for token in best) / len(best))
    assert 0 < chosen.coverage < 1
    assert choose_vocabulary(store, (0,), (2,), VOCAB, VOCAB).coverage == 1


@pytest.mark.parametrize("size", [0, VOCAB + 1])
def test_a_vocabulary_of_impossible_size_is_refused(store: FeatureStore, size: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to {VOCAB} .* got {size}"):
        choose_vocabulary(store, (0,), (1,), VOCAB, size)
