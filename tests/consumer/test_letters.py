"""Dead letters of messages that are a trouble themselves: else each owner of the partition dies of them in turn."""

import pytest

from consumer.letters import dead_letter

LIMIT = 1_000_000
"""Bytes that a producer takes, as librdkafka has it."""


class Message:
    def __init__(self, headers=None, key=None, value=b"no event"):
        self._headers, self._parts = headers, (key, value)

    def headers(self):
        if isinstance(self._headers, Exception):
            raise self._headers
        return self._headers

    def key(self):
        return self._parts[0]

    def value(self):
        return self._parts[1]

    def topic(self):
        return "log-events"

    def partition(self):
        return 3

    def offset(self):
        return 17

    def timestamp(self):
        return 1, 1000


UNREADABLE = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "unexpected end of data")


@pytest.mark.parametrize("error", [UNREADABLE, SystemError("it returned a result with an exception set")])
def test_headers_whose_names_nobody_can_read_are_left_out_and_that_is_said(error):
    value, _, headers = dead_letter(Message(error), "not an event: why")
    said = dict(headers)
    assert value == b"no event"
    assert said["dead_letter.reason"] == b"not an event: why"
    assert (said["dead_letter.partition"], said["dead_letter.offset"]) == (b"3", b"17")
    assert b"not UTF-8" in said["dead_letter.headers"]


@pytest.mark.parametrize(
    "headers",
    [[("n" * 990_000, b"")], [(f"trace-{number}", b"") for number in range(50_000)], [("n", b"x" * 990_000)]],
    ids=["a long name", "many", "a long content"],
)
def test_a_letter_with_large_headers_is_cut_so_that_a_producer_takes_it(headers):
    value, _, kept = dead_letter(Message(headers), "not an event: why")
    assert value == b"no event"
    assert sum(len(name) + len(content) + 10 for name, content in kept) < LIMIT / 2
    assert dict(kept)["dead_letter.cut_from_bytes"].isdigit()
    value, key, kept = dead_letter(Message(headers, b"k" * LIMIT, b"v" * LIMIT), "not an event: why")
    assert len(value) + len(key) + sum(len(name) + len(content) + 10 for name, content in kept) < LIMIT


def test_small_headers_are_kept():
    headers = [("trace", b"7"), ("empty", None)]
    assert dead_letter(Message(headers), "not an event: why")[2][:2] == headers
