"""A new threshold, or a new model with its threshold, is taken by the running consumer, whole or not at all."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from consumer.threshold import Threshold
from model.bundle import Bundle
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.vocabulary import UNK, Vocabulary
from scripts.simulator import simulate
from scripts.verify import verify

BLOCKS = 40


@pytest.fixture
def own(line, artifacts, tmp_path):
    """A line whose artifacts may be replaced."""
    shutil.copytree(artifacts, tmp_path / "artifacts")
    return line(
        model={"path": str(tmp_path / "artifacts" / "model")},
        calibration={"path": str(tmp_path / "artifacts" / "threshold.json")},
        reload={"interval": "200ms"},
        checkpoint={"interval": "1s"},
    )


def other_model():
    """An untrained network with another vocabulary: fewer events, and so other tokens for the same ones."""
    torch.manual_seed(3)
    sessions = simulate(100, 0.0, 2).sessions()
    known = {event for session in sessions for event in session.events} - {"verified"}
    vocabulary = Vocabulary(tuple(sorted(known, reverse=True)))
    network = Autoencoder(Shape(len(vocabulary), 50, 16, 2, 1, 16)).eval()
    with torch.no_grad():
        network.bias[UNK] = -8  # as after training: rarely expected
    bundle = Bundle(network, vocabulary)
    scorer = Scorer(bundle)
    scores = block_scores(sessions, scorer, every=1).blocks
    return bundle, calibrate(scores, scorer, quantile=0.5, every=1, idle_timeout_ms=24 * 3600 * 1000)


def live(seed):
    return [
        (event.block_id, json.dumps(dataclasses.asdict(event)))
        for event in simulate(120, 0.3, seed, prefix=f"{seed}_").events
    ]


def half_blocks(events):
    return [(f"half{number}", json.dumps({"block_id": f"half{number}", "event_id": event, "timestamp": 1}))
            for event in events for number in range(BLOCKS)]  # fmt: skip


def feed(made, messages):
    made.produce(messages)
    made.wait_for(lambda: made.lag() == 0, what="committing all input")


def check(made, *, more_than=10):
    """Nothing is lost and nothing comes twice, whoever judged it."""
    result = verify(made.settings)
    assert result.is_exact, result
    assert result.alerts_expected > more_than
    assert result.alerts_not_compared >= BLOCKS
    alerts = [json.loads(message.value()) for message in made.read(made.settings.topics.alerts)]
    unseen = [alert for alert in alerts
              if alert["block_id"].startswith("half") and alert["offender"]["event_id"] == "never seen"]  # fmt: skip
    assert sorted({alert["block_id"] for alert in unseen}) == sorted(f"half{number}" for number in range(BLOCKS))
    return alerts


def test_a_threshold_and_then_a_model_are_taken_without_a_restart(own):
    process = own.start_consumer()
    own.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")

    def said(text):
        own.wait_for(lambda: text in process.log.read_text(), what=text)

    feed(own, live(71) + half_blocks(["allocate", "receive_start"]))
    path = own.settings.calibration.path
    first = Threshold.load(path)
    (minor,) = (level for level in first.levels if level.name == "minor")
    second = dataclasses.replace(first, levels=(dataclasses.replace(minor, threshold=minor.threshold + 0.5),))
    second.save(path)
    said(f"threshold {second.threshold:g}")
    feed(own, live(72))

    bundle, third = other_model()
    third.save(path)
    said("made for model")
    second.save(path)
    bundle.save(own.settings.model.path)
    said("until python -m calibration has made its threshold")
    feed(own, live(73))
    third.save(path)
    said(f"now model {bundle.fingerprint[:12]}")
    feed(own, half_blocks(["never seen"]) + live(74))
    assert own.stop(process)[0] == 0
    text = process.log.read_text()
    assert text.count("made for model") == text.count("has made its threshold") == 1
    assert text.count("now model") == 2
    assert text.count("assigned partitions") == 1
    assert "Traceback" not in text

    alerts = check(own)
    by_seed = {seed: {(alert["model"], alert["threshold"]) for alert in alerts
                      if alert["block_id"].startswith(f"{seed}_")} for seed in (71, 72, 73, 74)}  # fmt: skip
    old, other = (first.model, second.threshold), (third.model, third.threshold)
    assert by_seed == {71: {(first.model, first.threshold)}, 72: {old}, 73: {old}, 74: {other}}


@pytest.mark.parametrize("fault", ["reload:1", "restore:4"])
def test_killed_around_a_reload_nothing_is_lost_or_doubled(own, fault):
    """Just after the old pair's last commit; while windows are restored under the new pair."""
    process = own.start_consumer(fault)
    own.wait_for(lambda: "assigned" in process.log.read_text(), what="joining")
    feed(own, live(75) + half_blocks(["allocate"]))
    bundle, threshold = other_model()
    bundle.save(own.settings.model.path)
    threshold.save(own.settings.calibration.path)
    own.produce(live(76))
    assert process.wait(timeout=30) == -signal.SIGKILL
    process = own.start_consumer()
    feed(own, half_blocks(["never seen"]) + live(77))
    assert own.stop(process)[0] == 0
    check(own)
