"""Templates: what a kind of log line has in common. Learned from healthy lines once, afterwards only matched.

A template is the words of a masked line (see `model.lines`), with `<*>` where lines of the kind differ.
"""

import hashlib
from collections.abc import Iterable, Sequence

from drain3.drain import Drain

ANY = "<*>"
"""Stands in a template for any one word."""

_SIMILARITY = 0.6  # variables are masked before, so what still differs tells kinds apart more often than not


def learn(masked: Iterable[str]) -> tuple[str, ...]:
    """Return the templates of masked lines, sorted, learned with Drain; it takes each distinct line once.

    Drain's tree depends on the order of the lines: the same lines in the same order give the same templates.
    """
    drain = Drain(sim_th=_SIMILARITY, param_str=ANY)
    for line in dict.fromkeys(masked):
        drain.add_log_message(line)
    return tuple(sorted({cluster.get_template() for cluster in drain.clusters}))


def event_id(template: str) -> str:
    """Return the event id of a template: of its text, so that it means the same in every model that knows it."""
    return "T" + hashlib.blake2b(template.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()


class Matcher:
    """Finds the template of a masked line: each word equal, or any where the template says `<*>`.

    Of several that match it is the one with the fewest `<*>`, and of these the first in order.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self._ids = [event_id(template) for template in templates]
        self._exact: dict[tuple[str, ...], int] = {}
        self._open: dict[tuple[int, str], list[tuple[int, int, tuple[str, ...]]]] = {}
        for place, template in enumerate(templates):
            words = tuple(template.split())
            if ANY not in words:
                self._exact.setdefault(words, place)
            else:
                self._open.setdefault((len(words), words[0]), []).append((words.count(ANY), place, words))

    def match(self, masked: str) -> str | None:
        """Return the event id of the line's template, None where none matches."""
        words = tuple(masked.split())
        place = self._exact.get(words)
        if place is None and words:
            candidates = (*self._open.get((len(words), words[0]), ()), *self._open.get((len(words), ANY), ()))
            fitting = [(count, at) for count, at, template in candidates if _fits(template, words)]
            place = min(fitting)[1] if fitting else None
        return None if place is None else self._ids[place]


def _fits(template: Sequence[str], words: Sequence[str]) -> bool:
    return all(wanted in (word, ANY) for wanted, word in zip(template, words, strict=True))
