"""The test for drift on real logs: silent on what is normal, quick where a new version writes something new."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from consumer.artifacts import Artifacts
from consumer.settings import DriftSettings, Settings, TopicSettings
from model.bundle import Bundle
from model.config import ModelSettings, TrainingSettings
from model.errors import UserError
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.sessions import Session, read_normal
from model.training import train
from model.vocabulary import Vocabulary
from scripts import drift
from scripts.drift import measure, streamed

REAL = Path(os.environ.get("LOG_DATA", Path(__file__).parents[2] / "../shared/data")) / "hdfs"


@pytest.mark.data
@pytest.mark.skipif(not REAL.is_dir(), reason="no real logs here: name their folder in LOG_DATA")
def test_on_real_logs_it_is_silent_until_something_changes(monkeypatch):
    """With a crude model, since the test asks nothing of it."""
    monkeypatch.setattr(drift, "AFTER", 2000)
    sessions = read_normal([REAL / "train_normal.jsonl"]).sessions
    vocabulary = Vocabulary.of(session.events for session in sessions)
    network = train(
        [vocabulary.encode(session.events) for session in sessions[:1500]],
        len(vocabulary),
        ModelSettings(width=32, heads=2, layers=1, feedforward=32),
        TrainingSettings(epochs=6),
        torch.device("cpu"),
    )
    bundle = Bundle(network, vocabulary)
    scorer = Scorer(bundle)
    scores = block_scores(read_normal([REAL / "calibration_normal.jsonl"]).sessions[:3000], scorer, every=1).blocks
    threshold = calibrate(scores, scorer, quantile=0.95, every=1, idle_timeout_ms=24 * 3600 * 1000)
    settings = on_one_partition()
    artifacts = Artifacts(bundle, threshold)
    normal = read_normal([REAL / "test_normal.jsonl"]).sessions
    quiet, changes = measure(settings, artifacts, normal[:2000], orders=3, seed=1)
    quiet.append(streamed(settings, artifacts, REAL / "replay" / "events.csv.gz"))
    assert [row.blocks for row in quiet] == [2000, 6000, 11_501]
    assert [row.alarms for row in quiet] == [0, 0, 0]
    assert 0.03 < quiet[-1].alerting / quiet[-1].blocks < 0.1, "failing blocks are among them"
    new = next(change for change in changes if change.change.startswith("a new event") and change.share == 1)
    assert new.found == 3
    assert new.most <= 1500
    hasty = on_one_partition(batch=10)
    assert streamed(hasty, artifacts, REAL / "replay" / "events.csv.gz").alarms == 1, "which is why blocks are batched"


def test_where_every_changed_block_alerts_none_is_left_that_is_silent(monkeypatch):
    def scored(sessions, *_, **__):
        return SimpleNamespace(blocks=np.array([float(session.events != ("a", "b")) for session in sessions]))

    monkeypatch.setattr(drift, "AFTER", 20)
    monkeypatch.setattr(drift, "block_scores", scored)
    vocabulary = Vocabulary(("a", "b"))
    bundle = Bundle(Autoencoder(Shape(len(vocabulary), 5, 16, 2, 1, 16)).eval(), vocabulary)
    threshold = calibrate(np.zeros(40), Scorer(bundle), quantile=0.95, every=1, idle_timeout_ms=1)
    sessions = [Session(f"{number}", ("a", "b")) for number in range(30)]
    _, changes = measure(on_one_partition(), Artifacts(bundle, threshold), sessions, orders=1, seed=1)
    assert {change.alerting for change in changes} == {1.0}
    assert "the same, silent blocks only" not in {change.change for change in changes}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--orders", "0"), "--orders 0: at least one is needed"),
        (("--seed", "-1"), "--seed -1: zero or a number above it is needed"),
        ((), "--normal: 0 normal sessions are too few, it takes at least 2; .*"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(Artifacts, "load", lambda _: None)
    failing, config = tmp_path / "failing.jsonl", tmp_path / "config.yaml"
    failing.write_text('{"block_id": "b", "events": ["a"], "label": "Anomaly"}\n')
    config.write_text("device: cpu\n")
    monkeypatch.setattr(sys, "argv", ["drift", "--config", str(config), "--normal", str(failing), *options])
    with pytest.raises(UserError, match=f"^{said}$"):
        drift.main()


def on_one_partition(**changes):
    """Waves of like blocks are longest there."""
    return Settings(device="cpu", topics=TopicSettings(partitions=1), drift=DriftSettings(**changes))
