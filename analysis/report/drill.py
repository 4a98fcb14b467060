"""Every prompt of a run for the drill-down: who drafted what, step by step, as JSON that the page reads when opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from specdec.analysis.columns import BASELINE, PLAIN, Trace

_Place = tuple[int, str]  # run and question


def questions(trace: Trace) -> list[dict[str, Any]]:
    """One dict for each question: its heading and ``turns``, each with the prompt and the answers of all methods."""
    order = dict.fromkeys((output.label.run, output.label.question_id) for output in trace.outputs)
    steps = _steps(trace)
    by_place: dict[_Place, dict[str, Any]] = {}
    for place in order:
        by_place[place] = {"id": place[1], "run": place[0], "category": "", "turns": {}, "seconds": {}, "tokens": {}}
    for output in trace.outputs:
        label = output.label
        question = by_place[label.run, label.question_id]
        question["category"] = label.category
        turn = question["turns"].setdefault(
            label.turn, {"prompt": trace.prompts.get((label.run, label.question_id, label.turn), ()), "answers": []}
        )
        answer: dict[str, Any] = {"name": label.name, "wall": round(output.wall_s, 4), "rows": output.num_rows}
        own = steps.get((label.run, label.question_id, label.turn, label.name))
        answer["rate"] = output.num_tokens / output.wall_s if output.wall_s > 0 else 0.0
        answer |= {"steps": own} if own else {"tokens": output.token_ids}
        turn["answers"].append(answer)
        for what, value in (("seconds", output.wall_s / output.num_rows), ("tokens", output.num_tokens)):
            question[what][label.name] = question[what].get(label.name, 0) + value
    names = trace.names
    return [_finished(question_facts, names) for question_facts in by_place.values()]


def _finished(question: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Methods in the order of the run, with what each gained against plain decoding."""
    turns = [question["turns"][turn] for turn in sorted(question["turns"])]
    for turn in turns:
        turn["answers"].sort(key=lambda answer: names.index(answer["name"]))
        rates = {answer["name"]: answer.pop("rate") for answer in turn["answers"]}
        reference = rates.get(PLAIN) or rates.get(BASELINE)
        for answer in turn["answers"]:
            answer["gain"] = round(rates[answer["name"]] / reference, 3) if reference else None
    speed = {name: question["tokens"][name] / seconds for name, seconds in question["seconds"].items() if seconds}
    reference = speed.get(PLAIN) or speed.get(BASELINE)
    gains = {name: value / reference for name, value in speed.items()} if reference else {}
    return {
        "id": question["id"],
        "run": question["run"],
        "category": question["category"],
        "turns": turns,
        "gains": gains,
    }


def _steps(trace: Trace) -> dict[tuple[int, str, int, str], list[list[Any]]]:
    """Of each answer: [emitted, kept nodes, tree tokens, tree parents, milliseconds, node probabilities or null]."""
    steps = trace.steps
    emitted = _pieces(steps.tokens, steps.kept_offsets)
    nodes = _pieces(steps.nodes, steps.kept_offsets)
    trees = _pieces(steps.tree_tokens, steps.tree_offsets)
    parents = _pieces(steps.tree_parents, steps.tree_offsets)
    seconds = (1000 * steps.num_rows * (steps.draft_s + steps.score_s + steps.verify_s)).round(1).tolist()
    probs = None if steps.node_probs is None else _pieces(steps.node_probs, steps.tree_offsets)
    by_answer: dict[tuple[int, str, int, str], list[list[Any]]] = {}
    for i, code in enumerate(steps.label.tolist()):
        label = trace.labels[code]
        own = probs[i] if probs and not np.isnan(probs[i][0]) else None
        step = [emitted[i], nodes[i], trees[i], parents[i], seconds[i], own]
        by_answer.setdefault((label.run, label.question_id, label.turn, label.name), []).append(step)
    return by_answer


def _pieces(values: Any, offsets: Any) -> list[list[Any]]:
    flat, bounds = values.tolist(), offsets.tolist()
    return [flat[a:b] for a, b in pairwise(bounds)]


def texts(trace: Trace) -> list[Mapping[int, str]]:
    """Token texts of each run."""
    return [run.texts for run in trace.runs]


def script(content: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
