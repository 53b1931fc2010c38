"""Failures made from healthy sessions, and the table that they give."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from model.errors import UserError
from scripts.ablation import main
from scripts.simulator import simulate, write
from scripts.synthetic import KINDS, broken
from scripts.systems import HDFS

ROOT = Path(__file__).parents[2]


def test_failures_are_what_their_names_say_and_none_is_known_to_be_healthy():
    sessions = simulate(400, 0.0, 1).sessions()
    known = {session.events for session in sessions}
    made = broken(sessions, known, count=60, seed=3)
    assert made.keys() == KINDS.keys()
    assert all(len(some) == 60 for some in made.values())
    assert not known & {session.events for some in made.values() for session in some}
    assert made == broken(sessions, known, count=60, seed=3) != broken(sessions, known, count=60, seed=4)
    beginnings = {events[:end] for events in known for end in range(len(events))}
    assert all(session.events in beginnings for session in made["truncated"])
    counts = [Counter(events) for events in known]
    for session in made["kind missing"]:
        left = Counter(session.events)
        assert any(len(healthy) == len(left) + 1 and left <= healthy for healthy in counts)
    for session in made["storm"]:
        assert max(map(len, known)) + 15 >= len(session.events) > 3


def test_the_table_tells_variants_apart(tmp_path):
    for name, seed in (("train", 1), ("held-out", 2)):
        write(simulate(300, 0.0, seed), HDFS, tmp_path / name)
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {"device": "cpu", "model": {"width": 16, "heads": 2, "feedforward": 32}, "training": {"batch_size": 64}}
        )
    )
    out = tmp_path / "ablation.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "scripts.ablation", "--config", config,
            "--normal", tmp_path / "train" / "sessions.jsonl", "--held-out", tmp_path / "held-out" / "sessions.jsonl",
            "--epochs", "20", "--seeds", "1", "--only", "as configured", "one layer", "--json", out,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["variant"], row["strategy"]) for row in rows] == [
        ("as configured", "max"), ("as configured", "mean"), ("as configured", "topk"), ("one layer", "max"),
    ]  # fmt: skip
    for row in rows:
        assert [at["q"] for at in row["at"]] == [0.99, 0.995], "300 held-out sessions are too few for 0.999"
        for at in row["at"]:
            assert 0 <= min(at[kind] for kind in KINDS) <= at["recall"] <= max(at[kind] for kind in KINDS) <= 1
        assert row["at"][0]["recall"] >= row["at"][1]["recall"] > 0
        assert row["at"][0]["threshold"] <= row["at"][1]["threshold"]
    assert "one layer" in done.stdout


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Runs the command on sessions of the events `a b` and on given ones, with a small model."""
    config, train, held_out = tmp_path / "config.yaml", tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    config.write_text("{device: cpu, model: {width: 16, heads: 2, feedforward: 32}, training: {batch_size: 64}}")
    train.write_text('{"block_id": "b", "events": ["a", "b"]}\n')

    def run(sessions, *options):
        held_out.write_text("".join(f"{json.dumps(session)}\n" for session in sessions))
        files = ["--config", config, "--normal", train, "--held-out", held_out]
        monkeypatch.setattr(sys, "argv", ["ablation", *map(str, files), *options])
        main()

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seeds", "0"), "--seeds 0: at least one is needed"),
        (("--epochs", "-1"), "--epochs -1: at least one is needed"),
        ((), "--held-out: 0 normal sessions are too few, it takes at least 99; .*"),
    ],
)
def test_a_mistake_is_one_sentence(run_main, options, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        run_main([{"block_id": "b", "events": ["a"], "label": "Anomaly"}], *options)


def test_failures_that_short_sessions_cannot_have_are_left_out(run_main, tmp_path, capsys):
    out = tmp_path / "ablation.json"
    only = ("--only", "one layer", "--seeds", "1", "--epochs", "1")
    run_main([{"block_id": f"{number}", "events": ["a"]} for number in range(120)], *only, "--json", str(out))
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot be made from these sessions: kind missing, run missing, truncated " in said
    (row,) = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert row["at"][0].keys() == {"q", "threshold", "recall", "misplaced", "spliced", "storm"}
