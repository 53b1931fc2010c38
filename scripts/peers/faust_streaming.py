"""`python -m scripts.peers.faust_streaming`: the job on Faust, with a table of windows, in transactions.

As its documentation recommends: an app named like the consumer group, an agent over the topic, a table by block
(RocksDB with a changelog topic of as many partitions as the events'), JSON in and out, the processing guarantee
`exactly_once`, and its own defaults for everything else.

Its transactions hold windows and offsets, not the alerts: faust-streaming 0.15 writes to a topic outside of them unless
the app reads that topic, too, and commits without waiting for it. So a crash may lose or repeat alerts.
"""

import faust

from consumer.topics import require_topic
from model.cli import run
from scripts.peers.job import prepared


def main() -> None:
    """Work until told to stop."""
    settings, job, folder = prepared("scripts.peers.faust_streaming", "Faust on the same job.")
    fields = settings.events
    partitions = require_topic(settings, settings.topics.events)
    app = faust.App(
        settings.kafka.group,
        broker=[f"kafka://{address.strip()}" for address in settings.kafka.bootstrap.split(",")],
        store="rocksdb://",
        processing_guarantee="exactly_once",
        topic_partitions=partitions,
        datadir=folder,
        web_enabled=False,
    )
    events = app.topic(settings.topics.events, value_serializer="json")
    alerts = app.topic(settings.topics.alerts, value_serializer="json")
    windows = app.Table("windows", default=list)

    async def judge(stream: faust.Stream) -> None:
        async for event in stream:
            block = event[fields.block_id]
            windows[block] = window = [*windows[block], job.token(event[fields.event_id])][-job.window :]
            score = job.score(window)
            if score is not None:
                await alerts.send(key=block, value={"block_id": block, "score": score})

    app.agent(events)(judge)
    faust.Worker(app, loglevel="WARNING").execute_from_commandline()


if __name__ == "__main__":
    run(main)
