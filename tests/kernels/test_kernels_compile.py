"""nvcc (and NVRTC, if it is there) compile every kernel for each architecture: registers, spills, tensor-core instructions.

Needs no GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kernel_cases import nvcc_unavailable

from specdec.kernels import attention, commit, pick, reject, source, walk

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Registers a thread that leave room for the blocks the kernels are written for.
MAX_REGISTERS = {"tree_attention_mma": 255, "tree_attention_f32": 128}
OTHER_REGISTERS = 64
MAX_SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB of dynamic shared memory a block


def instances(sizes: tuple[int, ...] = attention.HEAD_SIZES) -> dict[str, list[str]]:
    """Expressions that the ops ask for, by file: all but some attention in float16 and with a softcap."""
    attentions = [e for size in sizes for d in (torch.float32, torch.bfloat16) for e in attention.expressions(d, size)]
    attentions += [attention.expressions(torch.float16, 128)[0], attention.expressions(torch.bfloat16, 256, True)[0]]
    return {
        attention.FILE: attentions,
        pick.FILE: [*(e for d in DTYPES for e in pick.expressions(d)[:2]), pick.expressions(torch.float32)[2]],
        reject.FILE: [e for d in DTYPES for e in reject.expressions(d)],
        walk.FILE: list(walk.EXPRESSIONS),
        commit.FILE: list(commit.EXPRESSIONS),
    }


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    name: str
    stack: int
    spilled: int
    registers: int


USAGE = re.compile(
    r"entry function '_Z\d+(?P<name>\w+)' for.*?(?P<stack>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def program(file: str, expressions: list[str]) -> str:
    """A file with host functions that take the addresses of kernels, which makes nvcc build them."""
    uses = (f"void* use_{i}() {{ return reinterpret_cast<void*>({e}); }}\n" for i, e in enumerate(expressions))
    return source.flattened(file) + "".join(uses)


def compiled(nvcc: str, architecture: str, folder: Path) -> list[Usage]:
    found = []
    sizes = attention.HEAD_SIZES if architecture == "sm_90" else (128, 256)
    for file, expressions in instances(sizes).items():
        text = folder / f"{architecture}_{file}"
        text.write_text(program(file, expressions))
        command = [nvcc, "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", os.devnull, str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        usages = [
            Usage(m["name"], int(m["stack"]), int(m["spilled"]), int(m["registers"]))
            for m in USAGE.finditer(done.stderr)
        ]
        assert len(usages) == len(expressions)
        found += usages
    return found


@pytest.fixture(scope="module")
def nvcc() -> str:
    if reason := nvcc_unavailable():
        pytest.skip(reason)
    return "nvcc"


@pytest.fixture(scope="module")
def usages(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[Usage]]]]:
    """Compilations of all architectures, two at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        yield {each: pool.submit(compiled, nvcc, each, folder) for each in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(usages: dict[str, Future[list[Usage]]], architecture: str) -> None:
    """No stack and no spills is no traffic of local memory."""
    found = usages[architecture].result()
    for usage in found:
        limit = next((n for name, n in MAX_REGISTERS.items() if usage.name.startswith(name)), OTHER_REGISTERS)
        assert (usage.stack, usage.spilled) == (0, 0), usage
        assert usage.registers <= limit, usage


def test_spills_would_be_seen(nvcc: str, tmp_path: Path) -> None:
    """The check itself: the same kernel for four times as many blocks has to spill."""
    text = program(attention.FILE, [attention.expressions(torch.bfloat16, 128)[0]])
    (tmp_path / "k.cu").write_text(
        text.replace("__launch_bounds__(kWarps * 32, 2)", "__launch_bounds__(kWarps * 32, 8)")
    )
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", os.devnull, str(tmp_path / "k.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(next(USAGE.finditer(done.stderr))["spilled"]) > 0


def test_attention_uses_tensor_cores_and_asynchronous_copies(nvcc: str, tmp_path: Path) -> None:
    for dtype, is_there in ((torch.bfloat16, True), (torch.float32, False)):
        (tmp_path / "k.cu").write_text(program(attention.FILE, [attention.expressions(dtype, 128)[0]]))
        command = [
            nvcc,
            "-std=c++17",
            "-arch=compute_80",
            "-ptx",
            "-o",
            str(tmp_path / "k.ptx"),
            str(tmp_path / "k.cu"),
        ]
        subprocess.run(command, check=True)
        text = (tmp_path / "k.ptx").read_text()
        # Scores: 8 steps of 16 columns by 8 tiles of 8 slots; values: 4 steps of 16 slots by 16 tiles of 8 columns.
        assert text.count("mma.sync.aligned.m16n8k16") == (128 if is_there else 0)
        assert ("ldmatrix" in text and "cp.async.cg" in text) is is_there
        assert ".local" not in text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_fits_every_architecture(architecture: str) -> None:
    for dtype in DTYPES:
        for size in attention.HEAD_SIZES:
            assert attention.shared_bytes(dtype, size) <= MAX_SHARED[architecture] * 1024


# ----- NVRTC, which compiles on the user's machine -----


def find_nvrtc() -> ctypes.CDLL | None:
    """The library from the package nvidia-cuda-nvrtc or from the system, or nothing."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except ValueError:
        spec = None
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    names = [str(path) for folder in folders for path in sorted(folder.rglob("libnvrtc.so*"))]
    for name in [*names, "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def include_folders() -> list[str]:
    places = [Path("/usr/local/cuda/include"), Path(os.environ.get("CUDA_HOME", "/nowhere")) / "include"]
    return [str(place) for place in places if (place / "cuda_fp16.h").exists()]


def nvrtc_log(library: ctypes.CDLL, file: str, expressions: list[str]) -> tuple[int, str]:
    """Compile as CuPy does, with name expressions: the status and the log."""
    handle = ctypes.c_void_p()
    text = source.flattened(file).encode()
    library.nvrtcCreateProgram(ctypes.byref(handle), text, file.encode(), 0, None, None)
    for expression in expressions:
        library.nvrtcAddNameExpression(handle, expression.encode())
    options = ["-std=c++17", "-arch=sm_90", "-ftz=true", "--device-as-default-execution-space"]
    encoded = [option.encode() for option in (*options, *(f"-I{folder}" for folder in include_folders()))]
    status = library.nvrtcCompileProgram(handle, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(handle, log)
    lowered = ctypes.c_char_p()
    for expression in expressions if status == 0 else ():
        status |= library.nvrtcGetLoweredName(handle, expression.encode(), ctypes.byref(lowered))
    library.nvrtcDestroyProgram(ctypes.byref(handle))
    return status, log.value.decode(errors="replace")


@pytest.mark.parametrize("file", instances())
def test_nvrtc_compiles_the_same_text(file: str) -> None:
    """NVRTC has no standard headers and other integer types than nvcc."""
    library = find_nvrtc()
    if library is None:
        pytest.skip("NVRTC was not found; pip install nvidia-cuda-nvrtc")
    if not include_folders():
        pytest.skip("cuda_fp16.h was not found; install the CUDA toolkit")
    expressions = instances()[file]
    chosen = expressions[:4] if file == attention.FILE else expressions
    status, log = nvrtc_log(library, file, chosen)
    assert status == 0, log[-3000:]
