"""Notices blocks whose events come in more than one partition: two half blocks, each judged by half of what it did."""

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

log = logging.getLogger("consumer")


class OpenBlocks(Protocol):
    """What is asked of a partition's `WindowStore`."""

    def slot_of(self, block: bytes) -> int:
        """Return the slot of an open block, -1 where it is not open."""


class Crossings:
    """Looks at blocks when they open; says the first crossing, counts all.

    It sees only the partitions of this process, and two sessions of a block only while both are open. So a count of
    zero proves nothing, but a topic that is not keyed by block shows within seconds.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self.count = 0
        """Blocks that opened in a partition while they were open in another."""

    def look(self, partition: int, opened: Iterable[bytes], stores: Mapping[int, OpenBlocks]) -> None:
        """Look for blocks that just opened in a partition among those that are open in the others."""
        others = [(number, store) for number, store in stores.items() if number != partition]
        if not others:
            return
        for block in opened:
            for number, store in others:
                if store.slot_of(block) >= 0:
                    self._cross(block, partition, number)
                    break

    def _cross(self, block: bytes, partition: int, other: int) -> None:
        self.count += 1
        if self.count == 1:
            log.error(
                "%s: block %s has events in the partitions %d and %d, so it is judged as two half blocks, wrongly: "
                "key messages by block, or let python -m consumer --rekey do it; see docs/lines.md#re-keying",
                self._topic, block.decode("utf-8", "replace"), other, partition,
            )  # fmt: skip
