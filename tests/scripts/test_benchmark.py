"""What the benchmark makes of its measurements: shares of a second, pictures, ratios first in its JSON."""

import json
import sys

import pytest

from model.errors import UserError
from scripts.bench.pictures import draw
from scripts.bench.profile import _shares
from scripts.benchmark import _write, main

MAIN = "thread (1): MainThread;main (consumer/__main__.py:43)"
STACKS = [
    f"{MAIN};Service._read (consumer/service.py:173) 60",
    f"{MAIN};Service._take (consumer/service.py:9);of (/x/consumer/scores.py:5);f (torch/nn/f.py:3) 30",
    f"{MAIN};screen (model/scoring.py:82) 10",
    "thread (2): pool;run (threading.py:982);make (consumer/delivery.py:329) 500",
    "thread (1): MainThread;_run_module_as_main (<frozen runpy>:198) 7",
]


def test_a_sample_belongs_to_the_innermost_frame_of_the_project_in_the_main_thread():
    assert _shares(STACKS) == {"service._read": 0.6, "scores": 0.3, "scoring": 0.1}
    assert _shares([]) == {}


def test_pictures_are_drawn_of_what_was_measured(tmp_path):
    results = {
        "profile": {"service._read": 0.6, "scores": 0.395, "scoring": 0.005},
        "open_blocks": {"eps": {"10000": 9.0, "1000000": 8.0}},
    }
    drawn = draw(results, tmp_path / "pictures")
    assert {path.name for path in drawn} == {"second.svg", "scaling.svg"}
    assert all(path.stat().st_size > 1000 for path in drawn)
    assert draw({"profile": {}}, tmp_path) == []


def test_the_json_begins_with_the_ratios(tmp_path):
    out = tmp_path / "out.json"
    pipeline = {"pipeline_ratio": 0.5, "consume_ceiling_eps": 100.0, "pipeline_eps": 50.0}
    results = {
        "scoring": {"cpu": {"share_of_peak": 0.4}},
        "pipeline": pipeline,
        "cold": {"ratio": 0.1, "eps": 10.0},
        "latency": {"exactly_once": {"5000": {"p50": 60.0}}},
        "peers": {"times_as_fast_as": {"plain": 60.0}, "eps": {"plain": 1.0}},
    }
    _write(results, out)
    written = json.loads(out.read_text())
    assert list(written)[:4] == ["pipeline_ratio", "cold_ratio", "peers_times_as_fast_as", "scoring_share_of_peak_cpu"]
    assert written["pipeline_eps"] == pytest.approx(50)
    assert written["latency_ms"] == results["latency"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seconds", "0"), r"--seconds 0: a number above zero is needed"),
        (("--instances", "1", "-2"), r"--instances -2: a number above zero is needed"),
        (("--peers-python", "/none/python"), r"--peers-python /none/python: no such program; .*"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_measured(monkeypatch, options, said):
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    with pytest.raises(UserError, match=f"^{said}$"):
        main()
