"""The test for drift on real logs: silent on what is normal, quick where a new version writes something new."""

import os
from pathlib import Path

import pytest
import torch

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from consumer.artifacts import Artifacts
from consumer.settings import DriftSettings, Settings, TopicSettings
from model.bundle import Bundle
from model.config import ModelSettings, TrainingSettings
from model.scoring import Scorer
from model.sessions import read_normal
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


def on_one_partition(**changes):
    """Waves of like blocks are longest there."""
    return Settings(device="cpu", topics=TopicSettings(partitions=1), drift=DriftSettings(**changes))
