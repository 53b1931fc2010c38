"""`python -m scripts.peers.quix`: the job on Quix Streams, with a stateful window for each key, exactly once.

As its documentation recommends: a dataframe over the topic, state by message key (RocksDB with a changelog topic),
JSON in and out, the processing guarantee `exactly-once`, and its own defaults for everything else.
"""

from typing import Any

from quixstreams import Application, State

from model.cli import run
from scripts.peers.job import prepared


def main() -> None:
    """Work until told to stop."""
    settings, job, folder = prepared("scripts.peers.quix", "Quix Streams on the same job.")
    fields = settings.events
    application = Application(
        broker_address=settings.kafka.bootstrap,
        consumer_group=settings.kafka.group,
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        state_dir=folder,
        loglevel="WARNING",
    )
    events = application.topic(settings.topics.events, value_deserializer="json")
    alerts = application.topic(settings.topics.alerts, value_serializer="json")

    def judge(event: dict[str, Any], state: State) -> dict[str, Any] | None:
        window = [*state.get("window", []), job.token(event[fields.event_id])][-job.window :]
        state.set("window", window)
        score = job.score(window)
        return None if score is None else {"block_id": event[fields.block_id], "score": score}

    stream = application.dataframe(events).apply(judge, stateful=True)
    stream.filter(lambda alert: alert is not None).to_topic(alerts)
    application.run()


if __name__ == "__main__":
    run(main)
