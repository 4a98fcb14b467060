"""What the engine tells of each pass is what happened: tokens, blocks and the tree of prefixes."""

from __future__ import annotations

import pytest
import torch
from tinyllama import VOCAB, tiny

from specdec.serving.engine import Engine
from specdec.serving.pass_record import PassRecord
from specdec.serving.request import Completion, RequestSettings

SIZE = 4
PREFIX = torch.randint(3, VOCAB, (21,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [[*PREFIX, 5 + i, 7, 9 + i] for i in range(5)]


def serve(**options: object) -> tuple[list[Completion], list[PassRecord]]:
    passes: list[PassRecord] = []
    settings = RequestSettings(max_new_tokens=14, stop_token_ids=())
    with Engine(tiny(0), drafter="ngram", block_size=SIZE, max_rows=3, on_pass=passes.append, **options) as engine:  # type: ignore[arg-type]
        with engine._changed:  # no pass before all have come
            handles = [engine.submit(prompt, settings) for prompt in PROMPTS]
        return [handle.result(60) for handle in handles], passes


@pytest.fixture(scope="module")
def served(one_thread: None) -> tuple[list[Completion], list[PassRecord]]:
    return serve(kv_memory="200KB")


def test_passes_add_up_to_the_answers(served: tuple[list[Completion], list[PassRecord]]) -> None:
    completions, passes = served
    for completion in completions:
        rows = [row for record in passes for row in record.rows if row.request_id == completion.request_id]
        assert sum(row.num_emitted for row in rows) == len(completion.tokens) == 14
        assert sum(row.num_accepted for row in rows) == completion.stats.num_accepted_tokens
        assert sum(row.num_drafted for row in rows) == completion.stats.num_draft_tokens
        assert rows[-1].num_tokens == rows[-1].num_prompt + 14


def test_rows_hold_blocks_for_what_they_keep(served: tuple[list[Completion], list[PassRecord]]) -> None:
    _, passes = served
    for record in passes:
        assert 0 < len(record.rows) <= 3
        for row in record.rows:
            assert len(row.blocks) * SIZE > row.num_kept
            assert row.num_kept < row.num_tokens or row.num_emitted == 0
        assert len({block for row in record.rows for block in row.blocks}) <= record.num_held
    assert passes[0].num_waiting == 4, "the others wait for the prefix that the first one computes"


def test_the_tree_is_told_with_texts_and_holders(served: tuple[list[Completion], list[PassRecord]]) -> None:
    _, passes = served
    told = [record for record in passes if record.prefixes]
    assert told
    for record in told:
        assert record.prefixes is not None
        texts: dict[int, tuple[int, ...]] = {-1: ()}
        for edge in record.prefixes:
            texts[edge.block] = texts[edge.parent] + edge.tokens  # parents come first
            users = sum(edge.block in row.blocks for row in record.rows)
            assert edge.num_holders == 1 + users
        assert len(record.prefixes) == record.num_known
        begin = tuple(PREFIX[: len(PREFIX) // SIZE * SIZE])
        assert begin in texts.values()
    assert max(edge.num_holders for record in told for edge in record.prefixes or ()) == 4


def test_without_sharing_there_is_no_tree() -> None:
    _, passes = serve(prefix_sharing=False)
    assert all(record.prefixes is None and record.num_known == 0 for record in passes)
    for record in passes:
        blocks = [block for row in record.rows for block in row.blocks]
        assert len(blocks) == len(set(blocks))


def test_watching_changes_no_token(served: tuple[list[Completion], list[PassRecord]]) -> None:
    with Engine(tiny(0), drafter="ngram", block_size=SIZE, max_rows=3) as engine:
        alone = engine.run(PROMPTS, RequestSettings(max_new_tokens=14, stop_token_ids=()))
    assert [each.tokens for each in alone] == [each.tokens for each in served[0]]
