"""Kernels that are wrong on purpose: the probes must reject every one, and accept the kernels as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import simulator
import torch
from kernel_cases import SCHEDULES, kernel_cache, simulated  # noqa: F401
from kernel_probes import PROBES
from simulator import KernelFaultError, schedule

from specdec.kernels import attention, commit, pick, reject, source, walk

pytestmark = pytest.mark.usefixtures("simulated")
ATTENTION, HELP = "attention.cu", "attention.cuh"


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` where it stands for the ``nth`` time in a file."""

    probe: str
    file: str
    old: str
    new: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.probe}: {self.old.strip()[:40]!r} -> {self.new.strip()[:40]!r}"


BARRIER = "__syncthreads();"
MUTANTS = [
    # attention on tensor cores: barriers, copies, fragments, the softmax in parts, masks, splits
    Mutant("attention_mma", ATTENTION, BARRIER, "", 0),
    Mutant("attention_mma", ATTENTION, BARRIER, "", 1),
    Mutant("attention_mma", ATTENTION, "cp_async_wait<0>();\n    }", "cp_async_wait<1>();\n    }"),
    Mutant("attention_mma", ATTENTION, "cp_async_wait<1>();", ""),
    Mutant("attention_mma", ATTENTION, "q, f[0], f[1]", "q, f[1], f[0]"),
    Mutant("attention_mma", ATTENTION, "p[k], f[2], f[3]", "p[k], f[3], f[2]"),
    Mutant("attention_mma", ATTENTION, "sum[i][j] *= rescale[j >> 1];", ";"),
    Mutant("attention_mma", ATTENTION, "weight[h] *= rescale[h];", ""),
    Mutant("attention_mma", ATTENTION, "top[h] == -INFINITY ? 0.0f : top[h]", "top[h]"),
    Mutant("attention_mma", ATTENTION, "weight[h] += __shfl_xor_sync(kAllLanes, weight[h], 2);", ""),
    Mutant("attention_mma", ATTENTION, "weights[at * 2 + 1] = weight[h]", "weights[at * 2 + 2] = weight[h]"),
    Mutant("attention_mma", ATTENTION, "first + kSlots > split.prefix", "first > split.prefix"),
    Mutant("attention_mma", ATTENTION, "kv_head * a.head_stride + c", "c + 8"),
    Mutant("attention_mma", ATTENTION, "weight += rescale * weights[at * 2 + 1]", "weight += weights[at * 2 + 1]"),
    Mutant("attention_mma", HELP, "if (slot >= split.end)", "if (slot > split.end)"),
    Mutant("attention_mma", HELP, "bits[node >> 6] >> (node & 63)", "bits[node >> 6] >> (node & 31)"),
    Mutant("attention_mma", HELP, "bits[node >> 6] >> (node & 63)", "bits[0] >> (node & 63)"),
    Mutant("attention_mma", HELP, "query_depths[at] - a.window + 1", "query_depths[at] - a.window"),
    Mutant("attention_mma", HELP, "split.prefix + node_depths[node] >= oldest", "split.prefix + node >= oldest"),
    Mutant("attention_mma", HELP, "first + split * size;", "first + split * size + 1;"),
    Mutant("attention_mma", HELP, "a.window + 1) & ~63", "a.window + 1 + 63) & ~63"),
    Mutant("attention_mma", HELP, "(slot & ((1 << a.page_shift) - 1))", "(slot & ((1 << a.page_shift) - 2))"),
    # attention in float32
    Mutant("attention_f32", ATTENTION, BARRIER, "", 2),
    Mutant("attention_f32", ATTENTION, BARRIER, "", 3),
    Mutant("attention_f32", ATTENTION, "weight[j] = weight[j] * rescale", "weight[j] = weight[j]"),
    Mutant("attention_f32", ATTENTION, "sum[j][i] *= rescale;", ";"),
    Mutant(
        "attention_f32", ATTENTION, "sees(a, split, depths, first + lane)", "sees(a, split, depths, first + lane + 1)"
    ),
    # picks: ties, parts of a row, the bound on the rng, filters
    Mutant("pick", "pick.cu", "other.token < token", "other.token > token"),
    Mutant("pick", "pick.cu", BARRIER, "", 0),
    Mutant("pick", "pick.cu", "x[i] + 23.0f > best.score", "x[i] + 2.0f > best.score"),
    Mutant("pick", "pick.cu", "best.sum *= __expf(best.largest - largest);", ""),
    Mutant("pick", "pick.cu", "philox(key, group >> 2)", "philox(key, group)"),
    Mutant("pick", "pick.cu", "least > __expf", "500 * least > __expf"),
    Mutant("pick", "pick.cu", "value >= bound ?", "value > bound ?"),
    Mutant("pick", "rows.cuh", "token <= last", "token < last"),
    Mutant("pick", "rows.cuh", "wanted -= shared.before;", ""),
    Mutant("pick", "rows.cuh", "if (reached >= target", "if (reached > target"),
    Mutant("pick", "rows.cuh", "above + bins[digit] < target", "above + bins[digit] <= target"),
    Mutant("pick", "rows.cuh", "0xffffffu - static_cast<uint32_t>(token)", "static_cast<uint32_t>(token)"),
    Mutant("pick", "rows.cuh", BARRIER, "", 0),
    Mutant("pick", "rows.cuh", BARRIER, "", 1),
    Mutant("pick", "noise.cuh", "round < 10", "round < 9"),
    Mutant("pick", "noise.cuh", "static_cast<uint64_t>(seed) >> 32", "static_cast<uint64_t>(seed) >> 31"),
    Mutant(
        "pick",
        "block.cuh",
        "if (lane_id() == 0) scratch[warp_id()] = value;\n  __syncthreads();",
        "if (lane_id() == 0) scratch[warp_id()] = value;",
    ),
    # walks
    Mutant("walk", "walk.cu", "out_tokens[row * max_path + count]", "out_tokens[row * max_path + count + 1]"),
    Mutant("walk", "walk.cu", "child = links.next[child]", "child = -1"),
    Mutant("walk", "block.cuh", "parent[sibling] != parent[i]", "parent[sibling] != i"),
    Mutant("walk", "walk.cu", "token[child] != pick[node]", "token[child] != token[node]"),
    # rejection: the comparison, each scalar of the residual, streams, the inversion
    Mutant("reject_on_equality", "reject.cu", "if (uniform < ", "if (uniform <= "),
    Mutant("reject", "reject.cu", "mass = subtract(mass, i, token) * done.scale[i]", "mass = subtract(mass, i, token)"),
    Mutant("reject", "reject.cu", "* done.draft_scale[i], 0.0f)", ", 0.0f)"),
    Mutant("reject", "reject.cu", "if (replaced[source])", "if (false)"),
    Mutant(
        "reject", "reject.cu", "if (done.source[i] == source && done.token[i] == token)", "if (done.token[i] == token)"
    ),
    Mutant("reject", "reject.cu", "/ draft_mass)", ")"),
    Mutant(
        "reject",
        "reject.cu",
        "if (done.source[i] < 0) return done.token[i] == token ? 0.0f : mass;",
        "if (done.source[i] < 0) return mass;",
    ),
    Mutant("reject", "reject.cu", "kStreamResidual, depth, 0", "kStreamCoin, depth, 0"),
    Mutant("reject", "reject.cu", "kStreamCoin, depth, rejected", "kStreamCoin, depth, 0"),
    Mutant("reject", "reject.cu", "begin += chosen * slice;", "begin += chosen * slice + 1;"),
    Mutant("reject", "reject.cu", "reached > point", "reached >= point + (1ull << 52)"),
    Mutant("reject", "reject.cu", "emitted = picked[first + node]", "emitted = picked[first]"),
    Mutant(
        "reject",
        "reject.cu",
        "done.draft_scale[rejected] = draft_scale;\n      }\n      __syncthreads();",
        "done.draft_scale[rejected] = draft_scale;\n      }",
    ),
    # the rest
    Mutant(
        "commit",
        "commit.cu",
        "held[i] = base[slots[start + nodes[first + i]]]",
        "held[i] = base[slots[start + first + i]]",
    ),
    Mutant(
        "commit",
        "commit.cu",
        "base[slots[start + first + i]] = held[i]",
        "base[slots[start + first + i + 1]] = held[i]",
    ),
    Mutant("commit", "commit.cu", "first < count; first += kChunk", "first < count - 1; first += kChunk"),
    Mutant("commit", "commit.cu", "slot % page_size", "slot"),
]


KERNELS = {
    "attention_mma": (attention.FILE, attention.expressions(torch.float16, 64)),
    "attention_f32": (attention.FILE, attention.expressions(torch.float32, 64)),
    "pick": (pick.FILE, pick.expressions(torch.float32)),
    "walk": (walk.FILE, walk.EXPRESSIONS),
    "reject": (reject.FILE, reject.expressions(torch.float32)),
    "reject_on_equality": (reject.FILE, reject.expressions(torch.float32)),
    "commit": (commit.FILE, commit.EXPRESSIONS),
}


def mutated(mutant: Mutant, folder: Path, cache: Path) -> Path:
    """A folder of kernels with the mutant in it, compiled."""
    shutil.copytree(source.CUDA, folder)
    pieces = (folder / mutant.file).read_text().split(mutant.old)
    assert len(pieces) > mutant.nth + 1, "the kernel has changed: the mutant's text is not there any more"
    head, tail = mutant.old.join(pieces[: mutant.nth + 1]), mutant.old.join(pieces[mutant.nth + 1 :])
    (folder / mutant.file).write_text(head + mutant.new + tail)
    file, expressions = KERNELS[mutant.probe]
    simulator._compiled(source.flattened(file, folder), expressions, simulator.flags(), cache)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, kernel_cache: str) -> Iterator[dict[Mutant, Future[Path]]]:  # noqa: F811
    """All mutants, compiled two at a time."""
    if reason := simulator.unavailable():
        pytest.skip(f"kernels cannot be simulated: {reason}")
    place = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(2) as pool:
        yield {
            mutant: pool.submit(mutated, mutant, place / str(i), Path(kernel_cache)) for i, mutant in enumerate(MUTANTS)
        }


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_wrong_kernel_is_caught(
    mutant: Mutant, folders: dict[Mutant, Future[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CUDA", folders[mutant].result())
    for seed in SCHEDULES:
        try:
            with schedule(seed):
                PROBES[mutant.probe]()
        except (AssertionError, KernelFaultError):
            return
    pytest.fail("every schedule accepts it")


@pytest.mark.parametrize("name", PROBES)
def test_the_kernels_as_they_are_pass(name: str) -> None:
    torch.manual_seed(0)
    for seed in SCHEDULES:
        with schedule(seed):
            PROBES[name]()
