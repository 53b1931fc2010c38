import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.events import MAX_ID_BYTES, TOMBSTONE, Decoder, EventBatch, Undecodable
from consumer.settings import EventSettings
from model.vocabulary import UNK

TOKENS = {"E5": 7}


def decode(value, key=None, fields=None):
    batch = EventBatch()
    Decoder(fields or EventSettings(), TOKENS).decode(key, value, 42, batch)
    assert len(batch) == 1
    return batch


LARGE = 10_000_000
HOUR = 3_600_000


def encoded(**changes):
    item = {"block_id": "blk_1", "event_id": "E5", "timestamp": 1000, "host": "ignored"} | changes
    return json.dumps({key: value for key, value in item.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("timestamp", "milliseconds"),
    [
        (1226262930000, 1226262930000),
        (1226262930000.75, 1226262930000),
        ("2008-11-09T20:35:30Z", 1226262930000),
        ("2008-11-09T20:35:30", 1226262930000),
        ("2008-11-09 20:35:30.5", 1226262930500),
        ("2008-11-09T21:35:30.250+01:00", 1226262930250),
        ("1969-12-31T23:59:59Z", -1000),
    ],
)
def test_an_event_becomes_a_row(timestamp, milliseconds):
    batch = decode(encoded(timestamp=timestamp), key=b"blk_1")
    assert (batch.blocks, batch.tokens, batch.times, batch.offsets) == (["blk_1"], [7], [milliseconds], [42])
    assert batch.unknown == {}


def test_an_unknown_event_keeps_its_name():
    batch = decode(encoded(event_id="E99"))
    assert batch.tokens == [UNK]
    assert batch.unknown == {0: "E99"}


def test_a_tombstone_closes_the_block_that_its_key_names():
    batch = decode(None, key="blk_ü".encode())
    assert (batch.blocks, batch.tokens) == (["blk_ü"], [TOMBSTONE])


def test_field_names_are_configurable():
    fields = EventSettings(block_id="trace", event_id="span.name", timestamp="@timestamp")
    value = json.dumps({"trace": "t", "span.name": "E5", "@timestamp": 5, "block_id": 3}).encode()
    assert decode(value, fields=fields).blocks == ["t"]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (None, None, "neither key nor value"),
        (b"\xff", None, "key is not UTF-8"),
        (b"", None, "block id is empty"),
        (None, b"", "not an event"),
        (None, b"\xff\xfe", "not an event"),
        (None, b"[1, 2]", "not an event"),
        (None, b"[" * LARGE, "not an event"),
        (None, b"[" + b"1," * (LARGE // 2) + b"1]", "not an event"),
        (None, b'{"x":' + b"[" * (LARGE // 2) + b"]" * (LARGE // 2) + b"," + encoded()[1:], "recursion depth"),
        (None, b'{"x":' * (LARGE // 5), "recursion depth"),
        (None, encoded(timestamp=...)[:-1] + b',"timestamp":' + b"1" * LARGE + b"}", "out of range"),
        (None, b'{"block_id":"\xff\xfe","event_id":"E5","timestamp":1000}', "invalid start byte"),
        (None, b'{"block_id":"\\ud800","event_id":"E5","timestamp":1000}', "not an event"),
        (None, b"{" * 10, "not an event"),
        (None, encoded(block_id=...), "block_id"),
        (None, encoded(block_id=12), "block_id"),
        (None, encoded(event_id=None), "event_id"),
        (None, encoded(timestamp="yesterday"), "timestamp"),
        (None, encoded(timestamp=True), "timestamp"),
        (None, encoded(timestamp=-1), "not between the years"),
        (None, encoded(timestamp=10**30), "not between the years"),
        (None, encoded(timestamp=float("nan")), "not an event"),
        (None, encoded(timestamp=float("inf")), "not an event"),
        (None, encoded(timestamp="0001-01-01T00:00:00+01:00"), "before the year 1"),
        (None, encoded(timestamp="NaN"), "timestamp"),
        (None, encoded(block_id=""), "block id is empty"),
        (None, encoded(event_id=""), "event id is empty"),
        (None, encoded(block_id="x" * (MAX_ID_BYTES + 1)), "longer than"),
        (None, encoded(block_id="x" * 1_000_000), "longer than"),
        (b"x" * 1_000_000, None, "longer than"),
        (None, encoded(event_id="x" * 1_000_000), "longer than"),
        (None, encoded(event_id="ü" * (MAX_ID_BYTES // 2 + 1)), "longer than"),
        (b"blk_2", encoded(), "key is not the block id"),
    ],
    ids=lambda part: repr(part)[:40],  # pytest would name the test after all ten megabytes
)
def test_what_is_no_event_is_refused_with_a_reason_and_leaves_no_trace(key, value, reason):
    batch = EventBatch()
    with pytest.raises(Undecodable, match=reason):
        Decoder(EventSettings(), TOKENS).decode(key, value, 0, batch)
    assert batch == EventBatch()


@pytest.mark.parametrize(
    "value",
    [b'{"x":"' + b"y" * LARGE + b'",' + encoded()[1:], encoded(x=dict.fromkeys("abc", 1))],
    ids=["large", "nested"],
)
def test_unknown_fields_do_not_matter_however_large(value):
    assert decode(value, key=b"blk_1").blocks == ["blk_1"]


def test_a_timestamp_far_ahead_of_its_message_is_refused():
    """Else one bad clock would push the watermark and close every block."""
    decoder, batch = Decoder(EventSettings(), TOKENS, max_ahead=HOUR), EventBatch()
    for timestamp in (1000 + HOUR + 1, "9999-12-31T23:59:59Z"):
        with pytest.raises(Undecodable, match=r"windows\.max_ahead"):
            decoder.decode(None, encoded(timestamp=timestamp), 0, batch, 1000)
    assert batch == EventBatch()
    decoder.decode(None, encoded(timestamp=1000 + HOUR), 0, batch, 1000)
    assert batch.times == [1000 + HOUR]


@given(st.binary() | st.none(), st.binary() | st.none())
def test_any_bytes_are_an_event_or_refused(key, value):
    batch = EventBatch()
    try:
        Decoder(EventSettings(), TOKENS).decode(key, value, 0, batch)
    except Undecodable:
        assert batch == EventBatch()
    else:
        assert len(batch) == 1
