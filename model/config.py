"""Reads config.yaml: environment variables filled in, every value checked, each mistake one sentence."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.errors import UserError

_UNITS = {"ms": "milliseconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


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


class TrainingJob(BaseModel):
    """The part of config.yaml that `python -m model` reads; the rest belongs to the stream."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, hide_input_in_errors=True)

    device: Device = "auto"
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()


Strategy = Literal["max", "mean", "topk"]
"""How the surprisals of a window become its score."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def load(path: Path, schema: type[SettingsT]) -> SettingsT:
    """Read the settings file at `path` as `schema`.

    Raises:
        UserError: the file is missing or no YAML mapping, an environment variable is not set, a key is unknown
            or a value is impossible; the message names the key's path and never a value (it may be a secret).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the settings file ({_reason(error)}); name one with --config") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: this is not valid YAML; check indentation and quotes there") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: the settings file must be a mapping of sections such as 'kafka:'")
    try:
        return schema.model_validate(_with_environment(raw, path, ()))
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_sentence(item) for item in error.errors())) from None


def _with_environment(value: Any, path: Path, where: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _with_environment(item, path, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_environment(item, path, (*where, str(index))) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise UserError(f"{path}: {'.'.join(where)} needs the environment variable {name}, which is not set")
        return os.environ[name]

    return _VARIABLE.sub(fill, value)


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known setting; see the commented config.yaml for those that exist"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
