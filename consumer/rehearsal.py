"""Makes the compiled code ready before the process takes on work: its first alert is then as quick as its last.

Compiled loops are read from a cache on disk when they are first called, or compiled if this installation never was.
"""

import gc
import logging
import time

import msgspec
import numpy as np

from consumer.artifacts import Artifacts
from consumer.checkpoint import Checkpointer, recover
from consumer.events import Messages
from consumer.settings import Settings

log = logging.getLogger("consumer")

_SAY_AFTER_SECONDS = 5.0


def rehearse(artifacts: Artifacts, settings: Settings) -> None:
    """Take a block from its message to its alert, to its record and back."""
    began = time.monotonic()
    detector = artifacts.detector(settings)
    fields = settings.events
    event = {fields.block_id: "rehearsal", fields.event_id: "an event never seen", fields.timestamp: 0}
    messages = Messages([b"rehearsal", None], [msgspec.json.encode(event), b"no event"], np.arange(2), np.zeros(2, int))
    batch, _ = artifacts.decoder(settings).decode(messages)
    found = recover({}, detector.vocabulary)
    for _ in range(2):
        detector.assign(0, found.sessions, 0, 2)
        detector.process({0: batch})
        records = dict(Checkpointer(detector, 0, "", "", recover({}, detector.vocabulary), 0).records(2, begin=True))
        found = recover({key: value for key, value in records.items() if value is not None}, detector.vocabulary)
    detector.close(0)
    gc.collect()
    gc.freeze()  # what was imported stays: to look at it in every collection costs a third of a second
    seconds = time.monotonic() - began
    if seconds > _SAY_AFTER_SECONDS:
        log.info("the inner loops were ready after %.0f s; they are compiled once for each installation", seconds)
