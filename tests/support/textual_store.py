"""A store of keys that says of each slot which text it was computed from, so that any mix-up of blocks shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.interfaces import Row
from specdec.paging.tables import BlockTables


@dataclass(eq=False)
class TextualStore:
    """Slot t of a row holds the row's first t + 1 tokens; a follower's slots are filled a token later."""

    tables: BlockTables
    must_follow: bool = False
    lag: int = 0  # how many tokens it stays behind the target
    content: dict[int, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[Row, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables.add_store(self)

    def open(self, row: Row) -> None:
        self.kept[row] = self.tables[row].num_cached if self.must_follow else self.tables.num_filled(self, row)

    def num_kept(self, row: Row) -> int:
        return self.kept.get(row, -self.must_follow) + self.must_follow

    def fill(self, row: Row, length: int) -> None:
        """Compute the slots up to ``length`` tokens, as far as it does not lag."""
        end = max(length - self.lag, self.kept[row])
        self.write(row, self.kept[row], row.tokens[:end])
        self.kept[row] = end

    def write(self, row: Row, first: int, tokens: Sequence[int]) -> None:
        """Slots ``first`` and up, for a row that reads ``tokens``; those of a follower lie one further."""
        shift = int(self.must_follow)
        places = self.tables.slots(row, first + shift, len(tokens) + shift)
        for t, place in zip(range(first, len(tokens)), places.tolist(), strict=True):
            self.content[place] = tuple(tokens[: t + 1])

    def copy_block(self, source: int, target: int, num_slots: int) -> None:
        size = self.tables.pool.block_size
        for i in range(num_slots):
            self.content.pop(target * size + i, None)
            if source * size + i in self.content:
                self.content[target * size + i] = self.content[source * size + i]

    def check(self, row: Row) -> None:
        """Every slot that counts as kept was computed from this row's own text."""
        shift = int(self.must_follow)
        places = self.tables.slots(row, shift, self.kept[row] + shift)
        wrong = [t for t, place in enumerate(places.tolist()) if self.content.get(place) != tuple(row.tokens[: t + 1])]
        assert not wrong, f"slots {wrong} of row {row.key} hold something else"
