import csv
import gzip
import io
import json
import os
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UserError
from model.sessions import Event, Session, read_events, read_labels, read_normal, read_sessions, read_templates

HDFS = Path(os.environ.get("LOG_DATA", Path(__file__).parents[2] / "../shared/data")) / "hdfs"


def real_data(test):
    """Mark a test that needs the real logs."""
    absent = pytest.mark.skipif(not HDFS.is_dir(), reason="no real logs here: name their folder in LOG_DATA")
    return pytest.mark.data(absent(test))


EVENTS = """\
timestamp,block_id,event_id
2008-11-09T20:35:30Z,a,E5
2008-11-09T20:35:30Z,b,E5
2008-11-09T20:35:31Z,a,E22
"""
TRACES = """\
BlockId,Label,Type,Features,TimeInterval,Latency
a,Success,,"[E5,E22]",[0.0],1
b,Fail,3,[E5],[],0
"""

ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: text == text.strip())
event_ids = st.text("EV[]0123456789", min_size=1).filter(lambda text: text == text.strip("[]"))
lives = st.dictionaries(ids, st.lists(event_ids, min_size=1, max_size=5), min_size=1, max_size=8)
moments = st.integers(0, 253_402_300_799_999)


@pytest.fixture
def give(tmp_path):
    """Write a file and return its path."""

    def make(content, name="given"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One file that every example of a property overwrites."""
    return tmp_path_factory.mktemp("examples") / "given"


def table(header, rows):
    file = io.StringIO()
    csv.writer(file).writerows([header, *rows])
    return file.getvalue().encode()


def jsonl(lives):
    return "".join(json.dumps({"block_id": block, "events": life}) + "\n" for block, life in lives).encode()


# what is understood


def test_session_jsonl_says_itself_which_blocks_are_healthy(give):
    path = give(
        '{"block_id": "a", "events": ["E5", "E22"], "label": "Normal", "more": 1}\n\n'
        '{"events": ["E5"], "block_id": "b", "label": "Anomaly"}\n'
        '{"block_id": "c", "events": ["E5"]}'
    )
    file = read_sessions(path)
    assert file.sessions == [
        Session("a", ("E5", "E22"), anomalous=False),
        Session("b", ("E5",), anomalous=True),
        Session("c", ("E5",), anomalous=None),
    ]
    assert file.labels is None
    assert str(file) == f"{path}: session JSONL, 3 sessions"


def test_loghubs_traces_bring_their_labels(give):
    file = read_sessions(give(TRACES))
    assert file.format == "Event_traces CSV"
    assert file.sessions == [Session("a", ("E5", "E22"), anomalous=False), Session("b", ("E5",), anomalous=True)]


@pytest.mark.parametrize("features", ['"[E5,E22]"', '"[E5, E22]"', "\"['E5', 'E22']\"", '"E5,E22"'])
def test_features_may_be_written_as_any_tool_writes_lists(give, features):
    assert read_sessions(give(f"Features,BlockId\n{features},a\n")).sessions == [Session("a", ("E5", "E22"))]


def test_a_cell_holds_all_events_of_a_long_session(give):
    (session,) = read_sessions(give(f'BlockId,Features\na,"[{",".join(["E5"] * 100_000)}]"\n')).sessions
    assert session.events == ("E5",) * 100_000


@pytest.mark.parametrize("name", ["anomaly_label.csv", "labels.csv"])
@pytest.mark.parametrize("content", ["BlockId,Features\na,[E5]\nb,[E5]\nc,[E5]\n", EVENTS + "1,c,E5\n"])
def test_missing_labels_come_from_the_file_beside(give, name, content):
    labels = give("BlockId,Label\nb,Anomaly\na,Normal\nz,Normal\n", name)
    file = read_sessions(give(content))
    assert {session.block_id: session.anomalous for session in file.sessions} == {"a": False, "b": True, "c": None}
    assert file.labels == labels
    assert str(file).endswith(f"3 sessions, labels from {name} (which lacks 1 of the blocks)")


def test_a_label_file_beside_changes_nothing_where_the_file_has_labels(give):
    give("BlockId,Label\na,Anomaly\n", "labels.csv")
    assert [session.anomalous for session in read_sessions(give(TRACES)).sessions] == [False, True]


def test_event_csv_becomes_sessions_in_the_order_of_the_file(give):
    assert read_sessions(give(EVENTS)).sessions == [Session("a", ("E5", "E22")), Session("b", ("E5",))]


@pytest.mark.parametrize("content", [EVENTS, TRACES, '{"block_id": "a", "events": ["E5"]}\n'])
def test_neither_name_nor_compression_nor_line_ends_matter(give, content):
    plain = read_sessions(give(content, "a.gz")).sessions
    assert read_sessions(give(gzip.compress(content.encode()), "b.csv")).sessions == plain
    assert read_sessions(give(content.replace("\n", "\r\n"), "c.jsonl")).sessions == plain
    assert read_sessions(give("\ufeff" + content, "d")).sessions == plain
    assert read_sessions(give("\n" + content + "\n\n", "e")).sessions == plain


def test_a_session_may_be_longer_than_any_buffer(give):
    life = ("E5",) * 500_000
    assert read_sessions(give(jsonl([("a", life)]))).sessions == [Session("a", life)]


@given(lives=lives, packed=st.booleans())
def test_jsonl_round_trip(scratch, lives, packed):
    data = jsonl(lives.items())
    scratch.write_bytes(gzip.compress(data) if packed else data)
    assert read_sessions(scratch).sessions == [Session(block, tuple(life)) for block, life in lives.items()]


@given(lives=lives)
def test_traces_round_trip(scratch, lives):
    rows = [(block, "[" + ",".join(life) + "]") for block, life in lives.items()]
    scratch.write_bytes(table(["BlockId", "Features"], rows))
    assert read_sessions(scratch).sessions == [Session(block, tuple(life)) for block, life in lives.items()]


@given(
    events=st.lists(st.builds(Event, moments, ids, ids), min_size=1, max_size=20),
    order=st.permutations(["timestamp", "block_id", "event_id", "level"]),
)
def test_event_csv_round_trip(scratch, events, order):
    rows = ([getattr(event, name, "INFO") for name in order] for event in events)
    scratch.write_bytes(table(order, rows))
    assert list(read_events(scratch)) == events
    lives = {}
    for event in events:
        lives.setdefault(event.block_id, []).append(event.event_id)
    assert read_sessions(scratch).sessions == [Session(block, tuple(life)) for block, life in lives.items()]


# times


@given(
    moment=st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30)),  # noqa: DTZ001 - made aware below
    zone=st.none() | st.timedeltas(-timedelta(hours=14), timedelta(hours=14)),
)
def test_iso_times_are_utc_unless_they_say_otherwise(scratch, moment, zone):
    if zone is not None:
        moment = moment.replace(tzinfo=timezone(timedelta(minutes=zone // timedelta(minutes=1))))
    scratch.write_bytes(table(["timestamp", "block_id", "event_id"], [(moment.isoformat(), "a", "E5")]))
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    expected = (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert [event.timestamp for event in read_events(scratch)] == [expected]


@pytest.mark.parametrize(
    "text",
    ["1226262930000", "2008-11-09T20:35:30Z", "2008-11-09 20:35:30", "2008-11-09T22:35:30.000+02:00"],
)
def test_one_moment_in_many_spellings(give, text):
    path = give(f"timestamp,block_id,event_id\n{text},a,E5\n")
    assert list(read_events(path)) == [Event(1_226_262_930_000, "a", "E5")]


@given(lives=st.lists(st.lists(event_ids, min_size=1, max_size=6), min_size=1, max_size=12))
def test_sessions_without_times_start_a_second_apart_and_interleave(scratch, lives):
    sessions = [(f"b{number:02}", life) for number, life in enumerate(lives)]
    scratch.write_bytes(jsonl(sessions))
    expected = sorted(
        (1_000_000_000_000 + 1000 * (start + step), block, step, event)
        for start, (block, life) in enumerate(sessions)
        for step, event in enumerate(life)
    )
    assert list(read_events(scratch)) == [Event(time, block, event) for time, block, _, event in expected]


def test_events_are_read_one_by_one(give):
    """A broken line is met only when the reader comes to it: the file is never held as a whole."""
    events = read_events(give(EVENTS + "soon,a,E5\n"))
    assert [next(events).event_id for _ in range(3)] == ["E5", "E5", "E22"]
    with pytest.raises(UserError, match="line 5"):
        next(events)


# several files, labels, templates


def test_normal_leaves_out_what_a_label_calls_anomalous(give):
    first, second = give(TRACES, "first"), give(EVENTS, "second")
    normal = read_normal([first, second])
    assert [session.block_id for session in normal.sessions] == ["a", "a", "b"]
    assert normal.left_out == 1
    assert normal.files == [f"{first}: Event_traces CSV, 2 sessions", f"{second}: event CSV, 2 sessions"]


def test_labels(give):
    path = give('Label,BlockId\nNormal,a\n" ANOMALY",b\nfail,c\nSuccess,d\n0,e\n1,f\n')
    assert read_labels(path) == {"a": False, "b": True, "c": True, "d": False, "e": False, "f": True}


def test_templates(give):
    assert read_templates(give('event_id,template\nE1,"Got <*>, ""again"""\nE2,Done\n')) == {
        "E1": 'Got <*>, "again"',
        "E2": "Done",
    }


# every mistake is one sentence that names the place

HEAD = "timestamp,block_id,event_id\n"
GOOD = '{"block_id": "a", "events": ["E5"]}\n'


@pytest.mark.parametrize("read", [read_sessions, lambda path: list(read_events(path))], ids=["sessions", "events"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty; understood are session JSONL"),
        (gzip.compress(b"", mtime=0), "the file is empty"),
        ("081109 203518 INFO Receiving block, blk_1\nand so on\n", "unknown format.*understood are session JSONL"),
        ('[{"block_id": "a"}]', "unknown format"),
        ("\0\0\0\0", "unknown format"),
        (b"timestamp,block_id,event_id\n1,\xe9,E5\n", "is not UTF-8 text"),
        (gzip.compress(GOOD.encode() * 9, mtime=0)[:-9], "gzip file is damaged or cut short"),
        (gzip.compress(GOOD.encode() * 9, mtime=0)[:20] + bytes(30), "gzip file is damaged or cut short"),
        (GOOD + '{"block_id": "a", "eve\n', "line 2: not a session"),
        (GOOD + '{"block_id": "a", "events": [5]}\n', "line 2: not a session.*`str`"),
        (GOOD + '{"events": ["E5"]}\n', "line 2: not a session.*`block_id`"),
        (GOOD + '{"block_id": "a", "events": []}\n', "line 2: .*empty"),
        (GOOD + '{"block_id": "a", "events": ["E5", ""]}\n', "line 2: .*empty"),
        (GOOD + '{"block_id": "", "events": ["E5"]}\n', "line 2: .*empty"),
        (GOOD + '{"block_id": "\\ud800", "events": ["E5"]}\n', "line 2: not a session"),
        (GOOD + '{"block_id": "a", "events": ["E5"], "label": "odd"}\n', "line 2: unknown label 'odd'; write Normal"),
        (HEAD, "holds a header and nothing else"),
        ("timestamp,block_id\n1,a\n", "the column event_id is missing"),
        ("BlockId,Label\na,Normal\n", "the column Features is missing"),
        (HEAD + "1,a,E5\nsoon,a,E5\n", "line 3: 'soon' is no timestamp"),
        (HEAD + ",a,E5\n", "line 2: '' is no timestamp"),
        (HEAD + "-1,a,E5\n", "line 2: '-1' is no timestamp"),
        (HEAD + "1960-01-01,a,E5\n", "line 2: .* is no timestamp between"),
        (HEAD + "9" * 5000 + ",a,E5\n", "line 2: .* is no timestamp"),
        (HEAD + "1,a,E5\n1,,E5\n", "line 3: block_id or event_id is empty"),
        (HEAD + "1,a,E5\n1,a,\n", "line 3: block_id or event_id is empty"),
        (HEAD + "1,a,E5\n1,a\n", "line 3: 2 columns, but the header has 3"),
        (HEAD + f'1,a,E5\n1,"a,E5\n{"2,b,E5" * 30_000}\n', "line 3: not CSV.*is a quote left open"),
        (HEAD + '1,a,E5\n1,a,"E5\n1,b,E5\n1,c,E5\n', "line 3: not CSV.*is a quote left open"),
        (HEAD + '1,"a,E5\n1,"b",E5\n', "line 2: not CSV.*is a quote left open"),
        ('BlockId,Features\na,[E5]\nb,"[E5,]"\n', "line 3: .*Features is empty"),
        ("BlockId,Features\na,[]\n", "line 2: .*Features is empty"),
        ("BlockId,Label,Features\na,odd,[E5]\n", "line 2: unknown label 'odd'"),
    ],
)
def test_a_mistake_is_one_sentence(give, read, content, said):
    path = give(content)
    with pytest.raises(UserError, match=said) as caught:
        read(path)
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    assert len(sentence) < len(str(path)) + 300


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing-here: cannot be read"):
        read_sessions(tmp_path / "nothing-here")
    with pytest.raises(UserError, match="cannot be read"):
        read_sessions(tmp_path)


def test_seconds_are_told_of_where_they_are_taken_for_milliseconds(give):
    path = give(HEAD + "1226262930,a,E1\n")
    (said,) = read_normal([path]).files
    assert said == (
        f"{path}: event CSV, 1 sessions; its newest timestamp, 1226262930, is taken as milliseconds since 1970: "
        "write seconds as milliseconds or as ISO 8601"
    )


def test_a_file_that_is_given_twice_is_refused(give, tmp_path):
    path = give(EVENTS)
    (tmp_path / "link").symlink_to(path)
    for again in (path, tmp_path / "." / "link"):
        with pytest.raises(UserError, match="the same file is given twice"):
            read_normal([path, give(TRACES, "traces.csv"), again])


def test_labels_of_other_blocks_are_refused(give):
    give("BlockId,Label\nz,Normal\n", "labels.csv")
    with pytest.raises(UserError, match=r"labels\.csv: labels none of the 2 blocks of given"):
        read_sessions(give(EVENTS))


def test_a_wrong_label_file_is_named_itself(give):
    labels = give("BlockId,Label\na,odd\n", "labels.csv")
    with pytest.raises(UserError, match="line 2: unknown label 'odd'") as caught:
        read_sessions(give(EVENTS))
    assert str(caught.value).startswith(str(labels))


@pytest.mark.parametrize(
    ("read", "said"),
    [(read_templates, "the column event_id is missing"), (read_labels, "the column BlockId is missing")],
)
def test_other_tables_are_checked_as_well(give, read, said):
    with pytest.raises(UserError, match=said):
        read(give("a,b\n1,2\n"))
    with pytest.raises(UserError, match="the file is empty"):
        read(give(""))


# the real logs


@pytest.fixture(scope="module")
def replay():
    path = HDFS / "replay" / "events.csv.gz"
    return SimpleNamespace(file=read_sessions(path), events=list(read_events(path)))


@real_data
@pytest.mark.parametrize(
    ("name", "sessions", "anomalous"),
    [
        ("train_normal", 5_000, False),
        ("calibration_normal", 8_000, False),
        ("test_normal", 10_327, False),
        ("test_anomalous", 15_920, True),
    ],
)
def test_real_session_files_are_as_their_readme_says(name, sessions, anomalous):
    file = read_sessions(HDFS / f"{name}.jsonl")
    assert len(file.sessions) == len({session.block_id for session in file.sessions}) == sessions
    assert {session.anomalous for session in file.sessions} == {anomalous}


@real_data
def test_the_real_replay_is_as_its_readme_says(replay):
    assert len(replay.events) == 222_579
    assert Counter(session.anomalous for session in replay.file.sessions) == {True: 350, False: 11_501 - 350}
    assert replay.file.labels == HDFS / "replay" / "labels.csv"
    times = [event.timestamp for event in replay.events]
    assert times == sorted(times)
    assert datetime.fromtimestamp(times[0] / 1000, UTC).isoformat() == "2008-11-09T20:35:30+00:00"


@real_data
def test_every_real_event_has_a_template(replay):
    assert {event.event_id for event in replay.events} <= read_templates(HDFS / "templates.csv").keys()


@real_data
def test_normal_leaves_the_anomalous_blocks_of_the_real_replay_out():
    normal = read_normal([HDFS / "replay" / "events.csv.gz", HDFS / "train_normal.jsonl"])
    assert (len(normal.sessions), normal.left_out) == (11_501 - 350 + 5_000, 350)


def test_a_time_range_takes_sessions_that_lie_within_it_as_a_whole(give):
    path = give("timestamp,block_id,event_id\n1000,a,E1\n2000,b,E1\n3000,a,E2\n4000,b,E2\n5000,c,E1\n", "events.csv")
    for begin, end, inside, begun, span in [
        (None, None, "abc", 3, (1000, 5000)),
        (1500, None, "bc", 2, (1500, 5000)),
        (None, 4000, "a", 2, (1000, 3999)),
        (1500, 4000, "", 1, (1500, 3999)),
    ]:
        normal = read_normal([path], begin=begin, end=end)
        assert [session.block_id for session in normal.sessions] == list(inside)
        assert (normal.outside, normal.begun) == (3 - len(inside), begun)
        assert (normal.spans, normal.latest) == ([span], 5000)
    with pytest.raises(UserError, match="Event_traces CSV without times"):
        read_normal([give(TRACES, "traces.csv")], end=1000)


def test_a_block_that_was_silent_for_longer_than_the_idle_timeout_begins_a_new_session(give):
    rows = [(1000, "E1"), (6000, "E2"), (4000, "E3"), (11_000, "E4"), (16_001, "E5")]  # E3 is late
    path = give(HEAD + "".join(f"{time},a,{event}\n" for time, event in rows) + "2000,b,E1\n", "events.csv")

    def sessions(**options):
        return [session.events for session in read_normal([path], **options).sessions]

    assert sessions() == [("E1", "E2", "E3", "E4", "E5"), ("E1",)]
    assert sessions(idle_timeout=5000) == [("E1", "E2", "E3", "E4"), ("E5",), ("E1",)]
    assert sessions(idle_timeout=5000, begin=1500) == [("E5",), ("E1",)]
    assert read_normal([path], idle_timeout=5000).begun == 3
    without_times = give(jsonl([("a", ["E1", "E2"])]), "sessions.jsonl")
    assert len(read_normal([without_times], idle_timeout=1).sessions) == 1


def test_a_block_goes_on_from_one_file_with_times_to_the_next(give):
    first = give(HEAD + "1000,a,E1\n2000,b,E1\n", "first.csv")
    second = give(HEAD + "3000,b,E2\n9000,b,E3\n9000,c,E1\n", "second.csv")
    without_times = give(jsonl([("b", ["E4"])]), "sessions.jsonl")

    def sessions(**options):
        normal = read_normal([first, without_times, second], **options)
        return [(session.block_id, *session.events) for session in normal.sessions]

    assert sessions() == [("a", "E1"), ("b", "E1", "E2", "E3"), ("b", "E4"), ("c", "E1")]
    assert sessions(idle_timeout=5000) == [("a", "E1"), ("b", "E1", "E2"), ("b", "E3"), ("b", "E4"), ("c", "E1")]
    assert [session.events for session in read_normal([first, second], end=5000).sessions] == [("E1",)]


def test_a_block_is_anomalous_if_the_labels_of_one_of_its_files_say_so(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.csv").write_text(HEAD + "1000,a,E1\n2000,b,E1\n")
    (tmp_path / "two" / "labels.csv").write_text("BlockId,Label\nb,Anomaly\n")
    normal = read_normal([tmp_path / name / "events.csv" for name in ("one", "two")])
    assert [session.block_id for session in normal.sessions] == ["a"]
    assert normal.left_out == 1


def test_only_event_files_know_the_time_that_they_span(give):
    first, last = 1226262930000, 1226262931000
    events = give(EVENTS, "events.csv")
    assert read_sessions(events).span == (first, last)
    assert read_sessions(give(TRACES, "traces.csv")).span is None
    assert read_normal([events, give(EVENTS, "again.csv")]).spans == [(first, last)] * 2
    assert read_normal([events, give(TRACES, "traces.csv")]).spans is None, "half a rate is no rate"
