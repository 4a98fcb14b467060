"""Which backend runs an op, the simulator's diagnoses, and its cache of compiled kernels."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import simulator
import torch
from kernel_cases import kernel_cache, simulated  # noqa: F401
from simulator import KernelFaultError

from specdec.kernels import dispatch, gpu, source
from specdec.kernels.errors import KernelUnavailableError
from specdec.kernels.launch import int32, require
from specdec.kernels.walk import walk_tree

CPU = torch.device("cpu")
needs_compiler = pytest.mark.usefixtures("simulated")


@pytest.fixture(autouse=True)
def _fresh_answers() -> Iterator[None]:
    """What is installed is asked for once; here it changes from test to test."""
    gpu.cupy_unavailable.cache_clear()
    yield
    gpu.cupy_unavailable.cache_clear()


# ----- the choice -----


@pytest.mark.parametrize("mode", ["", "auto", "torch"])
def test_cpu_tensors_take_the_twin(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", mode)
    assert dispatch.choose("walk_tree", CPU) is None


def test_an_unknown_mode_is_an_error_with_the_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "triton")
    with pytest.raises(ValueError, match="must be one of auto, torch, cupy, sim, got 'triton'"):
        dispatch.choose("walk_tree", CPU)
    assert list(dispatch.describe()) == ["SPECDEC_KERNELS must be one of auto, torch, cupy, sim, got 'triton'"]


def test_the_simulator_is_no_part_of_the_product() -> None:
    """It compiles and runs C++ for tests: an installation must neither hold it nor offer it."""
    code = "import specdec.cli.doctor; from specdec.kernels import dispatch; print(*dispatch.describe())"
    environment = os.environ | {"SPECDEC_KERNELS": "sim"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "SPECDEC_KERNELS must be one of auto, torch, cupy, got 'sim'"


def test_a_backend_that_is_registered_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_registered", {})
    backend = gpu.CupyBackend(5)
    dispatch.register_backend("mine", backend, lambda device: "" if device.type == "meta" else f"not on {device}")
    monkeypatch.setenv("SPECDEC_KERNELS", "mine")
    assert dispatch.choose("walk_tree", torch.device("meta")) is backend
    assert dispatch.is_wanted("walk_tree", torch.device("meta"))
    with pytest.raises(KernelUnavailableError, match=r"SPECDEC_KERNELS=mine, but the kernel walk_tree .* not on cpu"):
        dispatch.choose("walk_tree", CPU)
    assert list(dispatch.describe()) == ["SPECDEC_KERNELS: mine"]
    monkeypatch.setenv("SPECDEC_KERNELS", "auto")
    assert dispatch.choose("walk_tree", torch.device("meta")) is None


@pytest.mark.parametrize("name", dispatch.MODES)
def test_a_built_in_mode_cannot_be_registered_over(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is built in; register another name than auto, torch, cupy"):
        dispatch.register_backend(name, simulator.SIMULATOR, simulator.device_unavailable)


def test_a_forced_backend_that_cannot_run_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_KERNELS", "cupy")
    with pytest.raises(KernelUnavailableError, match="walk_tree cannot run: the tensors are on cpu"):
        dispatch.choose("walk_tree", CPU)
    monkeypatch.setenv("SPECDEC_KERNELS", "sim")
    with pytest.raises(KernelUnavailableError, match="no instance for head size 40"):
        dispatch.choose("tree_attention", CPU, "no instance for head size 40")


def test_without_a_compiler_the_simulator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("SPECDEC_KERNELS", "sim")
    with pytest.raises(KernelUnavailableError, match=r"g\+\+ was not found; install it"):
        dispatch.choose("walk_tree", CPU)


def broken_cupy() -> ModuleType:
    raise OSError("libcuda is not what it was")


@pytest.mark.parametrize(
    ("cupy", "reason"),
    [
        (None, "CuPy is not installed"),
        (SimpleNamespace(is_available=lambda: False), "no CUDA device or driver"),
        (SimpleNamespace(is_available=broken_cupy), r"cannot compile here \(OSError: libcuda"),
        (SimpleNamespace(is_available=lambda: True, cuda=None), r"cannot compile here \(AttributeError"),
    ],
)
def test_whatever_cupy_is_auto_goes_on_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cupy: object, reason: str
) -> None:
    """Absent, without a driver, or broken: nothing raises, and the choice is logged once."""
    if cupy is None:
        monkeypatch.setattr(sys, "meta_path", [_NoCupy(), *sys.meta_path])
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("SPECDEC_KERNELS", "auto")
    dispatch._tell.cache_clear()
    with caplog.at_level(logging.INFO, "specdec.kernels"):
        for _ in range(3):
            assert dispatch.choose("walk_tree", torch.device("cuda:0")) is None
    assert len(caplog.records) == 1
    monkeypatch.setenv("SPECDEC_KERNELS", "cupy")
    with pytest.raises(KernelUnavailableError, match=reason):
        dispatch.choose("walk_tree", torch.device("cuda:0"))


class _NoCupy:
    def find_spec(self, name: str, *_: object) -> None:
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")


def test_old_devices_take_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu.device_unavailable(torch.device("cuda:0")) == "compute capability 7.5 is below 8.0"


# ----- launches through CuPy, with a CuPy that only writes down -----


def test_a_launch_through_cupy_passes_pointers_scalars_and_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[object, ...]] = []

    class Function:
        max_dynamic_shared_size_bytes = 0

        def __call__(self, *args: object, **kwargs: object) -> None:
            launches.append((*args, kwargs, self.max_dynamic_shared_size_bytes))

    class RawModule:
        def __init__(self, **options: object) -> None:
            self.options = options

        def get_function(self, name: str) -> Function:
            assert name in self.options["name_expressions"]  # type: ignore[operator]
            return Function()

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    gpu._kernels.cache_clear()
    (kernel,) = gpu.CupyBackend(0).load("walk.cu", ("walk_tree",))
    tensor = torch.zeros(3)
    kernel((2,), 32, (tensor, None, int32(5)), shared_bytes=60_000)
    grid, block, args, kwargs, allowed = launches[0]
    assert (grid, block, allowed) == ((2, 1, 1), (32, 1, 1), 60_000)
    assert args == (tensor.data_ptr(), None, np.int32(5))
    assert isinstance(kwargs, dict)
    assert (kwargs["shared_mem"], kwargs["stream"].ptr) == (60_000, 77)
    gpu._kernels.cache_clear()


# ----- the simulator's diagnoses -----


Run = Callable[..., torch.Tensor]


@pytest.fixture
def run(simulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:  # noqa: F811
    """Runs the body of a kernel with one output of 64 integers."""

    def run(body: str, threads: int = 64) -> torch.Tensor:
        text = '#include "ptx.cuh"\n__global__ void k(int* out, const int4_* in) {' + body + "}"
        (tmp_path / "k.cu").write_text(text.replace("int4_", "uint4"))
        (tmp_path / "ptx.cuh").write_text((source.CUDA / "ptx.cuh").read_text())
        (tmp_path / "platform.cuh").write_text((source.CUDA / "platform.cuh").read_text())
        monkeypatch.setattr(source, "CUDA", tmp_path)
        (kernel,) = simulator.SIMULATOR.load("k.cu", ("k",))
        out = simulator.SIMULATOR.empty((64,), torch.int32, CPU)
        kernel((1,), threads, (out, torch.arange(64)))
        return out

    return run


def test_outputs_start_poisoned(run: Run) -> None:
    assert run("if (threadIdx.x == 3) out[3] = 5;").tolist() == [-1, -1, -1, 5, *[-1] * 60]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 40) __syncthreads();", "40 of 64 threads reached __syncthreads"),
        ("__syncwarp(0xff000000u);", "not in its own mask"),
        ("if (threadIdx.x & 1) __shfl_xor_sync(~0u, 1, 1);", "deadlock: .* __shfl_xor_sync"),
        ("if (threadIdx.x & 1) __syncwarp(); else __ballot_sync(~0u, 1);", "divergent warp collective"),
        ("__shfl_sync(0x3u << (threadIdx.x & 30), 1, 9);", "outside its mask"),
        ("out[threadIdx.x + 1] = 0;", "stored past the end"),
        ("__shared__ uint4 s[64]; cp_async16(s + threadIdx.x, in, true); cp_async_commit();", "never waited for"),
        ("__shared__ uint4 s[64]; cp_async16((char*)s + 4, in, true);", "not aligned to 16 bytes"),
    ],
)
def test_faults_have_names(run: Run, body: str, message: str) -> None:
    with pytest.raises(KernelFaultError, match=message):
        run(body)


def test_shared_memory_starts_poisoned(run: Run) -> None:
    assert run("__shared__ int s[64]; s[0] = 1; out[threadIdx.x] = s[threadIdx.x];").tolist()[1:] == [-1] * 63


@needs_compiler
def test_bad_launches_are_refused() -> None:
    (kernel,) = simulator.SIMULATOR.load("walk.cu", ("walk_tree",))
    arguments = (None,) * 6 + (int32(1), int32(1))
    with pytest.raises(KernelFaultError, match="1 to 1024 threads"):
        kernel((1,), 2048, arguments)
    with pytest.raises(KernelFaultError, match="end at 65535"):
        kernel((1, 70000), 32, arguments)
    with pytest.raises(KernelFaultError, match="227 KiB"):
        kernel((1,), 32, arguments, shared_bytes=300_000)


# ----- the cache -----


@needs_compiler
def test_a_kernel_is_compiled_once_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key covers source, flags and compiler; scratch folders are gone, also after a failure."""
    monkeypatch.setenv("SPECDEC_KERNEL_CACHE", str(tmp_path / "new"))
    tokens, parents = torch.tensor([[1]]), torch.tensor([[-1]], dtype=torch.int32)
    walk_tree(tokens, parents, tokens)
    (built,) = (tmp_path / "new").iterdir()
    assert built.suffix == ".so"
    before = built.stat().st_mtime_ns
    simulator._compiled.cache_clear()
    walk_tree(tokens, parents, tokens)
    assert built.stat().st_mtime_ns == before
    monkeypatch.setenv("SPECDEC_SIM_FLAGS", "-O0")
    walk_tree(tokens, parents, tokens)
    assert len(os.listdir(tmp_path / "new")) == 2
    monkeypatch.setenv("SPECDEC_SIM_FLAGS", "-nonsense")
    with pytest.raises(KernelUnavailableError, match="does not compile"):
        walk_tree(tokens, parents, tokens)
    assert len(os.listdir(tmp_path / "new")) == 2


def test_the_cache_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPECDEC_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert simulator.cache_dir() == tmp_path / "kernels"
    monkeypatch.delenv("SPECDEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert simulator.cache_dir() == tmp_path / "specdec" / "kernels"


def test_a_kernel_text_holds_our_headers_once() -> None:
    """CuPy's cache does not look into included files."""
    text = source.flattened("reject.cu")
    assert '#include "' not in text
    assert text.count("struct NoiseKey {") == text.count("struct Links {") == 1


def test_wrong_devices_are_named() -> None:
    with pytest.raises(ValueError, match="must be on meta"):
        require("x", torch.zeros(1), torch.float32, (1,), torch.zeros(1, device="meta"))
