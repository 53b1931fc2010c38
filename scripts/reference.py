"""`python -m scripts.reference`: writes docs/configuration.md from what the program knows of its settings.

Names and limits are those of the classes that check config.yaml, defaults and descriptions those of config.yaml itself.
So there is nothing to keep in step by hand; a test fails when the page is not what this writes.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from consumer.settings import OURS, Settings
from model.cli import console, run
from model.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?: +(?P<value>'[^']*'|[^#\s][^#]*?))?(?: +# (?P<comment>.*))?")
_CONTINUED = re.compile(r" {20,}# (.*)")

_HEAD = """# Configuration

Every setting of config.yaml. A key that is left out has its default. `${NAME}` in any value is replaced by the
environment variable of that name, `${NAME:-x}` by x where there is none: secrets belong there. Durations are written
`250ms`, `30s`, `10m`, `24h` or `7d`. An unknown key or an impossible value ends each command with one sentence that
names the key.

This page is written by `python -m scripts.reference`; to change it, change the comments of config.yaml.
"""


_KAFKA = """## kafka

Any [setting of librdkafka](https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md): under `kafka` for
every client, under `kafka.consumer` or `kafka.producer` for one kind. [security.md](security.md) has those of a login.

| setting | default |
|---|---|
{defaults}

The consumer's promises rest on these, so they cannot be set:

| setting | |
|---|---|
{ours}
"""


def page() -> str:
    """Return the text of docs/configuration.md.

    Raises:
        UserError: config.yaml lacks a setting, or says nothing about it.
    """
    documented = dict(_documented((ROOT / "config.yaml").read_text(encoding="utf-8")))
    schema = Settings.model_json_schema()
    parts = [_HEAD]
    for name, item in schema["properties"].items():
        if name == "kafka":
            parts.append(_kafka(documented))
        elif "$ref" in item:
            section = schema["$defs"][item["$ref"].rpartition("/")[2]]
            about = section["description"].partition(" — ")[2]
            rows = [_row(f"{name}.{key}", value, documented) for key, value in section["properties"].items()]
            parts.append(_table(name, about[:1].upper() + about[1:], rows))
        else:
            parts.append(_table(name, "", [_row(name, item, documented)]))
    return "\n".join(parts)


def _documented(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield for each key of config.yaml, with its path: value and comment; a mapping's are those of its lines."""
    path: list[tuple[int, str]] = []
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        if continued := _CONTINUED.fullmatch(line):
            _extend(found, path, comment=continued[1])
        elif match := _LINE.fullmatch(line):
            indent = len(match["indent"])
            path = [(depth, key) for depth, key in path if depth < indent]
            _extend(found, path, f"{match['key']}: {match['value'] or ''}", match["comment"] or "")
            path.append((indent, match["key"]))
            found[_name(path)] = (match["value"] or "", match["comment"] or "")
    yield from found.items()


def _name(path: list[tuple[int, str]]) -> str:
    return ".".join(key for _, key in path)


def _extend(found: dict[str, tuple[str, str]], path: list[tuple[int, str]], item: str = "", comment: str = "") -> None:
    """Add what a further line says to the key that it belongs to."""
    value, text = found.get(_name(path), ("", ""))
    found[_name(path)] = (", ".join(filter(None, (value, item))), " ".join(filter(None, (text, comment))))


def _row(name: str, item: Mapping[str, Any], documented: Mapping[str, tuple[str, str]]) -> str:
    default, about = documented.get(name, ("", ""))
    if not about:
        raise UserError(f"config.yaml says nothing about {name}; give it a line with its default and a comment")
    cells = (f"`{name}`", f"`{default}`", _allowed(item), about)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _table(name: str, about: str, rows: list[str]) -> str:
    text = f"{about}\n\n" if about else ""
    table = "\n".join(["| setting | default | may be | |", "|---|---|---|---|", *rows])
    return f"## {name}\n\n{text}{table}\n"


def _allowed(item: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema allows."""
    if "anyOf" in item:
        return " or ".join(_allowed(part) for part in item["anyOf"])
    if "enum" in item:
        return ", ".join(f"`{value}`" for value in item["enum"])
    kind = item.get("type")
    if kind == "string":
        by_format = {"duration": "a duration", "path": "a path"}
        text = f"text like `{item['pattern']}`" if "pattern" in item else "text"
        return by_format.get(item.get("format", ""), text)
    if kind == "array":
        return ", ".join(_allowed(part) for part in item.get("prefixItems", ())) or "a list"
    if kind == "object":
        values = [*item.get("patternProperties", {}).values(), item.get("additionalProperties")]
        return "names, each with " + next((_allowed(value) for value in values if isinstance(value, dict)), "a value")
    words = {"boolean": "`true`, `false`", "null": "`null`", "integer": "a whole number", "number": "a number"}
    limits = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "and below"))
    return " ".join([words[str(kind)], *(f"{word} {item[key]:,}" for key, word in limits if key in item)])


def _kafka(documented: Mapping[str, tuple[str, str]]) -> str:
    known = [f"kafka.{key}" for key in ("bootstrap.servers", "consumer.group.id")]
    defaults = "\n".join(f"| `{key}` | `{documented[key][0]}` |" for key in known)
    return _KAFKA.format(defaults=defaults, ours="\n".join(f"| `{key}` | {why} |" for key, why in OURS.items()))


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(prog="python -m scripts.reference", description="Write docs/configuration.md.").parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    console.print(f"written to {PAGE}")


if __name__ == "__main__":
    run(main)
