"""The same probes on a GPU: every kernel compiled by NVRTC against its twin on the CPU, and a captured graph.

Where there is no GPU the machinery around them runs with the simulator, so that it cannot rot.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import kernel_probes
import pytest
import torch
from devices import needs_gpu
from kernel_cases import kernel_cache, noise_keys, simulated  # noqa: F401
from kernel_probes import PROBES
from verdict_cases import NOISE, PARAMS, on_host, some_pass

from specdec.cuda.batch_verdicts import TreeBatch, decide, verdicts_on_device
from specdec.distributions import WarperTransform
from specdec.interfaces import BatchRule, Verifier
from specdec.kernels.commit import KVBuffers, commit_kv
from specdec.kernels.pick import Filters, pick_rows
from specdec.kernels.walk import walk_tree
from specdec.sampling import GREEDY, SamplingParams
from specdec.verifiers import make_verifier

OPS = ("pick_rows", "walk_tree", "reject_tree", "tree_attention")


def moved(value: Any, device: str) -> Any:
    """``value`` with all its tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def on(device: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` run on ``device`` for arguments and results on the CPU."""
    return lambda *args: moved(op(*moved(args, device)), "cpu")


def commit_on(device: str) -> Callable[..., None]:
    def commit(buffers: KVBuffers, *args: Any) -> None:
        there = KVBuffers.of([tensor.to(device) for tensor in buffers.tensors])
        commit_kv(there, *moved(args, device))
        for tensor, result in zip(buffers.tensors, there.tensors, strict=True):
            tensor.copy_(result)

    return commit


def put_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPS:
        monkeypatch.setattr(kernel_probes, name, on(device, getattr(kernel_probes, name)))
    monkeypatch.setattr(kernel_probes, "commit_kv", commit_on(device))


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in PROBES])
def test_kernels_on_the_gpu_are_their_twins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "cupy")
    put_on("cuda", monkeypatch)
    PROBES[name]()


@pytest.mark.parametrize("name", ["walk", "commit", "attention_f32"])
@pytest.mark.usefixtures("simulated")
def test_the_probes_can_be_moved_to_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on("cpu", monkeypatch)
    PROBES[name]()


def test_every_op_that_a_probe_calls_is_moved() -> None:
    called = {name for name in vars(kernel_probes) if f"{name}_torch" in vars(kernel_probes)}
    assert called == {*OPS, "commit_kv"}
    assert inspect.getsource(kernel_probes).count("@probe") == len(PROBES)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_a_captured_step_replays_with_other_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, positions, lengths and trees live on the device: a replay reads what they are by then."""
    monkeypatch.setenv("SPECDEC_KERNELS", "cupy")
    logits = torch.randn(4, 5000, device=device)
    rng = moved(noise_keys(4), device)
    tokens = torch.randint(0, 5000, (1, 4), device=device)
    parents = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32, device=device)

    def step() -> Any:
        return walk_tree(tokens, parents, pick_rows(logits, Filters(1.0), rng).tokens.view(1, 4))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        logits.normal_()
        rng.positions.add_(7)
        graph.replay()
        assert captured.tokens.tolist() == step().tokens.tolist()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu), "cpu"])
@pytest.mark.parametrize("params", [GREEDY, *PARAMS], ids=str)
@pytest.mark.parametrize("name", ["match", "rejection"])
def test_a_pass_is_decided_as_on_the_host_and_without_waiting(
    name: str, params: SamplingParams, device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On a GPU torch itself raises for whatever waits before the verdicts are read."""
    if device == "cpu":
        request.getfixturevalue("simulated")
    else:
        monkeypatch.setenv("SPECDEC_KERNELS", "cupy")
    given, logits_transform = some_pass(5, True), WarperTransform(params)
    verifier: Verifier = make_verifier(name)
    expected = on_host(verifier, logits_transform, given)
    trees, scores = ([moved(each, device) for each in some] for some in (given.trees, given.scores))
    found = verdicts_on_device(verifier, logits_transform, NOISE, given.rows, trees, scores)
    assert found is not None
    assert all(got == verdict or margin < 1e-5 for got, (verdict, margin) in zip(found, expected, strict=True))
    rule = BatchRule.REJECT if name == "rejection" and not params.is_greedy else BatchRule.FOLLOW
    try:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        decided = decide(rule, TreeBatch.of(given.rows, trees, scores, params, NOISE.seed))
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert [len(verdict.nodes) for verdict in found] == (decided[:, 0] >= 0).sum(1).tolist()
