"""Draft models made of some of a target's layers: they load, generate and draft, and they learn."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import eagle_config, random_eagle, random_feature_cell, tiny_target
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from zoo import FAMILIES, VOCAB

import specdec
from specdec.drafters.heads.checkpoint_io import save_tensors
from specdec.drafters.heads.eagle_format import load_eagle, save_eagle
from specdec.drafters.heads.medusa_heads import load_medusa
from specdec.drafters.training.data import Conversation
from specdec.drafters.training.draft import DraftTraining, pruned, train_draft
from specdec.drafters.training.eagle import embedding_table, train_eagle
from specdec.drafters.training.features import SHARD, FeatureStore
from specdec.drafters.training.job import Job
from specdec.drafters.training.medusa import train_medusa
from specdec.drafters.training.recipes import DraftRecipe, EagleRecipe, MedusaRecipe, TableRecipe, TrainSettings
from specdec.engine.hidden_states import decoder_layers
from specdec.errors import CheckpointError

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])  # longer than the windows of 8


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize(
    ("num_layers", "kept"), [(1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (8, [0, 1, 2, 3, 5, 6, 7, 8])]
)
def test_layers_are_kept_evenly_with_the_first_and_the_last(num_layers: int, kept: list[int]) -> None:
    model = tiny_target(layers=9)
    small = pruned(model, num_layers)
    assert small.config.num_hidden_layers == num_layers
    assert len(decoder_layers(small)) == num_layers
    for layer, i in zip(decoder_layers(small), kept, strict=True):
        theirs = decoder_layers(model)[i].state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("num_layers", [0, 5, 6])
def test_a_draft_model_must_be_smaller(num_layers: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to 4 layers \(fewer than the target's\), got {num_layers}"):
        pruned(tiny_target(layers=5), num_layers)


def rebuilt(model: Any, kept: list[int]) -> torch.Tensor:
    """Logits of the target with all but ``kept`` of its layers skipped: what pruning stands for."""
    hooks = [
        layer.register_forward_hook(lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0])
        for i, layer in enumerate(decoder_layers(model))
        if i not in kept
    ]
    try:
        return logits(model)
    finally:
        for hook in hooks:
            hook.remove()


# Windows and rotary embeddings that change from layer to layer must stay with their layers.
KINDS = ["llama", "gpt2", "gemma2", "gemma3", "qwen3-window", "smollm3", "gpt_oss"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_layers", [2, 3])
def test_pruning_is_skipping_layers_also_after_it_was_saved(tmp_path: Path, name: str, num_layers: int) -> None:
    """With 4 layers 0 and 3, or 0, 2 and 3 stay: their kinds no longer alternate."""
    model = FAMILIES[name].build()
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    small = pruned(model, num_layers)
    kept = {2: [0, 3], 3: [0, 2, 3]}[num_layers]
    torch.testing.assert_close(logits(small), rebuilt(model, kept), rtol=1e-5, atol=1e-5)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=FAMILIES[name].attention
    )
    loaded.set_experts_implementation("eager")  # the default has no float64
    torch.testing.assert_close(logits(loaded), logits(small), rtol=1e-5, atol=1e-5)
    new = small.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert new.shape == (1, IDS.shape[1] + 4)  # so its cache has a place for each layer
    assert torch.equal(logits(model), before)  # the target is as it was
    assert model.config.num_hidden_layers == len(decoder_layers(model)) == 4
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-window"])
def test_a_pruned_model_drafts_for_its_target(name: str) -> None:
    model = FAMILIES[name].build()
    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    output = specdec.generate(
        model, IDS, max_new_tokens=12, drafter="model:shape=best-first", draft_model=pruned(model, 3), adaptive=False
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_eagle_learns_on_the_embeddings_that_it_will_read(name: str) -> None:
    """Some families scale their embedding's weights in the layer itself."""
    model = FAMILIES[name].build()
    layer = model.get_input_embeddings()
    with torch.no_grad():
        expected = layer(torch.arange(VOCAB)).float()
    assert torch.equal(embedding_table(model), expected)
    assert torch.equal(expected, layer.weight.float()) == (name == "llama")


# ----- learning -----


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_target(vocab=VOCAB, layers=5)


@pytest.fixture(scope="module")
def store(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Text that the target wrote greedily, which is easy to learn."""
    torch.manual_seed(0)
    starts = torch.randint(3, VOCAB, (2 * SHARD, 2))
    texts = model.generate(starts, max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None)
    store = FeatureStore(tmp_path_factory.mktemp("features"), (2, 2, 2))
    list(store.build(model, [Conversation(i, tuple(text), 2) for i, text in enumerate(texts.tolist())]))
    return store


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "medusa": (train_medusa, MedusaRecipe, {"draft_vocab": 64, "heads": 2}),
    "eagle": (train_eagle, EagleRecipe, {"draft_vocab": 64}),
    "draft": (train_draft, DraftRecipe, {"layers": 2}),
}


def train(model: Any, store: FeatureStore, folder: Path, kind: str, epochs: float = 12, **changes: Any) -> Any:
    """The facts of a run."""
    function, recipe, options = KINDS[kind]
    settings = TrainSettings(epochs=epochs, learning_rate=3e-3, batch_tokens=128, precision="no", report_every_s=1e-9)
    job = Job(model, store, folder, lambda _: None)
    return job.run(function, recipe(settings=settings, **{**options, **changes}))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("medusa", {}), ("medusa", {"own_output": True}), ("eagle", {}), ("eagle", {"own_output": True}), ("draft", {})],
    ids=lambda value: value if isinstance(value, str) else "own" if value else "shared",
)
def test_the_held_out_loss_falls(
    model: LlamaForCausalLM, store: FeatureStore, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    early = train(model, store, tmp_path / "early", kind, epochs=0.01, **changes)
    late = train(model, store, tmp_path / "late", kind, **changes)
    assert late["loss"] < 0.95 * early["loss"]
    on = train(model, store, tmp_path / "on", kind, epochs=0.01, start_from=str(tmp_path / "late"), **changes)
    assert on["loss"] < 1.02 * late["loss"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_the_draft_models_layers_learn(model: LlamaForCausalLM) -> None:
    """Embedding and output matrix are most of a small model's weights, and right as they are."""
    names = {name for name, p in DraftTraining(pruned(model, 2)).named_parameters() if not p.requires_grad}
    assert names == {"model.model.embed_tokens.weight", "model.lm_head.weight"}


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (MedusaRecipe, {"heads": 0}, "heads must be at least 1, got 0"),
        (EagleRecipe, {"steps": 0}, "steps must be at least 1, got 0"),
        (DraftRecipe, {"layers": 0}, "layers must be at least 1, got 0"),
        (TableRecipe, {"contexts": 0}, "contexts must be at least 1, got 0"),
        (TrainSettings, {"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        (EagleRecipe, {"draft_vocab": -1}, "draft_vocab must be at least 0, got -1"),
    ],
)
def test_bad_recipes_are_named(recipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_a_run_keeps_its_draft_vocabulary_when_text_is_added(
    model: LlamaForCausalLM, store: FeatureStore, tmp_path: Path, kind: str
) -> None:
    """Guards against trained rows of an output matrix that stand for other tokens after a resume."""
    own = {"own_output": True, "draft_vocab": 20}
    grown = FeatureStore(Path(shutil.copytree(store.path, tmp_path / "features")), store.layers)
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    train(model, grown, first, kind, epochs=0.1, **own)
    shutil.copytree(first, second)
    ids = range(VOCAB - 40, VOCAB)
    other = [Conversation(i, tuple(random.Random(i).choices(ids, k=20)), 2) for i in range(3 * SHARD)]
    assert list(grown.build(model, other))[2:]
    train(model, grown, second, kind, epochs=0.2, **own)
    train(model, grown, third, kind, epochs=0.2, **own)
    drafted = [drafted_ids(folder, kind, model) for folder in (first, second, third)]
    assert drafted[0] == drafted[1] != drafted[2]
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train(model, grown, second, kind, **own | {"draft_vocab": 21})
    train(model, grown, second, kind, epochs=0.3, **own)
    assert drafted_ids(second, kind, model) == drafted[0]


def test_going_on_from_a_drafter_keeps_its_sizes_and_its_vocabulary(
    model: LlamaForCausalLM, store: FeatureStore, tmp_path: Path
) -> None:
    """Other options are for new drafters: three heads stay three."""
    train(model, store, tmp_path / "first", "medusa", epochs=0.01, heads=3, draft_vocab=30)
    start = str(tmp_path / "first")
    train(model, store, tmp_path / "second", "medusa", epochs=0.01, heads=1, draft_vocab=50, start_from=start)
    assert drafted_ids(tmp_path / "second", "medusa", model) == drafted_ids(tmp_path / "first", "medusa", model)
    assert load_medusa(tmp_path / "second", model.config.hidden_size, VOCAB).num_heads == 3


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("owns", [True, False])
def test_a_drafter_of_another_form_is_no_start(
    model: LlamaForCausalLM, store: FeatureStore, tmp_path: Path, kind: str, owns: bool
) -> None:
    train(model, store, tmp_path / "first", kind, epochs=0.01, own_output=owns)
    with pytest.raises(CheckpointError, match="has its own: --own-output" if owns else "leave --own-output out"):
        train(model, store, tmp_path / "second", kind, own_output=not owns, start_from=str(tmp_path / "first"))


def test_an_older_eagle_head_and_another_vocabulary_are_no_start(
    model: LlamaForCausalLM, store: FeatureStore, tmp_path: Path
) -> None:
    config = {**eagle_config(model).to_dict(), "architectures": ["LlamaForCausalLM"]}
    save_tensors(random_feature_cell(model).state_dict(), config, tmp_path / "older")
    with pytest.raises(CheckpointError, match="only EAGLE-3 heads are trained"):
        train(model, store, tmp_path / "a", "eagle", start_from=str(tmp_path / "older"))
    pruned(tiny_target(vocab=61, layers=3), 2).save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match="61 token ids"):
        train(model, store, tmp_path / "b", "draft", start_from=str(tmp_path / "small"))


def test_a_head_that_reads_other_layers_is_no_start(
    model: LlamaForCausalLM, store: FeatureStore, tmp_path: Path
) -> None:
    """Guards training on features that the head was not made for."""
    save_eagle(random_eagle(model, feature_layers=(0, 1, 2)), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"reads hidden_states\[0, 1, 2\] .* not trained further"):
        train(model, store, tmp_path / "a", "eagle", start_from=str(tmp_path / "other"), own_output=True)


def drafted_ids(folder: Path, kind: str, model: LlamaForCausalLM) -> list[int]:
    load = load_medusa if kind == "medusa" else load_eagle
    return load(folder, model.config.hidden_size, VOCAB).target_ids().tolist()
