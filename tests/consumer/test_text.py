"""Lines as the consumer takes them."""

import logging
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.crossings import Crossings
from consumer.events import NO_WATERMARK, TOMBSTONE, Messages, Undecodable
from consumer.names import Names
from consumer.settings import Settings
from consumer.text import TextDecoder, decoder_for
from model.bundle import Bundle
from model.config import EventSettings
from model.errors import UserError
from model.lines import LineFormat, LineRules
from model.stamps import LATEST
from model.templates import event_id
from model.vocabulary import UNK

LINES = LineFormat(LineRules.of(EventSettings()), ("drop <BLOCK>", "start <BLOCK>"))
START, DROP = event_id("start <BLOCK>"), event_id("drop <BLOCK>")
HEAD = b"081109 203530 7 INFO dfs.X: "
TIME, HOUR = 1226262930000, 3_600_000


@pytest.fixture
def decoder():
    return TextDecoder(LINES, {START: 7, DROP: 8}, HOUR)


def messages(*pairs, sent=TIME):
    """`pairs`: key and value."""
    keys, values = zip(*pairs, strict=True)
    return Messages(keys, values, np.arange(5, 5 + len(pairs)), np.full(len(pairs), sent))


def test_a_line_becomes_a_row_for_each_of_its_blocks(decoder):
    batch, refused = decoder.decode(
        messages(
            (b"any key", HEAD + b"start blk_1"),
            (None, HEAD + b"drop blk_2 blk_1 blk_2"),
            (b"blk_1", None),
            (None, HEAD + b"the namenode is up"),
            (None, HEAD + b"burn blk_2 \xff"),
            (None, None),
            (None, b"start blk_" + b"1" * 1021),
        )
    )
    assert batch.blocks == ["blk_1", "blk_1", "blk_2", "blk_1", "blk_2"]
    assert batch.tokens.tolist() == [7, 8, 8, TOMBSTONE, UNK]
    assert batch.times.tolist() == [TIME, TIME, TIME, 0, TIME]
    assert batch.offsets.tolist() == [5, 6, 6, 7, 9]
    assert batch.unknown == {4: "081109 203530 7 INFO dfs.X: burn blk_2 \ufffd"}
    assert refused == [(5, "neither key nor value"), (6, "the block id is longer than 1024 bytes")]
    assert decoder.skipped == 1


def test_lines_without_a_block_are_counted_and_skipped(decoder):
    assert decoder.rows(HEAD + b"namenode is up", TIME) == decoder.rows(b"", TIME) == []
    assert decoder.skipped == 2


def test_a_line_without_a_time_is_as_old_as_the_newest_before_it(decoder):
    """As a line of a stack trace, in old logs that are sent today: else it would end every block of its partition."""
    trace, now = (None, b"at start blk_1"), TIME + 10**11
    batch, _ = decoder.decode(messages(trace, (None, HEAD + b"start blk_2"), trace, (b"blk_2", None), trace, sent=now))
    assert batch.times_after(NO_WATERMARK).tolist() == [now, TIME, now, 0, now], (
        "the first of all is as old as its message"
    )
    assert batch.times_after(TIME - 5).tolist() == [TIME - 5, TIME, TIME, 0, TIME]
    assert batch.rows(2, 5).times_after(TIME + 5).tolist() == [TIME + 5, 0, TIME + 5]
    assert decoder.rows(b"start blk_1", now, TIME) == [("blk_1", START, TIME)]


def test_a_line_without_a_time_and_with_none_before_is_as_old_as_its_message(decoder):
    for sent in (77, LATEST):
        assert decoder.rows(b"start blk_1", sent) == [("blk_1", START, sent)]
    with pytest.raises(Undecodable, match="tells no time"):
        decoder.rows(b"start blk_1", -1)


@pytest.mark.parametrize(
    ("line", "sent", "reason"),
    [
        (HEAD + b"start blk_1", TIME - HOUR - 1, r"windows\.max_ahead"),
        (b"start blk_" + b"1" * 1021, TIME, "longer than"),
        (b"start blk_1", LATEST + 1, "the timestamp .* after the year 9999"),
        (b"start blk_1", TIME * 1000, "the timestamp .* after the year 9999"),
    ],
)
def test_what_cannot_be_an_event_is_refused_and_leaves_no_trace(decoder, line, sent, reason):
    batch, ((_, why),) = decoder.decode(messages((None, line), sent=sent))
    assert re.search(reason, why)
    assert len(batch) == 0


def test_many_lines_are_what_each_of_them_is(decoder):
    lines = [
        b"start blk_1",
        b"",
        b"drop blk_1 blk_2",
        b"start blk_" + b"1" * 1021,
        b"burn blk_3",
        b"081109 203530 blk_4",
    ]
    columns = decoder.columns(lines, [5, 5, 6, 7, 8, 9])
    assert columns.places == [0, 2, 2, 4]
    assert [*zip(columns.blocks, columns.events, columns.times, strict=True)] == [
        row for line, sent in ((lines[0], 5), (lines[2], 6), (lines[4], 8)) for row in decoder.rows(line, sent)
    ]
    assert {place: str(reason) for place, reason in columns.refused.items()} == {
        3: "the block id is longer than 1024 bytes",
        5: "the timestamp is further ahead of the message's own than windows.max_ahead allows",
    }
    assert decoder.skipped == 1


@given(st.binary(), st.integers(0, 2**41))
def test_any_bytes_are_rows_or_refused(value, sent):
    decoder = TextDecoder(LINES, {}, HOUR)
    for prefix in (b"", b"blk_1 "):
        try:
            rows = decoder.rows(prefix + value, sent)
        except Undecodable:
            continue
        for block, event, time in rows:
            assert block.startswith("blk_")
            assert 0 < len(event.encode()) <= 1024
            assert 0 <= time <= sent + HOUR


def test_settings_that_do_not_fit_the_model_are_refused(bundle):
    text = Settings(events=EventSettings(format="text"))
    with pytest.raises(UserError, match="knows no templates of raw lines"):
        decoder_for(text, bundle)
    knowing = Bundle(bundle.network, bundle.vocabulary, {}, LINES)
    assert isinstance(decoder_for(text, knowing), TextDecoder)
    with pytest.raises(UserError, match=r"events\.block_pattern is not what"):
        decoder_for(Settings(events=EventSettings(format="text", block_pattern="req-[0-9]+")), knowing)


class Store:
    def __init__(self, *blocks):
        self.blocks = blocks
        self.asked = 0

    def are_open(self, names):
        self.asked += 1
        return np.array([name in self.blocks for name in names], np.bool_)


def test_a_block_in_two_partitions_is_said_once_and_counted(caplog):
    crossings = Crossings("log-events")
    stores = {0: Store(b"a", b"b"), 1: Store(b"c")}
    crossings.look({0: Names.of([b"a", b"b"])}, {0: stores[0]})
    crossings.look({0: Names.of([b"a", b"b"])}, stores)
    crossings.look({0: Names.of([]), 1: Names.of([])}, stores)
    assert (crossings.count, caplog.records) == (0, [])
    with caplog.at_level(logging.ERROR):
        crossings.look({0: Names.of([b"a"]), 1: Names.of([b"x", b"b", b"c", b"a"])}, stores)
        crossings.look({1: Names.of([b"a"])}, stores)
    assert crossings.count == 3
    assert len(caplog.records) == 1
    assert "log-events: block 'b' has events in the partitions 0 and 1" in caplog.text
    assert "docs/lines.md#re-keying" in caplog.text


def test_to_look_for_blocks_in_two_partitions_takes_one_question_to_each():
    """Not one for each pair: 500 partitions would take a hundred times as long to compare as to judge."""
    crossings, stores = Crossings("log-events"), {number: Store(b"%d" % number) for number in range(20)}
    crossings.look({number: Names.of([b"%d" % number, b"7"]) for number in stores}, stores)
    assert crossings.count == 19
    assert {store.asked for store in stores.values()} == {1}


def test_a_block_id_that_would_write_to_a_terminal_is_said_in_one_plain_line(caplog):
    hostile = "x\n2026-01-01 ERROR  all is lost\x1b[2J\x9b\u202e".encode() + b"\xff"
    Crossings("log-events").look({0: Names.of([hostile])}, {0: Store(), 1: Store(hostile)})
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.isprintable()
    assert "block 'x\\n2026-01-01" in line
