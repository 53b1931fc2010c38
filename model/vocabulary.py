"""Events as small integers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from model.errors import UserError

PAD, BOS, END, UNK = range(4)
"""Filler behind a window; in front of it; the session is over; an event never seen in training."""

SPECIAL = 4
"""Number of special tokens; the first event's token."""

END_NAME = "<END>"
"""How END is written for people: where an event id is expected, it says that the block ended there."""

UNK_NAME = "<UNK>"

OTHER_NAME = "<OTHER>"
"""How all events that a tally does not count apart are written for people."""

MAX_EVENTS = 60_000
"""Tokens travel as uint16."""


@dataclass(frozen=True)
class Vocabulary:
    """The event ids of training, in a fixed order; token = position + `SPECIAL`.

    `templates` gives texts of event ids; it may know ids that training never saw, which is when a text helps most.
    """

    events: tuple[str, ...]
    templates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, sessions: Iterable[Iterable[str]], templates: Mapping[str, str] | None = None) -> "Vocabulary":
        """Collect the event ids of `sessions`, sorted, so that the order of sessions changes nothing.

        Raises:
            UserError: there are more distinct event ids than tokens can count: these are lines, not templates.
        """
        events = tuple(sorted({event for session in sessions for event in session}))
        if len(events) > MAX_EVENTS:
            raise UserError(
                f"the sessions hold {len(events):,} distinct event ids, more than {MAX_EVENTS:,}; "
                "event ids should name templates, not single log lines"
            )
        return cls(events, templates or {})

    def __len__(self) -> int:
        return SPECIAL + len(self.events)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token of each known event id."""
        return {event: token for token, event in enumerate(self.events, start=SPECIAL)}

    def encode(self, events: Iterable[str]) -> list[int]:
        """Return the tokens of `events`; UNK for those never seen in training."""
        return [self.tokens.get(event, UNK) for event in events]

    def name(self, token: int) -> str:
        """Return the event id of `token`, or the written form of a special one."""
        if token >= SPECIAL:
            return self.events[token - SPECIAL]
        return ("<PAD>", "<BOS>", END_NAME, UNK_NAME)[token]

    def template(self, event: str) -> str | None:
        """Return the text of an event id, None where it is not known."""
        return self.templates.get(event)
