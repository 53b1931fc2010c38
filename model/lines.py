"""Raw log lines: which blocks a line names, when it was written, and which template it is of.

A line is cut in three steps, the same in training and in the stream:

    shape     each block id becomes <BLOCK>, each run of digits a single 0: cheap, and nearly all lines of a kind
              have one shape, so that what follows is done once a shape
    masked    what is in front of the message is left out, variables become their mask's name, such as <ADDRESS>;
              several of the same in a row, which is a list, become one
    template  of those learned in training, or none
"""

import re
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from model.config import EventSettings
from model.errors import UserError
from model.stamps import stamp_reader
from model.templates import Matcher

BLOCK = "<BLOCK>"
"""What block ids become in a line's shape."""

MAX_NAME_BYTES = 1024
"""Of a line that stands for itself, since no template matches it, so many bytes of UTF-8 are kept."""

_SHAPE_CHARACTERS = 4096  # what is behind is not looked at for the template
_CACHE_BYTES = 64_000_000  # of shapes and masked lines; then remembering begins anew
_ENTRY_BYTES = 200  # what Python takes beside the text itself
_BETWEEN = b"\xff"  # is in no UTF-8 text
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LIST = re.compile(r"(?<!\w)(<[A-Z_]+>)(?:[,;]? \1(?=[\s,;\])}]|$))+")


class LineRules(msgspec.Struct, frozen=True):
    """How a line is cut: the settings `events.block_pattern`, `timestamp_pattern` and so on."""

    block_pattern: str
    timestamp_pattern: str | None
    timestamp_format: str
    message_pattern: str | None
    masks: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, settings: EventSettings) -> "LineRules":
        """Return the rules that the settings name."""
        return cls(
            settings.block_pattern, settings.timestamp_pattern, settings.timestamp_format, settings.message_pattern,
            tuple(settings.masks.items()),
        )  # fmt: skip


class LineFormat(msgspec.Struct, frozen=True):
    """What a model that was trained on raw lines knows of them: how they are cut, and their templates."""

    rules: LineRules
    templates: tuple[str, ...]

    def check(self, settings: EventSettings) -> None:
        """Make sure that lines are cut as the settings say.

        Raises:
            UserError: they are not; the message names the setting.
        """
        today = LineRules.of(settings)
        for name in LineRules.__struct_fields__:
            if getattr(today, name) != getattr(self.rules, name):
                raise UserError(
                    f"events.{name} is not what the model was trained with, so its templates would not fit; "
                    "set it back, or train again with python -m model"
                )


class LineCutter:
    """Cuts lines by rules. What it remembers is bounded by `_CACHE_BYTES`."""

    def __init__(self, rules: LineRules) -> None:
        self._block = re.compile(rules.block_pattern)
        self._find = self._block.findall
        self._stamp = re.compile(rules.timestamp_pattern) if rules.timestamp_pattern else None
        self._stamp_group = self._stamp.groups if self._stamp is not None else 0
        self._message = re.compile(rules.message_pattern) if rules.message_pattern else None
        self._masks = [(re.compile(pattern), f"<{name}>") for name, pattern in rules.masks]
        self._milliseconds = stamp_reader(rules.timestamp_format)

    def cut(self, text: str) -> tuple[Sequence[str], bytes]:
        """Return the blocks that a line names, each once, and the line's shape."""
        blocks, hidden = self._hide(text)
        shape = hidden.translate(_DIGITS).replace(b"0000", b"0")
        while b"00" in shape:
            shape = shape.replace(b"00", b"0")
        return blocks, shape

    def cut_all(self, texts: Iterable[str]) -> tuple[list[Sequence[str]], list[bytes]]:
        """Return blocks and shape of each line, as `cut`; for many lines this is twice as fast."""
        blocks: list[Sequence[str]] = []
        hidden: list[bytes] = []
        for text in texts:
            named, rest = self._hide(text)
            blocks.append(named)
            hidden.append(rest)
        if not hidden:
            return [], []
        letters = np.frombuffer(_BETWEEN.join(hidden).translate(_DIGITS), np.uint8)  # (L,) of all lines
        digit = letters == ord("0")
        keep = np.ones(len(letters), np.bool_)
        np.logical_not(digit[1:] & digit[:-1], out=keep[1:])
        return blocks, letters[keep].tobytes().split(_BETWEEN)

    def _hide(self, text: str) -> tuple[Sequence[str], bytes]:
        """Return the blocks that a line names, and as much of it as matters, with BLOCK in their places."""
        blocks = self._find(text)
        if len(blocks) == 1 and text.count(blocks[0]) == 1:
            text = text.replace(blocks[0], BLOCK)
        elif blocks:
            text = self._block.sub(_hidden, text)
            blocks = list(dict.fromkeys(filter(None, blocks)))
        return blocks, text[:_SHAPE_CHARACTERS].encode("utf-8", "surrogatepass")

    def time(self, text: str) -> int | None:
        """Return when a line says that it was written, in milliseconds since 1970; None where it does not."""
        found = self._stamp.search(text) if self._stamp is not None else None
        return None if found is None else self._milliseconds(found[self._stamp_group] or "")

    def masked(self, shape: bytes) -> str:
        """Return the masked line of a shape."""
        text = shape.decode("utf-8", "surrogatepass")
        front = self._message.search(text) if self._message is not None else None
        if front is not None:
            text = text[front.end() :]
        for pattern, name in self._masks:
            text = pattern.sub(name, text)
        return _LIST.sub(r"\1", " ".join(text.split()))


class LineReader:
    """The hot path: blocks, event id and time of a line, most of it from memory."""

    def __init__(self, lines: LineFormat) -> None:
        self._cutter = LineCutter(lines.rules)
        self._cut = self._cutter.cut
        self._time = self._cutter.time
        self._match = Matcher(lines.templates).match
        self._by_shape: dict[bytes, str | None] = {}
        self._by_masked: dict[str, str | None] = {}
        self._held = 0

    def read(self, text: str) -> tuple[Sequence[str], str, int | None]:
        """Return the blocks that a line names, its event id, and its time in milliseconds, None if it has none.

        The event id is its template's. Where no template matches it is the line itself, cut to `MAX_NAME_BYTES`.
        A line that names no block has no event id.
        """
        blocks, shape = self._cut(text)
        if not blocks:
            return blocks, "", None
        event = self._by_shape.get(shape)
        return blocks, self._rare(text, shape) if event is None else event, self._time(text)

    def read_all(self, texts: Sequence[str]) -> tuple[list[Sequence[str]], list[str], list[int | None]]:
        """Return what `read` returns of each line, as columns; for many lines this is faster."""
        blocks, shapes = self._cutter.cut_all(texts)
        known = map(self._by_shape.get, shapes)
        events = [
            "" if not named else event if event is not None else self._rare(text, shape)
            for named, event, text, shape in zip(blocks, known, texts, shapes, strict=True)
        ]
        return blocks, events, [self._time(text) if named else None for named, text in zip(blocks, texts, strict=True)]

    def _rare(self, text: str, shape: bytes) -> str:
        """Return the event of a line whose shape is new, or of no template."""
        event = self._by_shape[shape] if shape in self._by_shape else self._remember(shape)
        return _name(text) if event is None else event

    def _remember(self, shape: bytes) -> str | None:
        if self._held > _CACHE_BYTES:
            self._by_shape.clear()
            self._by_masked.clear()
            self._held = 0
        masked = self._cutter.masked(shape)
        if masked not in self._by_masked:
            self._by_masked[masked] = self._match(masked)
            self._held += len(masked) + _ENTRY_BYTES
        event = self._by_shape[shape] = self._by_masked[masked]
        self._held += len(shape) + _ENTRY_BYTES
        return event


def _hidden(found: re.Match[str]) -> str:
    """Put BLOCK in the place of the id in a match of the block pattern."""
    start, end = (at - found.start() for at in found.span(found.re.groups))
    return BLOCK if start < 0 else found[0][:start] + BLOCK + found[0][end:]


def _name(text: str) -> str:
    return text.strip().encode("utf-8", "surrogatepass")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
