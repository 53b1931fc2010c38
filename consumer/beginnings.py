"""Where a consumer group that has no offset in a partition begins: the same place each time it is asked.

Only a commit makes others begin there, too. Should the first one fail, what came meanwhile is still to be read.
"""

from consumer.settings import KafkaSettings


class Beginnings:
    """Remembers where partitions were begun that have no offset."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._at_end = settings.begins_at_end
        self._chosen: dict[int, int] = {}

    def choose(self, partition: int, low: int, high: int) -> int:
        """Return where to begin in a partition with offsets from `low` to before `high`."""
        if not self._at_end:
            return low
        chosen = self._chosen.get(partition, high)
        if not low <= chosen <= high:
            chosen = high
        self._chosen[partition] = chosen
        return chosen

    def forget(self, partition: int) -> None:
        """Note that the group has an offset in a partition."""
        self._chosen.pop(partition, None)
