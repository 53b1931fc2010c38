"""Reads config.yaml: environment variables filled in, every value checked, each mistake one sentence."""

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.errors import UserError

_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _duration(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("should be a duration such as 250ms, 30s, 10m, 24h or 7d")
    number, unit = match.groups()
    try:
        duration = timedelta(**{_UNITS[unit]: float(number)})
    except OverflowError:
        raise ValueError("is too long a duration") from None
    if not duration:
        raise ValueError("should be longer than zero")
    return duration


Duration = Annotated[timedelta, BeforeValidator(_duration)]
"""A positive span of time, written 250ms, 30s, 10m, 24h or 7d."""

Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
"""Where the network runs; auto takes CUDA, then MPS, then the CPU."""


class Section(BaseModel):
    """One mapping of config.yaml: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class ModelSettings(Section):
    """`model:` — the shape of the network and where its bundle lies."""

    path: Annotated[Path, Field(strict=False)] = Path("artifacts/model")
    window: int = Field(default=50, ge=2, le=512)
    width: int = Field(default=64, ge=4, le=1024)
    heads: int = Field(default=4, ge=1, le=64)
    layers: int = Field(default=2, ge=1, le=24)
    feedforward: int = Field(default=128, ge=4, le=8192)
    tallied: int = Field(default=32, ge=0, le=256)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSettings":
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) should be a multiple of heads ({self.heads})")
        return self


Share = Annotated[float, Field(gt=0, lt=1)]
"""A part of a whole, neither nothing nor all of it."""


class TrainingSettings(Section):
    """`training:` — how the network learns what normal looks like."""

    epochs: int = Field(default=100, ge=1, le=100_000)
    batch_size: int = Field(default=256, ge=1, le=1_000_000)
    learning_rate: float = Field(default=0.003, gt=0, le=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    corruption: Annotated[tuple[Share, Share], Field(strict=False)] = (0.001, 0.9)
    swaps: float = Field(default=0.95, ge=0, le=1)
    averaging: float = Field(default=0.9995, ge=0, lt=1)
    seed: int = Field(default=1, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _corruption_ascends(self) -> "TrainingSettings":
        if self.corruption[0] > self.corruption[1]:
            raise ValueError("corruption should be a lower and an upper share, such as [0.001, 0.9]")
        return self


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None


def _with_one_group(text: str) -> str:
    if _compiled(text).groups > 1:
        raise ValueError("should have at most one group in round brackets; write (?:…) for the others")
    return text


def _over_shape(text: str) -> str:
    _compiled(text)
    if _COUNTED_DIGITS.search(text) or re.search("[1-9]", _NO_DIGITS.sub("", text)):
        raise ValueError("asks for certain digits, but here every number of a line has become a single 0; write \\d+")
    return text


_COUNTED_DIGITS = re.compile(r"(?:\\[dw]|\[[^\]]*(?:0-9|\\[dw])[^\]]*\])\{(?:[2-9]|\d\d)")
_NO_DIGITS = re.compile(r"\\[xuU][0-9A-Fa-f]+|\\\d|0-9|\{[\d,]*\}")  # digits in a pattern that are none in a line

Extract = Annotated[str, AfterValidator(_with_one_group)]
"""A regular expression whose group, where it has one, else all that it matches, is what is looked for in a line."""

OverShape = Annotated[str, AfterValidator(_over_shape)]
"""A regular expression for a line in which every number has become 0."""

MaskName = Annotated[str, Field(pattern=r"^[A-Z][A-Z_]{0,31}$")]

STAMPS = ("iso", "ms", "s")
"""Values of `events.timestamp_format` that are no strptime format: ISO 8601, and numbers since 1970."""


_MOMENT = datetime(2008, 11, 10, 22, 35, 36, 123456, tzinfo=UTC)  # each part of it has all its digits


class EventSettings(Section):
    """`events:` — the names of an event's fields, or how to cut a raw log line."""

    format: Literal["json", "text"] = "json"
    block_id: str = Field(default="block_id", min_length=1)
    event_id: str = Field(default="event_id", min_length=1)
    timestamp: str = Field(default="timestamp", min_length=1)
    block_pattern: Extract = r"blk_-?\d+"
    timestamp_pattern: Extract | None = r"^\d{6} \d{6}"
    timestamp_format: str = "%y%m%d %H%M%S"
    message_pattern: OverShape | None = r"^\d+ \d+ \d+ \w+ \S+: "
    masks: dict[MaskName, OverShape] = {
        "ID": r"(?i)\b[0-9a-f]+(?:-[0-9a-f]+){4}\b",
        "ADDRESS": r"/?\b\d+\.\d+\.\d+\.\d+(?::\d+)?\b|(?i:(?<![\w:])(?:[0-9a-f]*:){3,}[0-9a-f]*(?![\w:]))",
        "PATH": r"(?<!\w)\w+://[^\s,;]+|(?<![\w/])(?:/[\w.$<>@+~-]+){2,}/?",
        "HEX": r"(?i)\b(?:0x[0-9a-f]+|(?:[a-f]+\d[a-f]|\d[a-f]+\d)[0-9a-f]*)\b",
        "DURATION": r"\b\d+(?:\.\d+)? ?(?:[munµ]?s|sec(?:ond)?s?|milli(?:s|seconds?)|min(?:ute)?s?|hours?|days?)\b",
        "NUMBER": r"(?:(?<!\S)[-+])?\d+(?:\.\d+)*",
    }

    @model_validator(mode="after")
    def _distinct(self) -> "EventSettings":
        if len({self.block_id, self.event_id, self.timestamp}) < 3:
            raise ValueError("block_id, event_id and timestamp should name three different fields")
        return self

    @model_validator(mode="after")
    def _lines_can_be_cut(self) -> "EventSettings":
        if re.search(self.block_pattern, ""):
            raise ValueError("block_pattern should not match where there is nothing; write + where it says *")
        if self.timestamp_format in STAMPS:
            return self
        if not re.search("%[YyGcDx]", self.timestamp_format):
            raise ValueError(
                "timestamp_format should name the year (%Y or %y), or be iso, ms or s; for lines without a year set "
                "timestamp_pattern to null, which takes the time of the Kafka message"
            )
        try:
            datetime.strptime(_MOMENT.strftime(self.timestamp_format), self.timestamp_format)  # noqa: DTZ007 - the same
        except (ValueError, re.error) as error:
            why = str(error).partition(" in format")[0]
            raise ValueError(
                f"timestamp_format would give no line a time: {why}; the directives are those of Python's strptime, "
                "and a literal % is %%"
            ) from None
        return self


class TrainingJob(BaseModel):
    """The part of config.yaml that `python -m model` reads; the rest belongs to the stream."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)

    device: Device = "auto"
    events: EventSettings = EventSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()


Strategy = Literal["max", "mean", "topk"]
"""How the surprisals of a window become its score."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class _Refused(yaml.MarkedYAMLError):
    """YAML that PyYAML takes and the settings do not; the problem is for people."""


class _Loader(yaml.SafeLoader):
    """Reads YAML without letting the last of two equal keys win, which may stand far apart."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping, of which no key is set twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no setting is called so
            if key.value in lines:
                problem = f"{key.value} is set here and in line {lines[key.value]} already; keep one of the two"
                raise _Refused(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node: 2020-13-45 without quotes has none, since it is taken for a date."""
        try:
            return super().construct_object(node, deep)
        except ValueError:
            problem = "a value here looks like a date or a number, but is none; put it in quotes if it is text"
            raise _Refused(problem=problem, problem_mark=node.start_mark) from None


def load(path: Path, schema: type[SettingsT]) -> SettingsT:
    """Read the settings file at `path` as `schema`.

    Raises:
        UserError: the file is missing or no YAML mapping, an environment variable is not set, a key is unknown or
            set twice, or a value is impossible; the message names the key's path and never a value (it may be a
            secret).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the settings file ({_reason(error)}); name one with --config") from None
    try:
        raw = _Loader(text).get_single_data()
        raw = {} if raw is None else _with_environment(raw, path, ())
    except RecursionError:
        raise UserError(f"{path}: a value holds itself, or lists are nested too deeply; write it out") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        invalid = "this is not valid YAML; check indentation and quotes there"
        raise UserError(f"{path}{where}: {error.problem if isinstance(error, _Refused) else invalid}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: the settings file must be a mapping of sections such as 'kafka:'")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_sentence(item) for item in error.errors())) from None


def _with_environment(value: Any, path: Path, where: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _with_environment(item, path, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_environment(item, path, (*where, str(index))) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise UserError(f"{path}: {'.'.join(where)} holds a NUL byte, which no path or name may; remove it")

    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise UserError(f"{path}: {'.'.join(where)} needs the environment variable {name}, which is not set")
        return found

    return _VARIABLE.sub(fill, value)


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known setting; see the commented config.yaml for those that exist"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
