"""``generate --explain`` and ``--live``: every step's tree as it was verified, and the same text."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import tinychat
import torch
from rich.console import Console
from transformers import RepetitionPenaltyLogitsProcessor

import specdec
from specdec.cli.details import details, token_texts
from specdec.cli.explain import LiveView, Texts, step_tree
from specdec.cli.loading import eos_ids, load
from specdec.cli.options import Engine
from specdec.decode import Decoder, Emission
from specdec.distributions import WarperTransform
from specdec.drafters import make_drafter
from specdec.interfaces import DraftContext, Row
from specdec.rng import PhiloxRng
from specdec.sampling import SamplingParams
from specdec.verifiers import make_verifier


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tinychat.save(tmp_path_factory.mktemp("target"))


@pytest.fixture
def specdec_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return tinychat.Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def run(target: str) -> tuple[list[Emission], Any]:
    """Some steps of a tree drafter on a tiny model."""
    loaded = load(target, (), Engine(dtype="float32", device="cpu", accelerate=False))
    rule = make_verifier("match")
    drafter = make_drafter("hybrid", DraftContext(loaded.target, rule, ()))
    logits_transform = WarperTransform(SamplingParams(0.0))
    ends = eos_ids(loaded.model)
    decoder = Decoder(loaded.target, drafter, rule, logits_transform, PhiloxRng(0), lambda row: row.tokens[-1] in ends)
    ids = list(loaded.tokenizer("abc abc abc abc")["input_ids"])
    return list(decoder.run([Row(0, ids, len(ids) + 30)])), loaded


def test_details_are_the_models_own_probabilities(run: tuple[list[Emission], Any]) -> None:
    """Against one plain forward for each node: no cache, no mask, no tree."""
    emissions, loaded = run
    history = list(emissions[0].row.tokens[: emissions[0].row.num_prompt])
    assert any(len(each.tree) > 2 for each in emissions)
    for emission in emissions:
        seen, tree, step = details(emission), emission.tree, emission.step

        def plain(node: int, history: list[int] = history, tree: Any = tree) -> torch.Tensor:
            with torch.inference_mode():
                ids = torch.tensor([[*history, *tree.path_tokens(node)]])
                return loaded.model(ids).logits[0, -1].double().softmax(-1)

        for node, parent in enumerate(tree.parents[1:], 1):
            assert seen.node_probs[node] == pytest.approx(float(plain(parent)[tree.tokens[node]]), abs=1e-5)
        for i, node in enumerate(step.nodes):
            probs = plain(node)
            assert seen.token_probs[i] == pytest.approx(float(probs[step.tokens[i]]), abs=1e-5)
            entropy = float(-(probs * probs.clamp_min(1e-30).log()).sum())
            assert seen.entropies[i] == pytest.approx(entropy, abs=1e-4)
        history += step.tokens


def test_the_shown_tree_is_the_steps_tree(run: tuple[list[Emission], Any]) -> None:
    emissions, loaded = run
    texts = Texts(loaded.tokenizer)
    for emission in emissions:
        console = Console(file=io.StringIO(), width=160, color_system=None)
        console.print(step_tree(emission, details(emission), texts))
        said = console.file.getvalue()  # type: ignore[attr-defined]
        step = emission.step
        assert said.count("✓ ") == step.num_accepted
        assert said.count("✗ ") == step.num_drafted - step.num_accepted
        kept = [line.split("✓ ")[1].split("  ")[0] for line in said.splitlines() if "✓ " in line]
        assert kept == [texts.quoted(token) for token in step.tokens[: step.num_accepted]]
        assert f"+ {texts.quoted(step.tokens[-1])}" in said


def test_explain_prints_every_step_and_the_same_text(specdec_command: Any, target: str) -> None:
    words = ["generate", "abc abc", "--target", target, "--max-new-tokens", "20", "--drafter", "hybrid"]
    plain, explained = specdec_command(*words), specdec_command(*words, "--explain")
    assert explained.out.endswith(f"\n{plain.out}")
    passes = re.search(r"in (\d+) passes", explained.err)
    assert passes
    shown = len(re.findall(r"^step \d+,", explained.out, re.MULTILINE))
    assert shown == int(passes[1]) == explained.out.count("the target's own")


def test_the_live_view_shows_the_tree_and_leaves_the_text(run: tuple[list[Emission], Any]) -> None:
    emissions, loaded = run
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=70, height=20, color_system="standard", highlight=False)
    view = LiveView(loaded.tokenizer, console)
    for emission in emissions:
        view.show(emission)
    drawn = out.getvalue()
    view.end()
    assert f"{sum(len(each.step.tokens) for each in emissions)} tokens in {len(emissions)} passes" in drawn
    assert "\x1b[32m" in drawn  # accepted ones in green
    answer = loaded.tokenizer.decode(
        [token for each in emissions for token in each.step.tokens], skip_special_tokens=True
    )
    left = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()[len(drawn) :]).replace("\n", "").replace("\r", "")
    assert answer.replace("\n", "") in left


@pytest.mark.parametrize(("options", "complaint"), [(["--live"], "needs a terminal"), (["--live", "--explain"], "choose one")])  # fmt: skip
def test_views_that_cannot_be_shown_are_refused(
    specdec_command: Any, target: str, options: list[str], complaint: str
) -> None:
    ran = specdec_command("generate", "abc", "--target", target, "--max-new-tokens", "2", *options)
    assert complaint in ran.err
    assert ran.out == ""


def test_token_texts_keep_their_spaces(run: tuple[list[Emission], Any]) -> None:
    tokenizer = run[1].tokenizer
    ids = list(tokenizer("ab cd")["input_ids"])
    assert "".join(token_texts(tokenizer, ids)[token] for token in ids) == "ab cd"


def test_a_nodes_distribution_is_that_of_its_own_history_also_when_asked_later() -> None:
    """The row has grown by then: a penalty was computed with what was emitted behind the node."""
    model = tinychat.make_model(eos=None)
    ids = torch.tensor([[97, 98, 97, 98, 97, 98, 97]])
    penalty = RepetitionPenaltyLogitsProcessor(1.5)
    num_nodes = 0

    def look(emission: Emission) -> None:
        nonlocal num_nodes
        history = emission.row.tokens[: -len(emission.step.tokens)]
        for node in range(len(emission.tree)):
            context = torch.tensor([history + emission.tree.path_tokens(node)])
            expected = penalty(context, emission.scores.logits[node : node + 1].clone())[0].argmax()
            assert emission.probs.best(node) == expected
            num_nodes += 1

    specdec.generate(
        model,
        ids,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=1.5,
        drafter="recycling:min_prob=0.0,min_gain=0.0,start=None,capacity=64",
        adaptive=False,
        on_emission=look,
    )
    assert num_nodes > 30
