"""Provenance says where a result comes from and nothing of whose machine it is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import specdec.records.provenance
from specdec.records.provenance import collect, project_commit, versions, without_home


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home-of-alice"))
    return str(tmp_path / "home-of-alice")


def test_paths_below_the_home_directory_begin_with_a_tilde(home):
    assert without_home(f"{home}/x --output={home}/y.json {home}") == "~/x --output=~/y.json ~"
    assert without_home(f"{home}-backup/x") == f"{home}-backup/x", "another directory"
    assert without_home(f"/mnt{home}/x") == f"/mnt{home}/x", "another directory"


def test_nothing_in_a_provenance_names_the_home_directory(home):
    found = collect(
        ["specdec", "bench", "--target", f"{home}/model"],
        dtype="float32",
        device="cpu",
        models={"target": {"id": f"{home}/model"}},
        settings={"trace": Path(home) / "t.jsonl", "drafters": [f"x:path={home}/a"]},
    )
    assert "alice" not in json.dumps(found)
    assert found["models"]["target"]["id"] == "~/model"
    assert found["settings"] == {"trace": "~/t.jsonl", "drafters": ["x:path=~/a"]}
    assert found["threads"] >= 1
    assert found["machine"]["cpu"]
    assert found["date"].endswith("Z")


def test_versions_name_what_decides_speed():
    assert {"specdec", "python", "torch", "transformers", "numpy"} <= set(versions())


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_our_own_checkout(monkeypatch, tmp_path):
    """Installed inside somebody else's checkout, their commit must not pass for ours."""
    package = tmp_path / "specdec"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(specdec.records.provenance, "__file__", str(package / "records" / "provenance.py"))
    assert project_commit() == (None, None), "no checkout"
    git(tmp_path, "init", "-q")
    (tmp_path / "theirs").write_text("")
    git(tmp_path, "add", "theirs")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x")
    assert project_commit() == (None, None), "a checkout that does not hold the package"
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x")
    commit, is_dirty = project_commit()
    assert (len(commit), is_dirty) == (40, False)
    (package / "__init__.py").write_text("changed")
    assert project_commit() == (commit, True)
