"""The training loop: a run that was stopped ends like one that was not, and nothing broken is saved or overwritten."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdec.drafters.training import loop
from specdec.drafters.training.loop import Trainer
from specdec.drafters.training.outcome import NUM_RANKS, Batch, Batches, Meter, Outcome
from specdec.drafters.training.recipes import TrainSettings

NUM_BATCHES = 7
STATE, LOG = "state.pt", "log.jsonl"


pytestmark = pytest.mark.usefixtures("one_thread")


class Toy(nn.Module):
    """Learns a random matrix; ``act`` is called in each forward pass that trains, with the number of the pass."""

    def __init__(self, size: int = 6, act: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(size, size)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.act, self.passes = act, 0

    def forward(self, batch: Batch) -> Outcome:
        out = self.layer(batch["tokens"])
        if self.training:
            self.passes += 1
            self.act(self.passes)
        return Outcome((out - batch["wanted"]).square().mean(), (torch.tensor([0, 3, 99]), torch.tensor([0, 0])))


def data(num_batches: int = NUM_BATCHES) -> Batches:
    def epoch(number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        for _ in range(num_batches):
            x = torch.randn(4, 6, generator=generator)
            yield {"tokens": x, "wanted": x.roll(1, -1)}

    return Batches(num_batches, epoch)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "precision": "no", "device": "cpu", "learning_rate": 1e-2, **changes})


def trainer(folder: Path, module: nn.Module | None = None, train: Batches | None = None, **changes: Any) -> Trainer:
    return Trainer(module or Toy(), train or data(), data(2), settings(**changes), folder, lambda _: None)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights and facts of a run that was never stopped."""
    module = Toy()
    facts = trainer(tmp_path_factory.mktemp("whole"), module).run()
    assert not equal(weights(module), weights(Toy()))
    assert facts["step"] == 3 * NUM_BATCHES
    return weights(module), facts


def without_time(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "elapsed_s"}


# ----- stopping and going on -----


def interrupt_at(number: int) -> Callable[[int], None]:
    def act(passes: int) -> None:
        if passes == number:
            raise KeyboardInterrupt

    return act


@pytest.mark.parametrize("stops", [[1], [5], [NUM_BATCHES + 1, 4], [2, 2, 2, 9], [3 * NUM_BATCHES]], ids=str)
def test_a_run_that_was_stopped_ends_bit_for_bit_like_one_that_was_not(
    tmp_path: Path, whole: tuple[list[Tensor], dict[str, Any]], stops: list[int]
) -> None:
    """Each stop is Ctrl-C inside a batch; the next run begins with fresh weights, as a new process does."""
    for number in stops:
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, Toy(act=interrupt_at(number))).run()
    module = Toy()
    facts = trainer(tmp_path, module).run()
    assert equal(weights(module), whole[0])
    assert without_time(facts) == without_time(whole[1])


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
def test_ctrl_c_while_weights_change_waits_until_they_all_have(
    tmp_path: Path, whole: tuple[list[Tensor], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a state whose weights are one step ahead of its place, or half of them."""

    class Step(torch.optim.AdamW):
        count = 0

        def step(self, closure: Any = None) -> Any:
            Step.count += 1
            if Step.count == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Step)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path).run()
    assert torch.load(tmp_path / STATE, weights_only=True)["place"]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    module = Toy()
    trainer(tmp_path, module).run()
    assert equal(weights(module), whole[0])


@pytest.mark.parametrize("mutant", ["a batch twice", "no momentum"])
def test_that_comparison_finds_a_mutant(
    tmp_path: Path, whole: tuple[list[Tensor], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Toy(act=interrupt_at(6))).run()
    if mutant == "a batch twice":
        start_at = Batches.start_at
        monkeypatch.setattr(Batches, "start_at", lambda self, epoch, index: start_at(self, epoch, max(index - 1, 0)))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    module = Toy()
    trainer(tmp_path, module).run()
    assert not equal(weights(module), whole[0])


def test_a_finished_run_only_judges_again_and_more_epochs_go_on(
    tmp_path: Path, whole: tuple[list[Tensor], dict[str, Any]]
) -> None:
    trainer(tmp_path).run()
    module = Toy(act=interrupt_at(1))
    facts = trainer(tmp_path, module).run()
    assert equal(weights(module), whole[0])
    assert facts["step"] == 3 * NUM_BATCHES
    assert trainer(tmp_path, epochs=4).run()["step"] == 4 * NUM_BATCHES


def test_the_state_is_saved_as_it_goes(tmp_path: Path) -> None:
    """A process that is killed cannot save: what is there then must be young and whole."""
    seen: list[int] = []

    def act(_: int) -> None:
        if (tmp_path / STATE).exists():
            seen.append(torch.load(tmp_path / STATE, weights_only=True)["place"]["step"])

    trainer(tmp_path, Toy(act=act), save_every_s=1e-9).run()
    assert seen == list(range(1, 3 * NUM_BATCHES))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG, STATE]


def test_a_state_of_another_module_or_seed_is_refused_and_kept(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    before = (tmp_path / STATE).read_bytes()
    others = {
        "must have shape": trainer(tmp_path, Toy(5)),
        "lacks": trainer(tmp_path, nn.Sequential(Toy())),
        "seed 0, not 1": trainer(tmp_path, seed=1),
    }
    for why, other in others.items():
        with pytest.raises(
            ValueError, match=rf"belongs to a run with other settings \(.*{why}.*\); name another folder"
        ):
            other.run()
    assert (tmp_path / STATE).read_bytes() == before


class Trap:
    """A pickle that would run code when it is read."""

    def __reduce__(self) -> Any:
        return print, ("sprung",)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "code", "list", "no place", "more place", "other moments"])
def test_a_damaged_state_is_refused_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    trainer(tmp_path).run()
    file = tmp_path / STATE
    state = torch.load(file, weights_only=True)
    moments = state["optimizer"]["state"][0]
    if damage in ("half", "empty", "text"):
        whole = file.read_bytes()
        file.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a state"}[damage])
    elif damage == "code":
        torch.save(state | {"weights": Trap()}, file)
    elif damage == "list":
        torch.save([1, 2], file)
    elif damage == "no place":
        torch.save({key: value for key, value in state.items() if key != "place"}, file)
    elif damage == "more place":
        torch.save(state | {"place": state["place"] | {"room": 3}}, file)
    else:
        moments["exp_avg"] = moments["exp_avg"][:2]
        torch.save(state, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"state\.pt .*; name another folder, or delete it to start anew$"):
        trainer(tmp_path).run()
    assert file.read_bytes() == before
    assert "sprung" not in capsys.readouterr().out


# ----- fp16 -----


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[torch.amp.GradScaler]:
    """A loss scaler on the CPU, where accelerate makes none; those of all runs. The scale doubles at every third step."""
    import accelerate

    made: list[torch.amp.GradScaler] = []

    class Scaling(accelerate.Accelerator):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
            made.append(self.scaler)

        def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
            for optimizer in self._optimizers:  # as accelerate does where it scales
                self.scaler.unscale_(optimizer.optimizer)
            return nn.utils.clip_grad_norm_(parameters, max_norm)

    monkeypatch.setattr(accelerate, "Accelerator", Scaling)
    return made


def test_the_loss_scale_goes_on_where_it_stood(tmp_path: Path, scaled: list[torch.amp.GradScaler]) -> None:
    trainer(tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "stopped", Toy(act=interrupt_at(6))).run()
    trainer(tmp_path / "stopped").run()
    whole, stopped, resumed = (scaler.state_dict() for scaler in scaled)
    assert (stopped["scale"], stopped["_growth_tracker"]) == (8.0 * 2, 2)  # five steps: one growth, two steps since
    assert whole["scale"] == 8.0 * 2**NUM_BATCHES  # 21 steps
    assert resumed == whole


def test_a_state_without_a_loss_scale_begins_with_a_new_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The run before was in another precision."""
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Toy(act=interrupt_at(3))).run()
    assert torch.load(tmp_path / STATE, weights_only=True)["scaler"] is None
    scalers = request.getfixturevalue("scaled")
    assert trainer(tmp_path).run()["step"] == 3 * NUM_BATCHES
    assert scalers[0].get_scale() > 8.0


# ----- what is not finite -----


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(
    tmp_path: Path, whole: tuple[list[Tensor], dict[str, Any]], broken: str
) -> None:
    """Guards against a state that no run can go on from."""

    class Breaking(Toy):
        def forward(self, batch: Batch) -> Outcome:
            outcome = super().forward(batch)
            if self.passes != 5:
                return outcome
            if broken == "loss":
                return Outcome(outcome.loss / 0, outcome.ranks)
            zero = self.layer.weight.sum() * 0
            return Outcome(outcome.loss + zero.sqrt(), outcome.ranks)  # the slope of a root at 0

    with pytest.raises(FloatingPointError, match=rf"the {broken}.* at step 4 is (inf|nan)"):
        trainer(tmp_path, Breaking(), save_every_s=1e-9).run()
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["place"]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())
    module = Toy()
    trainer(tmp_path, module).run()
    assert equal(weights(module), whole[0])


# ----- schedule and log -----


def test_the_learning_rate_rises_then_falls_to_a_fiftieth(tmp_path: Path) -> None:
    run = trainer(tmp_path, epochs=100, learning_rate=2.0, warmup=0.1)
    rates = []
    for step in range(100 * NUM_BATCHES + 1):
        run.place.step = step
        rates.append(run._learning_rate())
    peak = rates.index(max(rates))
    assert peak == 10 * NUM_BATCHES
    assert rates[0] == pytest.approx(2.0 * 0.02)
    assert rates[peak] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 / 50)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_optimizer_follows_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []

    class Step(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Step)
    run = trainer(tmp_path)
    run.run()
    expected = []
    for step in range(3 * NUM_BATCHES):
        run.place.step = step
        expected.append(run._learning_rate())
    assert used == expected


def test_with_minutes_the_run_ends_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes a second on at each look: a step takes one."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    facts = trainer(tmp_path, epochs=1, minutes=0.5).run()
    assert facts["step"] == 30
    assert facts["elapsed_s"] == 30
    assert facts["epoch"] == 30 // NUM_BATCHES


def test_the_log_is_one_json_object_a_line_also_over_stops(tmp_path: Path) -> None:
    changes = {"report_every_s": 1e-9, "evaluate_every_s": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Toy(act=interrupt_at(5)), **changes).run()
    said: list[str] = []
    run = trainer(tmp_path, **changes)
    run.say = said.append
    run.run()
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, 3 * NUM_BATCHES + 1))
    assert [line["step"] for line in lines if line["kind"] == "held_out"] == steps
    assert lines[-1]["kind"] == "final"
    for line in lines:
        assert {"loss", "top1", "top4", "top8", "chain_length", "progress", "elapsed_s"} <= line.keys()
    assert all(line["tokens_per_s"] > 0 for line in lines if line["kind"] == "train")
    assert said[0] == f"resuming at step 4 ({100 * 4 // 21} % done)"
    assert said[-1].startswith("final: step 21, 100 %, loss ")


def test_nothing_to_learn_from_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        trainer(tmp_path, train=data(0)).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"minutes": 0}, "minutes must be positive"),
        ({"precision": "fp8"}, "precision must be no, bf16 or fp16, got 'fp8'"),
        ({"epochs": float("nan")}, "epochs"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


# ----- the meter -----


def test_the_meters_table_is_the_share_of_each_rank() -> None:
    meter = Meter()
    meter.add(Outcome(torch.tensor(1.0), (torch.tensor([0, 0, 1, 7]), torch.tensor([NUM_RANKS, 500]))), 10)
    meter.add(Outcome(torch.tensor(4.0), (torch.tensor([0]), torch.tensor([2, 3]))), 5)
    table = meter.table()
    assert [len(row) for row in table] == [NUM_RANKS, NUM_RANKS]
    assert table[0][:3] == [0.6, 0.2, 0]
    assert table[0][7] == 0.2
    assert table[1][2:4] == [0.25, 0.25]
    assert sum(table[1]) == 0.5  # the others were none of the best
    facts = meter.facts()
    assert facts["loss"] == 2.5
    assert facts["top1"] == [0.6, 0]
    assert facts["top4"] == [0.8, 0.5]
    assert facts["top8"] == [1.0, 0.5]
    assert facts["chain_length"] == 1.6
    assert meter.num_tokens == 15


def test_a_place_that_was_never_judged_has_no_rate() -> None:
    meter = Meter()
    meter.add(Outcome(torch.tensor(1.0), (torch.tensor([0]), torch.tensor([], dtype=torch.long))), 1)
    assert meter.table()[1] == [0.0] * NUM_RANKS
