"""Dead letters: messages that cannot be decoded, as they were, with why and where from."""

from confluent_kafka import Message

from consumer.delivery import Headers

_BYTES = 500_000
_HEADER_BYTES = 10  # that a header takes beside its name and content, at most

_KINDS = {
    "not an event": "not_an_event",
    "the message key is not": "foreign_key",
    "the block id": "bad_id",
    "the event id": "bad_id",
    "the timestamp is further ahead": "far_future",
    "the timestamp": "bad_timestamp",
    "the line tells no time": "bad_timestamp",
    "neither key": "bad_tombstone",
    "the tombstone": "bad_tombstone",
}
_OTHER = "other"

KINDS = (*dict.fromkeys(_KINDS.values()), _OTHER)
"""Every kind of reason, for metrics: reasons themselves quote what was sent, and there is no end of them."""


def kind(reason: str) -> str:
    """Return which of `KINDS` a reason is of."""
    return next((name for start, name in _KINDS.items() if reason.startswith(start)), _OTHER)


def dead_letter(message: Message, reason: str) -> tuple[bytes | None, bytes | None, Headers]:
    """Return value, key and headers of the dead letter for a message, cut if it is larger than brokers may take."""
    headers: Headers = [
        *_headers(message),
        ("dead_letter.reason", reason.encode("utf-8", "replace")[:1000]),
        ("dead_letter.topic", message.topic().encode()),
        ("dead_letter.partition", str(message.partition()).encode()),
        ("dead_letter.offset", str(message.offset()).encode()),
        ("dead_letter.timestamp", str(message.timestamp()[1]).encode()),
    ]
    key, value = message.key(), message.value()
    size = len(key or b"") + len(value or b"")
    size += sum(len(name.encode()) + len(content or b"") + _HEADER_BYTES for name, content in headers)
    if size > _BYTES:  # with its new headers it might be more than the brokers take; the source has it all
        headers = [*headers[-5:], ("dead_letter.cut_from_bytes", str(size).encode())]
        key, value = key and key[:1000], value and value[:_BYTES]
    return value, key, headers


def _headers(message: Message) -> Headers:
    try:
        return message.headers() or []
    except (SystemError, UnicodeDecodeError):  # so says the binding of names that are not UTF-8
        return [("dead_letter.headers", b"unreadable: a name is not UTF-8")]
