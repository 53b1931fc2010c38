"""The alerts topic as a picture that stays in place: what `scripts.alerts --follow` shows on a terminal."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from consumer.alerts import Alert
from consumer.settings import BASE_LEVEL

SEVERITY_COLOURS = {BASE_LEVEL: "yellow", "major": "dark_orange", "critical": "bold red"}
OTHER_COLOUR = "magenta"

_KEPT = 200
_RATE_SECONDS = 60.0
_FRAME_LINES = 6  # title, table head and borders, and the line that the terminal needs


class LiveAlerts:
    """The latest alerts, counts by severity and the rate, as large as the terminal.

    Args:
        topic: its name.
        cells: the columns of an alert's row: time, severity, block, score, what happened, what was expected.
        clock: seconds since 1970.
    """

    def __init__(
        self, topic: str, cells: Callable[[Alert], tuple[Text, ...]], clock: Callable[[], float] = time.time
    ) -> None:
        self._topic = topic
        self._cells = cells
        self._clock = clock
        self._latest: OrderedDict[str, Alert] = OrderedDict()
        self._severities = Counter[str]()
        self._recent: deque[float] = deque(maxlen=100_000)

    def take(self, alert: Alert, published: float) -> None:
        """Take in an alert that was published at `published`, in seconds; a revision replaces what it revises."""
        self._severities[alert.severity] += 1
        self._recent.append(published)
        self._latest.pop(alert.alert_id, None)
        self._latest[alert.alert_id] = alert
        if len(self._latest) > _KEPT:
            self._latest.popitem(last=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the picture."""
        table = Table(expand=True)
        for heading, ratio, most in (
            ("time", None, 23), ("severity", None, 12), ("block", 3, None), ("score", None, 16),
            ("what happened", 5, None), ("expected", 3, None),
        ):  # fmt: skip
            table.add_column(heading, ratio=ratio, max_width=most, no_wrap=True, overflow="ellipsis")
        rows = max(1, (options.max_height or console.height) - _FRAME_LINES)
        for alert in reversed([*self._latest.values()][-rows:]):
            table.add_row(*self._cells(alert))
        yield Group(self._title(), table)

    def _title(self) -> Text:
        horizon = self._clock() - _RATE_SECONDS
        while self._recent and self._recent[0] < horizon:
            self._recent.popleft()
        said = f"  {self._severities.total():,} alerts, {len(self._recent):,} in the last minute  "
        counts = (
            (f"{count:,} {name}  ", SEVERITY_COLOURS.get(name, OTHER_COLOUR))
            for name, count in self._severities.most_common()
        )
        return Text.assemble((self._topic, "bold"), said, *counts, ("Ctrl-C ends", "dim"))
