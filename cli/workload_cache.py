"""How the key-value cache was used while a workload was served: slots pass by pass, and one pass in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from specdec.cli.workload import WorkloadResults
from specdec.cli.workload_runs import Run, WorkloadEngine
from specdec.serving.pass_record import EdgeRecord, PassRecord

_TEXT = 80  # signs of a node's text at most


def cache_numbers(results: WorkloadResults, engine: WorkloadEngine, run: Run) -> dict[str, Any]:
    """Of a run of ``paged``: its prefix hits and preemptions, and ``kv`` as documented in docs/workloads.md."""
    size = engine.spec.option("block_size")
    longest = max(each.num_most for each in results.asked)
    series = [slots_of_pass(record, size, longest) for record in run.passes]
    columns = {name: [each[name] for each in series] for name in series[0]}
    prompt = sum(len(each.ids) for each in results.asked)
    snapshot = _snapshot(run.passes)
    return {
        "prefix_hit_rate": sum(each.num_cached for each in run.served.values()) / prompt,
        "preemptions": sum(each.num_preemptions for each in run.served.values()),
        "kv": {
            "block_size": size,
            "num_blocks": run.num_blocks,
            "longest": longest,
            "peak_held": max(record.num_held for record in run.passes),
            "utilisation": _share(columns["filled"], columns["slots"]),
            "utilisation_in_pass": _share(columns["filled"], columns["pass_slots"]),
            "utilisation_padded": _share(columns["tokens"], columns["padded"]),
            "utilisation_reserved": _share(columns["tokens"], columns["reserved"]),
            "tokens_per_slot": _share(columns["tokens"], columns["slots"]),
            "passes": {"time_s": [at - run.started_s for at in run.pass_times], **columns},
            "snapshot": {
                "index": snapshot,
                **asdict(run.passes[snapshot]),
                "prefixes": _nodes(results, run.passes[snapshot].prefixes or ()),
            },
        },
    }


def slots_of_pass(record: PassRecord, size: int, longest: int) -> dict[str, int]:
    """Slots of one pass: tokens that rows have in the cache, and what other layouts need for them."""
    filled: dict[int, int] = {}
    kept_blocks: set[int] = set()
    all_blocks: set[int] = set()
    for row in record.rows:
        all_blocks.update(row.blocks)
        kept_blocks.update(row.blocks[: -(-(row.num_kept + 1) // size)])
        for i, block in enumerate(row.blocks):
            filled[block] = max(filled.get(block, 0), min(max(row.num_kept - i * size, 0), size))
    kept = [row.num_kept for row in record.rows]
    return {
        "rows": len(record.rows),
        "waiting": record.num_waiting,
        "emitted": sum(row.num_emitted for row in record.rows),
        "held": record.num_held,
        "known": record.num_known,
        "tokens": sum(kept),  # one that two rows share counts for both
        "filled": sum(filled.values()),  # counts once
        "slots": len(kept_blocks) * size,  # blocks of the text and the newest token
        "pass_slots": len(all_blocks) * size,  # with the room for trees
        "padded": len(kept) * max(kept, default=0),  # each row as long as the longest
        "reserved": len(kept) * longest,  # each row as long as the longest request may become
    }


def _share(used: Sequence[int], had: Sequence[int]) -> float | None:
    """The mean over passes of used / had."""
    shares = [a / b for a, b in zip(used, had, strict=True) if b]
    return float(np.mean(shares)) if shares else None


def _snapshot(passes: Sequence[PassRecord]) -> int:
    """The pass that shows most: most blocks that rows share, then most rows, then most tokens."""
    shown = [i for i, record in enumerate(passes) if record.prefixes] or list(range(len(passes)))

    def worth(i: int) -> tuple[int, int, int]:
        rows = passes[i].rows
        blocks = [block for row in rows for block in row.blocks]
        return len(blocks) - len(set(blocks)), len(rows), sum(row.num_kept for row in rows)

    return max(shown, key=worth)


def _nodes(results: WorkloadResults, edges: Sequence[EdgeRecord]) -> list[dict[str, Any]]:
    """The tree of prefixes with chains as one node each: those that begin together, end together and are used alike."""
    below: dict[int, list[EdgeRecord]] = {}
    for edge in edges:
        below.setdefault(edge.parent, []).append(edge)
    nodes: list[dict[str, Any]] = []

    def add(edge: EdgeRecord, parent: int) -> None:
        chain = [edge]
        while len(next_ones := below.get(chain[-1].block, [])) == 1 and next_ones[0].num_holders == edge.num_holders:
            chain.append(next_ones[0])
        tokens = [token for each in chain for token in each.tokens]
        nodes.append(
            {
                "parent": parent,
                "num_tokens": len(tokens),
                "blocks": [each.block for each in chain],
                "num_holders": edge.num_holders,
                "text": str(results.loaded.tokenizer.decode(tokens, skip_special_tokens=False))[:_TEXT],
            }
        )
        place = len(nodes) - 1
        for child in below.get(chain[-1].block, []):
            add(child, place)

    for edge in below.get(-1, []):
        add(edge, -1)
    return nodes
