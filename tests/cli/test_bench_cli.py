"""``specdec bench`` as a command: files, exit statuses, table."""

from __future__ import annotations

import json
import os
import stat
import sys
import types

import pytest
import tinychat
from tinychat import QUESTIONS

from specdec.drafters import DRAFTERS
from specdec.drafters.ngram import NgramDrafter
from specdec.interfaces import Verdict
from specdec.records.files import check_writable, write_file, write_json
from specdec.records.trace import read_trace
from specdec.verifiers import VERIFIERS
from specdec.verifiers.match import MatchVerifier


@pytest.fixture
def specdec_command(monkeypatch, capsys):
    return tinychat.Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.fixture
def bench(specdec_command, target, tmp_path):
    """Run ``specdec bench`` on the tiny model with two short prompts."""
    prompts = tinychat.write_prompts(tmp_path / "p.jsonl", QUESTIONS[1:3])

    def run(*options):
        common = ("--target", target, "--prompts", prompts, "--max-new-tokens", "8", "--threads", "1", "--fixed")
        return specdec_command("bench", *common, *options)

    return run


class Corrupting(MatchVerifier):
    """Wrong on purpose: emits another token than the target's wherever something was drafted."""

    name = "corrupting"
    lossless = True
    chain_only = False
    draws = MatchVerifier().draws

    def verify(self, tree, target, rng):
        verdict = MatchVerifier.verify(self, tree, target, rng)
        if len(tree) == 1:
            return verdict
        return Verdict(verdict.nodes, (*verdict.tokens[:-1], (verdict.tokens[-1] + 1) % 200))


def test_a_bench_prints_a_table_and_writes_everything(bench, tmp_path):
    output, trace = tmp_path / "b.json", tmp_path / "t.jsonl"
    ran = bench("--output", str(output), "--trace", str(trace), "--drafter", "ngram", "--drafter", "ngram:max_order=2")
    assert ran.status == 0
    for word in ("hf-generate", "hf-prompt-lookup", "plain", "ngram:max_order=2", "1 (baseline)", "2/2"):
        assert word in ran.out
    assert "as fast as Hugging Face generate() on this machine, with identical tokens (2 of 2)." in ran.out
    assert "runs" in ran.err, "progress goes to standard error"
    written = json.loads(output.read_text())
    assert written["partial"] is False
    assert written["provenance"]["command"].startswith("specdec bench --target")
    assert list(read_trace(trace))[-1]["type"] == "end"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.json", "p.jsonl", "t.jsonl"], "no leftovers"


def test_tokens_that_differ_for_no_reason_fail_the_bench(bench, monkeypatch, tmp_path):
    """No speed without a match check."""
    monkeypatch.setitem(VERIFIERS, "corrupting", Corrupting)
    ran = bench("--verifier", "corrupting", "--output", str(tmp_path / "b.json"))
    assert ran.status == 1
    assert "WRONG" in ran.out
    assert "do not trust the speed" in ran.out
    assert "UNEXPLAINED" in ran.out
    *_, row = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert row["match"]["unexplained"] >= 1
    assert row["match"]["identical"] + row["match"]["unexplained"] == row["match"]["total"] == 2


def test_sampling_says_what_was_compared(bench):
    ran = bench("--temperature", "1")
    assert ran.status == 0
    assert "(sampled)" in ran.out
    assert "identical to our own plain decoding with the same seed" in ran.out


def test_what_cannot_be_measured_is_said(bench):
    ran = bench("--batch-size", "2")
    assert "hf-prompt-lookup was not measured: transformers supports it at batch size 1 only." in ran.out
    assert "in a single measurement, which says little" in ran.out


def test_ctrl_c_writes_what_was_measured(bench, monkeypatch, tmp_path):
    class Interrupting(NgramDrafter):
        def propose(self, rows, limits, params, rng):
            if rows[0].key == 1:
                raise KeyboardInterrupt
            return super().propose(rows, limits, params, rng)

    module = types.ModuleType("interrupting")
    module.build = lambda _context: Interrupting()
    monkeypatch.setitem(sys.modules, "interrupting", module)
    monkeypatch.setitem(DRAFTERS, "interrupting", "interrupting")
    ran = bench("--drafter", "interrupting", "--output", str(tmp_path / "b.json"))
    assert ran.status == 130
    assert "Interrupted: only the 1 prompts" in ran.out
    assert "Traceback" not in ran.err
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["partial"] is True
    assert {row["num_prompts"] for row in written["rows"]} == {1}


def test_json_replaces_the_old_file_in_one_go(tmp_path):
    """A reader of the old file, or of a run that dies while writing, never sees half a file."""
    path = tmp_path / "b.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"speedup": float("nan")})
    assert path.read_text() == "old"
    old = path.stat().st_ino
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_ino != old
    assert [file.name for file in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "b.json"
    path.write_text("old")
    path.chmod(mode)
    seen = []
    write_file(path, lambda made: (seen.append(stat.S_IMODE(made.stat().st_mode)), made.write_text("new")))
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen == [0o600]  # nobody reads over our shoulder either


@pytest.mark.parametrize(
    ("mode", "mask", "expected"), [(0o666, 0o022, 0o644), (0o666, 0o077, 0o600), (0o600, 0, 0o600)]
)
def test_a_new_file_gets_what_the_umask_leaves(tmp_path, monkeypatch, mode, mask, expected):
    """The umask belongs to the process: set to 0 only to read it, files that other threads made meanwhile were open to all."""
    before = os.umask(mask)
    try:
        monkeypatch.setattr(os, "umask", None)
        write_file(tmp_path / "new", lambda made: made.write_text("x"), mode)
        # A writer that makes the file anew, as some libraries do, gives it no other permissions.
        write_file(tmp_path / "again", lambda made: (made.unlink(), made.write_text("x"), made.chmod(0o777)), mode)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "again")] == [expected] * 2


def test_behind_a_link_the_target_is_replaced_in_one_go(tmp_path):
    """Through a link the file was written in place: a reader saw half of it, and a run that died left half of it."""
    (tmp_path / "there").mkdir()
    real, link, between = tmp_path / "there" / "real.json", tmp_path / "link.json", tmp_path / "between.json"
    between.symlink_to(os.path.join("there", "real.json"))
    link.symlink_to("between.json")
    real.write_text("old")
    inode = real.stat().st_ino
    with pytest.raises(RuntimeError, match="died"):
        write_file(link, lambda made: (made.write_text("half"), _die()))
    assert real.read_text() == "old"
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert between.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}
    assert real.stat().st_ino != inode
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["between.json", "link.json", "real.json", "there"]


def _die() -> None:
    raise RuntimeError("died")


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    """Renaming a file over /dev/null as root would break the machine."""
    pipe = tmp_path / "pipe"
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe, "--output")
    write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_checking_a_path_changes_nothing(tmp_path):
    old = tmp_path / "old.json"
    old.write_text("kept")
    check_writable(old, "--output")
    check_writable(tmp_path / "new.json", "--output")
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "kept"
