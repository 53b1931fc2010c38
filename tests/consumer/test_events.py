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
        (None, b"[" * 1_000_000, "not an event"),
        (None, b"{" * 10, "not an event"),
        (None, encoded(block_id=...), "block_id"),
        (None, encoded(block_id=12), "block_id"),
        (None, encoded(event_id=None), "event_id"),
        (None, encoded(timestamp="yesterday"), "timestamp"),
        (None, encoded(timestamp=True), "timestamp"),
        (None, encoded(timestamp=-1), "not between the years"),
        (None, encoded(timestamp=10**30), "not between the years"),
        (None, encoded(timestamp=float("nan")), "not an event"),
        (None, encoded(block_id=""), "block id is empty"),
        (None, encoded(event_id=""), "event id is empty"),
        (None, encoded(block_id="x" * (MAX_ID_BYTES + 1)), "longer than"),
        (None, encoded(event_id="ü" * (MAX_ID_BYTES // 2 + 1)), "longer than"),
        (b"blk_2", encoded(), "key is not the block id"),
    ],
)
def test_what_is_no_event_is_refused_with_a_reason_and_leaves_no_trace(key, value, reason):
    batch = EventBatch()
    with pytest.raises(Undecodable, match=reason):
        Decoder(EventSettings(), TOKENS).decode(key, value, 0, batch)
    assert batch == EventBatch()


@given(st.binary() | st.none(), st.binary() | st.none())
def test_any_bytes_are_an_event_or_refused(key, value):
    batch = EventBatch()
    try:
        Decoder(EventSettings(), TOKENS).decode(key, value, 0, batch)
    except Undecodable:
        assert batch == EventBatch()
    else:
        assert len(batch) == 1
