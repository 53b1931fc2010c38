"""Places where scripts.faults makes a process die, to show that it does not matter. Inert unless asked for.

The environment variable LOG_ANOMALY_FAULT holds `place:n`: the n-th time that the process comes by there, it ends
as by kill -9, or, for the place `abort`, its transaction is aborted.
"""

import os
import signal

PLACES = ("before_commit", "after_commit", "checkpoint", "rebalance", "restore", "reload", "abort")

_place, _, _number = os.environ.get("LOG_ANOMALY_FAULT", "").partition(":")
_left = int(_number or 1)


def come_by(place: str) -> bool:
    """Die here if that was asked for; for `abort`, say so instead."""
    global _left  # noqa: PLW0603 - a process has one fate
    if place != _place:
        return False
    _left -= 1
    if _left:
        return False
    if place != "abort":
        os.kill(os.getpid(), signal.SIGKILL)
    return True
