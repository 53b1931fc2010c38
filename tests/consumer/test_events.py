import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.events import MAX_ID_BYTES, TOMBSTONE, Decoder, Messages, Undecodable
from consumer.settings import EventSettings
from model.vocabulary import UNK

TOKENS = {"E5": 7}


LATER = 253_402_300_799_999


def messages(*pairs, sent=LATER):
    """`pairs`: key and value."""
    keys, values = zip(*pairs, strict=True)
    return Messages(keys, values, np.arange(42, 42 + len(pairs)), np.full(len(pairs), sent))


def decode(value, key=None, fields=None):
    batch, refused = Decoder(fields or EventSettings(), TOKENS).decode(messages((key, value)))
    assert not refused
    assert len(batch) == 1
    return batch


def refusal(key, value, sent=LATER):
    batch, refused = Decoder(EventSettings(), TOKENS, max_ahead=HOUR).decode(messages((key, value), sent=sent))
    assert len(batch) == 0
    assert batch.unknown == {}
    ((place, reason),) = refused
    assert place == 0
    return reason


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
        ("2000-02-29T00:00:00Z", 951_782_400_000),
        ("2024-02-29T00:00:00Z", 1_709_164_800_000),
        ("2100-03-01T00:00:00Z", 4_107_542_400_000),
        ("9999-12-31T23:29:59.999999-00:30", LATER),
    ],
)
def test_an_event_becomes_a_row(timestamp, milliseconds):
    batch = decode(encoded(timestamp=timestamp), key=b"blk_1")
    assert (batch.blocks, batch.tokens, batch.times, batch.offsets) == (["blk_1"], 7, milliseconds, 42)
    assert batch.unknown == {}


def test_an_unknown_event_keeps_its_name():
    batch = decode(encoded(event_id="E99"))
    assert batch.tokens == UNK
    assert batch.unknown == {0: "E99"}


def test_a_tombstone_closes_the_block_that_its_key_names():
    batch = decode(None, key="blk_ü".encode())
    assert (batch.blocks, batch.tokens) == (["blk_ü"], TOMBSTONE)


def test_field_names_are_configurable():
    fields = EventSettings(block_id="trace", event_id="span.name", timestamp="@timestamp")
    value = json.dumps({"trace": "t", "span.name": "E5", "@timestamp": 5, "block_id": 3}).encode()
    assert decode(value, fields=fields).blocks == ["t"]


def test_that_a_message_has_no_timestamp_to_hold_its_events_against_is_said():
    decoder = Decoder(EventSettings(), {"E5": 9}, max_ahead=1000)
    _, ((_, reason),) = decoder.decode(messages((None, encoded()), sent=-1))
    assert re.search(r"the message has none", reason)


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
        (None, encoded(timestamp="9999-12-31T23:59:59-00:30"), "the timestamp .* after the year 9999"),
        (None, encoded(timestamp="NaN"), "timestamp"),
        (None, encoded(timestamp="2023-02-29T00:00:00Z"), "timestamp"),
        (None, encoded(timestamp="2100-02-29T00:00:00Z"), "timestamp"),
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
    assert re.search(reason, refusal(key, value))


@pytest.mark.parametrize(
    "value",
    [b'{"x":"' + b"y" * LARGE + b'",' + encoded()[1:], encoded(x=dict.fromkeys("abc", 1))],
    ids=["large", "nested"],
)
def test_unknown_fields_do_not_matter_however_large(value):
    assert decode(value, key=b"blk_1").blocks == ["blk_1"]


def test_a_timestamp_far_ahead_of_its_message_is_refused():
    """Else one bad clock would push the watermark and close every block."""
    for timestamp in (1000 + HOUR + 1, "9999-12-31T23:59:59Z"):
        assert "windows.max_ahead" in refusal(None, encoded(timestamp=timestamp), sent=1000)
    batch, refused = Decoder(EventSettings(), TOKENS, max_ahead=HOUR).decode(
        messages((None, encoded(timestamp=1000 + HOUR)), sent=1000)
    )
    assert (batch.times, refused) == (1000 + HOUR, [])


def test_good_messages_keep_their_places_among_bad_ones():
    pairs = [
        (None, encoded(block_id="a")),
        (b"b", b"garbage"),
        ("ü".encode(), encoded(block_id="ü", event_id="new")),
        (b"c", None),
        (b"x", encoded(block_id="d")),
        (b"d", encoded(block_id="d", event_id="new too")),
    ]
    batch, refused = Decoder(EventSettings(), TOKENS).decode(messages(*pairs))
    assert batch.blocks == ["a", "ü", "c", "d"]
    assert batch.tokens.tolist() == [7, UNK, TOMBSTONE, UNK]
    assert batch.offsets.tolist() == [42, 44, 45, 47]
    assert batch.unknown == {1: "new", 3: "new too"}
    assert [place for place, _ in refused] == [1, 4]


names = st.sampled_from(["block_id", "event_id", "timestamp", "host", "block_ID", ""])
texts = st.sampled_from(["blk_1", "E5", "E6", "", "x" * 1025, "ü", 'a"b', "2008-11-09T20:35:30Z"]) | st.text(max_size=8)
digits = st.integers(0, 99).map("{:02d}".format)
moments = st.one_of(
    st.datetimes().map(lambda moment: moment.isoformat() + "Z"),
    st.builds("{}-{}-{}{}{}:{}:{}{}{}".format,
              st.sampled_from(["0000", "0001", "1900", "2000", "2023", "9999", "-001"]),
              digits, digits, st.sampled_from("Tt "), digits, digits, digits,
              st.sampled_from(["", ".", ".5", ".123", ".999999", ".1234567", ",5"]),
              st.sampled_from(["", "Z", "z", "+00:00", "+01:00", "-00:30"])),
)  # fmt: skip
numbers = st.integers(-5, 10**20) | st.floats(allow_nan=True) | st.sampled_from([10**17, 10**17 - 1, LATER, LATER + 1])
values = texts | moments | numbers | st.booleans() | st.none() | st.lists(st.integers(), max_size=2)
event = st.fixed_dictionaries(
    {"block_id": texts | values, "event_id": texts | values, "timestamp": moments | numbers | values},
    optional={"host": values, "": values},
)
written = st.one_of(
    st.builds(lambda item, blank: json.dumps(item, **blank), event, st.sampled_from(
        [{}, {"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False}])),
    st.lists(st.tuples(names, values), max_size=5).map(
        lambda pairs: "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"),
)  # fmt: skip


def damaged(text, place, what):
    at = place % (len(text) + 1)
    return text[:at] + what + text[at + (place % 3) :]


pieces = st.sampled_from([*'{}[]",:\\ \n\t0123456789eE.-+TZ', "null", "\x00", "\x7f"])
messages_of_all_kinds = written | st.builds(damaged, written, st.integers(0, 400), pieces)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(st.none() | st.sampled_from([b"", b"blk_1", b"x"]), messages_of_all_kinds), max_size=8))
def test_the_fast_way_says_what_the_parser_says(pairs):
    decoder = Decoder(EventSettings(), TOKENS, max_ahead=HOUR)
    pairs = [(key, text.encode("utf-8", "surrogatepass")) for key, text in pairs]
    sent = 1_700_000_000_000
    expected, reasons = [], []
    for place, (key, value) in enumerate(pairs):
        try:
            block, token, time, unknown = decoder._one(key, value, sent)
            expected.append((block, token, time, 42 + place, unknown))
        except Undecodable as reason:
            reasons.append((place, str(reason)))
    batch, refused = decoder.decode(Messages(*zip(*pairs, strict=True), np.arange(42, 42 + len(pairs)),
                                             np.full(len(pairs), sent)) if pairs else messages_of_none())  # fmt: skip
    columns = zip(batch.names, batch.tokens.tolist(), batch.times.tolist(), batch.offsets.tolist(), strict=True)
    assert [(*row, batch.unknown.get(place)) for place, row in enumerate(columns)] == expected
    assert refused == reasons


def messages_of_none():
    return Messages([], [], np.zeros(0, np.int64), np.zeros(0, np.int64))


def test_the_fast_way_is_taken():
    """Else the property above would say nothing of it."""
    decoder = Decoder(EventSettings(), TOKENS)
    decoder._one = None
    batch, _ = decoder.decode(messages((b"blk_1", encoded()), (None, encoded(timestamp="2008-11-09T20:35:30.5Z"))))
    assert batch.times.tolist() == [1000, 1226262930500]


@given(st.binary() | st.none(), st.binary() | st.none())
def test_any_bytes_are_an_event_or_refused(key, value):
    batch, refused = Decoder(EventSettings(), TOKENS).decode(messages((key, value)))
    assert len(batch) + len(refused) == 1
