"""Calibration straight from a topic on a real Kafka: the sessions and scores of --normal, told from all others."""

import json

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from calibration.traffic import read_traffic
from consumer.history import TopicHistory
from consumer.threshold import Threshold
from consumer.topics import TopicSpec, ensure_topics
from model.bundle import Bundle
from model.errors import UserError
from model.scoring import Scorer
from scripts.simulator import simulate

DAY = 24 * 3600 * 1000


def message(block, event, time):
    return block, json.dumps({"block_id": block, "event_id": event, "timestamp": time})


def sessions_file(path, sessions):
    path.write_text("".join(json.dumps({"block_id": s.block_id, "events": s.events}) + "\n" for s in sessions))
    return path


def create(line):
    ensure_topics(line.settings, [TopicSpec(line.settings.topics.events)])


def scored(path):
    threshold = Threshold.load(path)
    return dict(zip(threshold.scores, threshold.counts, strict=True))


def test_a_topic_calibrates_like_the_file_of_its_sessions(line, tmp_path):
    made = line(calibration={"path": str(tmp_path / "topic.json")})
    create(made)
    live = simulate(150, 0.0, 41)
    made.produce([(None, b"garbage", 0), ("A", b"[]", 1), (b"\xff", None, 2)])
    made.produce(message(event.block_id, event.event_id, event.timestamp) for event in live.events)
    made.produce((block, None) for block in live.blocks[:-3])

    said = made.run("calibration", "--topic").stdout
    spoken = " ".join(said.split())
    assert "3 of them are no events" in spoken
    assert "147 whole blocks" in spoken
    assert "0 blocks open when the range began, 3 when it ended" in spoken
    assert "a day" in spoken
    assert (tmp_path / "calibration_report.html").is_file()

    whole = [session for session in live.sessions() if session.block_id in set(live.blocks[:-3])]
    file = sessions_file(tmp_path / "sessions.jsonl", whole)
    made.run("calibration", "--normal", file, "--out", tmp_path / "file.json", "--no-report")
    assert scored(tmp_path / "topic.json") == scored(tmp_path / "file.json")
    assert Threshold.load(tmp_path / "topic.json").threshold == Threshold.load(tmp_path / "file.json").threshold
    days = (live.events[-1].timestamp - live.events[0].timestamp) / DAY
    assert Threshold.load(tmp_path / "topic.json").blocks_per_day == pytest.approx(150 / days)
    assert Threshold.load(tmp_path / "file.json").blocks_per_day is None


def test_a_time_range_holds_what_begins_and_closes_in_it(line, tmp_path):
    """Three days of blocks: only the second day's are asked for, and one block lasts from the first into it."""
    made = line(calibration={"path": str(tmp_path / "range.json")}, windows={"idle_timeout": "16h"})
    create(made)
    days = [simulate(60, 0.0, seed, prefix=f"day{seed}_") for seed in (51, 52, 53)]
    start = 20_000 * DAY
    expected = []
    for number, day in enumerate(days):
        first = day.events[0].timestamp
        made.produce(
            message(event.block_id, event.event_id, start + number * DAY + event.timestamp - first)
            for event in day.events
        )
        if number == 0:
            made.produce(message("long", "E5", start + DAY - hour * 3_600_000) for hour in (3, 2, 1))
        if number == 1:
            made.produce([message("long", "E5", start + DAY + 1000)])
            expected = day.sessions()
        made.produce((block, None) for block in day.blocks)
    second_day = ("--from", "2024-10-05", "--to", "2024-10-06T00:00:00Z")
    said = made.run("calibration", "--topic", made.settings.topics.events, *second_day).stdout
    assert "60 whole blocks" in said
    assert "1 blocks open when the range began, 0 when it ended" in " ".join(said.split())
    file = sessions_file(tmp_path / "sessions.jsonl", expected)
    made.run("calibration", "--normal", file, "--out", tmp_path / "file.json", "--no-report")
    assert scored(tmp_path / "range.json") == scored(tmp_path / "file.json")
    assert Threshold.load(tmp_path / "range.json").blocks_per_day == 60

    done = made.run("calibration", "--topic", "--from", str(start + 9 * DAY), check=False)
    assert done.returncode == 2
    assert "no event lies in the range: those that were read are from 2024-10-04T" in done.stderr


def test_it_says_why_there_is_nothing_to_calibrate_on(line):
    made = line(topics={"partitions": 1})
    create(made)

    def said():
        done = made.run("calibration", "--topic", check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "there are no messages in the range" in said()
    made.produce([("A", b"garbage")] * 3)
    assert "none of the 3 messages is an event (of the first, not an event" in said()
    assert "see to events in the settings" in said()
    made.produce([message("A", "E5", 20_000 * DAY)])
    assert "no block begins and closes in the range" in said()


def test_lines_that_name_no_block_are_nothing_to_calibrate_on(line, knows_lines):
    made = line(topics={"partitions": 1}, model={"path": str(knows_lines / "model")}, events={"format": "text"})
    create(made)
    made.produce([(None, b"drop nothing"), (None, b"start nothing")])
    done = made.run("calibration", "--topic", check=False)
    assert "none of the 2 lines names a block; see to events.block_pattern" in done.stderr


def test_after_deleted_events_the_first_idle_timeout_is_not_trusted(line):
    """What is kept begins in the middle of blocks: those must not pass for whole ones."""
    made = line(windows={"idle_timeout": "1h"}, topics={"partitions": 1})
    create(made)
    hour, start = 3_600_000, 20_000 * DAY
    made.produce([message("half", "E5", start), message("half", "E5", start + 10), message("half", "E5", start + 20)])
    made.produce([message("late", "E5", start + hour // 2), ("late", None)])
    made.produce([message("whole", "E5", start + 2 * hour), ("whole", None), ("half", None)])
    scorer = Scorer(Bundle.load(made.settings.model.path))

    def read():
        def silent(_):
            return _NoBar()

        return read_traffic(made.settings, made.settings.topics.events, scorer, progress=silent)

    assert len(read().scores) == 3, "half closed by its silence, late and whole by their tombstones"
    admin = AdminClient({"bootstrap.servers": made.bootstrap, "log_level": 0})
    for future in admin.delete_records([TopicPartition(made.settings.topics.events, 0, 1)]).values():
        future.result()
    assert len(read().scores) == 1


class _NoBar:
    def __enter__(self):
        return lambda _: None

    def __exit__(self, *_):
        return None


def test_history_reads_exactly_the_stretch_asked_for_in_every_partition(line):
    made = line()
    create(made)
    topic = made.settings.topics.events
    made.produce((f"{partition}-{number}", b"x", partition) for number in range(500) for partition in range(3))
    with TopicHistory(made.settings, topic) as history:
        for partition in history.partitions:
            assert history.bounds(partition) == (0, 500)
            keys = [m.key().decode() for some in history.read(partition, 100, 300) for m in some]
            assert keys == [f"{partition}-{number}" for number in range(100, 300)]
            next(iter(history.read(partition, 0, 500)))  # left in the middle, before another partition is read
        assert history.offset_at(0, 0) == 0
        assert history.offset_at(0, 10**13) is None
    assert made.lag() == 1500, "the group's offsets are as they were"


def test_a_topic_that_is_not_there_is_one_sentence(line):
    made = line()
    with pytest.raises(UserError, match="there is no topic nowhere"):
        TopicHistory(made.settings, "nowhere")
    done = made.run("calibration", "--topic", "nowhere", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
