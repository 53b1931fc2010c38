"""Notices blocks whose events come in more than one partition: two half blocks, each judged by half of what it did."""

import logging
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from consumer.names import Names

log = logging.getLogger("consumer")


class OpenBlocks(Protocol):
    """What is asked of a partition's `WindowStore`."""

    def are_open(self, names: Names) -> NDArray[np.bool_]:
        """Say of each block (N,) whether it is open."""


class Crossings:
    """Looks at blocks when they open; says the first crossing, counts all.

    It sees only the partitions of this process, and two sessions of a block only while both are open. So a count of
    zero proves nothing, but a topic that is not keyed by block shows within seconds.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._said = False
        self.count = 0
        """Blocks that opened in a partition while they were open in another."""

    def look(self, opened: Mapping[int, Names], stores: Mapping[int, OpenBlocks]) -> None:
        """Look for blocks that just opened, by partition, among those that are open in the others."""
        if len(stores) < 2 or not any(map(len, opened.values())):
            return
        names = Names.joined(list(opened.values()))  # each store is asked once: asking costs more than most names do
        partitions = np.repeat(list(opened), [len(some) for some in opened.values()])
        for number, store in stores.items():
            crossed = np.flatnonzero(store.are_open(names) & (partitions != number))
            self.count += len(crossed)
            if len(crossed) and not self._said:
                self._said = True
                self._say(names[int(crossed[0])], int(partitions[crossed[0]]), number)

    def _say(self, block: bytes, partition: int, other: int) -> None:
        log.error(
            "%s: block %r has events in the partitions %d and %d, so it is judged as two half blocks, wrongly: "
            "key messages by block, or let python -m consumer --rekey do it; see docs/lines.md#re-keying",
            self._topic, block.decode("utf-8", "replace"), other, partition,
        )  # fmt: skip
