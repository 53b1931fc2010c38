"""The benchmark's parts, small: what they say about a run is what happened in it."""

import subprocess
from argparse import Namespace

import pytest

from model.errors import UserError
from scripts.bench.latency import _probe
from scripts.bench.robustness import garbage, pause
from scripts.bench.scoring import scoring
from scripts.bench.stage import Stage
from scripts.bench.throughput import sessions_of
from scripts.simulator import simulate


@pytest.fixture
def stage(line, kafka, tmp_path):
    return Stage(line().settings, kafka, tmp_path, simulate(30, 0.0, 1).events)


def test_a_flood_of_garbage_is_counted_message_by_message(stage):
    found = garbage(stage, Namespace(garbage=600))
    assert found["good"] == found["good_alerted"] == 60
    assert found["bad"] == found["dead_letters"] == 600
    assert found["resident_mb_at_end"] > 50


def test_after_a_pause_every_block_alerts_that_ended_in_mid_life(stage):
    found = pause(stage, Namespace(pause_blocks=3000))
    assert found["open_blocks"] == found["alerted_blocks"] == 3000
    assert found["alerts"] >= 3000
    assert found["resident_mb_at_most"] >= found["resident_mb_before"]


def test_the_network_is_measured_on_every_distinct_window(stage):
    found = scoring(stage, Namespace())["cpu"]
    shown = {tuple(life[:end]) for life in sessions_of(stage) for end in range(1, min(50, len(life)) + 1)}
    whole = {tuple(life) for life in sessions_of(stage)}
    assert found["distinct_windows"] >= len(shown) + len(whole)
    assert 0 < found["share_of_peak"] < 1
    assert found["furthest_from_exact"] < 0.001


def test_a_load_that_is_over_too_soon_is_one_sentence(stage):
    with subprocess.Popen(["true"]) as load:
        load.wait()
        with pytest.raises(UserError, match="give more --seconds"):
            _probe(stage, stage.trial().settings, load)
