"""What `scripts.faults` leaves behind when it cannot go on, and what it refuses to begin with."""

import sys

import pytest

from model.errors import UserError
from scripts import faults
from scripts.faults import Artifacts, LocalKafka, main


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text("device: cpu\n")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["faults", "--config", str(config), *map(str, options)])
        return main()

    return run


def test_the_broker_ends_whatever_happens(monkeypatch, run_main):
    def refuse(*_):
        raise UserError("refused")

    done = []
    monkeypatch.setattr(Artifacts, "load", lambda _: None)
    monkeypatch.setattr(LocalKafka, "up", lambda _: done.append("up"))
    monkeypatch.setattr(LocalKafka, "down", lambda _, **how: done.append(how))
    monkeypatch.setattr(faults, "ensure_topics", refuse)
    with pytest.raises(UserError, match="refused"):
        run_main()
    assert done == ["up", {"purge": True}]


def test_a_mistake_is_told_before_the_broker_starts(monkeypatch, run_main, tmp_path):
    monkeypatch.setattr(LocalKafka, "up", lambda _: pytest.fail("it started"))
    monkeypatch.chdir(tmp_path)  # where no model is
    for options, said in (
        (("--instances", 0), r"^--instances 0: at least one is needed$"),
        (("--events", -5), r"^--events -5: at least one is needed$"),
        (("--keep", tmp_path), r"^--keep .*: has other things in it; name an empty or a new folder$"),
        ((), r"python -m model"),
    ):
        with pytest.raises(UserError, match=said):
            run_main(*options)
