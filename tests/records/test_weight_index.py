"""The index of weights in parts names files of its own folder, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from onerow import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.drafters.heads.checkpoint_io import TensorFiles
from specdec.errors import CheckpointError, ModelUnavailableError
from specdec.hub.load import load_model
from specdec.records.weight_index import weight_files

SHARD = "model-00001-of-00001.safetensors"


def write_index(folder: Path, content: Any, name: str = "model.safetensors.index.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def read_all(folder: Path) -> dict[str, Tensor]:
    files = TensorFiles(folder)
    return files.read(files.keys)


def secret(tmp_path: Path) -> Tensor:
    tensor = torch.arange(3.0)
    save_file({"a": tensor}, tmp_path / "secret.safetensors")
    return tensor


def leaving(tmp_path: Path, folder: Path, way: str) -> str:
    """A name that leads from ``folder`` to the secret file beside it."""
    (folder / "inner").mkdir(parents=True)
    if way == "link":
        (folder / SHARD).symlink_to(tmp_path / "secret.safetensors")
        return SHARD
    if way == "linked folder":
        (folder / "there").symlink_to(tmp_path)
        return "there/secret.safetensors"
    return {
        "parent": "../secret.safetensors",
        "inner": "inner/../../secret.safetensors",
        "back": f"../{folder.name}/{SHARD}",
        "absolute": str(tmp_path / "secret.safetensors"),
    }[way]


WAYS = ["parent", "inner", "back", "absolute", "link", "linked folder"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_drafter_reads_no_file_outside_its_folder(tmp_path: Path, way: str, index: str) -> None:
    """A downloaded head could have any file of the machine opened as its weights."""
    secret(tmp_path)
    name = leaving(tmp_path, tmp_path / "head", way)
    file = write_index(tmp_path / "head", {"weight_map": {"b": "whatever.safetensors", "a": name}}, index)
    with pytest.raises(CheckpointError, match="leads out of the folder") as error:
        TensorFiles(tmp_path / "head")
    assert str(file) in str(error.value)
    assert repr(name) in str(error.value)
    assert "; a is said to be in" in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1], "must hold a JSON object, got list"),
        (7, "must hold a JSON object, got int"),
        ({}, "no index of weights: .*, got None"),
        ({"metadata": {}}, "no index of weights: .*, got None"),
        ({"weight_map": {}}, "no index of weights: .*, got {}"),
        ({"weight_map": [SHARD]}, "no index of weights: .*, got \\['model"),
        ({"weight_map": SHARD}, "no index of weights: .*, got 'model"),
        ({"weight_map": {"a": 3}}, "got 3 for a"),
        ({"weight_map": {"a": None}}, "got None for a"),
        ({"weight_map": {"a": [SHARD]}}, "got \\['model.* for a"),
        ({"weight_map": {"a": ""}}, "in '', which is no file"),
        ({"weight_map": {"a": "."}}, "which is no file"),
        ({"weight_map": {"a": "x\0y"}}, "which is no path"),
        ({"weight_map": {"a": "loop"}}, "which is no path|which is not in"),
        ({"weight_map": {"a": "gone.safetensors"}}, "names gone.safetensors, which is not in"),
        ({"weight_map": {"a": "folder"}}, "names folder, which is not in"),
        ({"weight_map": {"a": SHARD, "c": SHARD}}, "holds c, which it does not"),
    ],
)
def test_an_index_that_is_none_is_an_error_that_says_why(tmp_path: Path, content: Any, complaint: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    save_file({"a": torch.ones(2)}, tmp_path / SHARD)
    write_index(tmp_path, content)
    with pytest.raises(ValueError, match=complaint):
        read_all(tmp_path)


def test_an_index_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json cannot be read as JSON"):
        TensorFiles(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        TensorFiles(tmp_path)


def test_files_of_the_folder_are_read_also_below_it_and_through_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "head" / "parts").mkdir(parents=True)
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    save_file({"a": tensors["a"]}, tmp_path / "head" / SHARD)
    save_file({"b": tensors["b"]}, tmp_path / "head" / "parts" / "two.safetensors")
    (tmp_path / "head" / "alias.safetensors").symlink_to("parts/two.safetensors")
    write_index(tmp_path / "head", {"weight_map": {"a": f"./{SHARD}", "b": "alias.safetensors"}})
    (tmp_path / "link").symlink_to("head")
    for folder in (tmp_path / "head", tmp_path / "link"):
        read = read_all(folder)
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_the_hubs_cache_may_be_all_links(tmp_path: Path) -> None:
    """There a snapshot's files are links to the blobs of the same repository; to those of another they may not be."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "17")
    (blobs / "18").write_text(json.dumps({"weight_map": {"a": SHARD}}))
    (snapshot / SHARD).symlink_to(Path("..", "..", "blobs", "17"))
    (snapshot / "model.safetensors.index.json").symlink_to(Path("..", "..", "blobs", "18"))
    assert torch.equal(TensorFiles(snapshot).read(["a"])["a"], torch.ones(2))
    other = tmp_path / "models--a--c" / "blobs"
    other.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, other / "17")
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(other / "17")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        TensorFiles(snapshot)


# ----- models, which transformers reads -----


def model_in_parts(folder: Path) -> tuple[Path, dict[str, str]]:
    """A tiny model's folder without its index, and the right weight_map."""
    make_model().save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    return folder, dict.fromkeys(load_file(folder / SHARD), SHARD)


def test_a_model_in_parts_is_loaded(tmp_path: Path) -> None:
    folder, weight_map = model_in_parts(tmp_path / "model")
    write_index(folder, {"metadata": {}, "weight_map": weight_map})
    expected = make_model().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in load_model(folder).state_dict().items())
    assert weight_files(folder / "model.safetensors.index.json").keys() == weight_map.keys()


@pytest.mark.parametrize("way", WAYS)
def test_a_model_reads_no_weights_outside_its_folder(tmp_path: Path, way: str) -> None:
    folder, weight_map = model_in_parts(tmp_path / "model")
    (folder / SHARD).rename(tmp_path / "secret.safetensors")
    name = leaving(tmp_path, folder, way) if way != "back" else f"../model/{SHARD}"
    write_index(folder, {"metadata": {}, "weight_map": dict.fromkeys(weight_map, name)})
    with pytest.raises(ModelUnavailableError, match="leads out of the folder"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "must hold a JSON object"),
        ({"metadata": {}}, "no index of weights"),
        ({"metadata": {}, "weight_map": 3}, "no index of weights"),
        ({"metadata": {}, "weight_map": {"a": 3}}, "got 3 for a"),
        ({"weight_map": {"a": SHARD}}, 'must have "metadata"'),
    ],
)
def test_a_models_index_that_is_none_is_one_sentence(tmp_path: Path, content: Any, complaint: str) -> None:
    """transformers ends in a KeyError or an AttributeError of its own."""
    folder, _ = model_in_parts(tmp_path / "model")
    write_index(folder, content)
    with pytest.raises(ModelUnavailableError, match=complaint):
        load_model(folder)


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_weights_that_a_config_names_are_in_its_folder(tmp_path: Path, way: str) -> None:
    folder, _ = model_in_parts(tmp_path / "model")
    (folder / SHARD).rename(tmp_path / "secret.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = leaving(tmp_path, folder, way)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailableError, match="leads out of the folder"):
        load_model(folder)
