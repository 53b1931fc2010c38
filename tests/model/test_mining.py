"""Training on raw logs, and reading them with what was learned."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from model.bundle import Bundle
from model.config import EventSettings
from model.errors import UserError
from model.lines import LineRules
from model.mining import mine
from model.network import Autoencoder, Shape
from model.rawlog import is_raw
from model.sessions import read_normal, read_sessions
from model.templates import event_id
from model.vocabulary import Vocabulary

RULES = LineRules.of(EventSettings())
ROOT = Path(__file__).parents[2]


def line(second, message):
    return f"081109 2035{second:02} 14 INFO dfs.X: {message}\n"


LOG = [
    line(1, "start blk_1 size 10"),
    line(2, "start blk_2 size 2000"),
    "starting up\n",
    line(3, "disk of blk_3 is on fire"),
    "    at blk_3.java\n",
    line(4, "stop blk_1"),
    line(5, "drop blk_2 blk_3"),
    line(9, "stop blk_4"),
]
START, STOP, DROP = (event_id(text) for text in ("start <BLOCK> size <NUMBER>", "stop <BLOCK>", "drop <BLOCK>"))


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "raw.log.gz"
    path.write_bytes(gzip.compress("".join(LOG).encode() + b"\xff is no UTF-8\n"))
    (tmp_path / "labels.csv").write_text("BlockId,Label\nblk_1,Normal\nblk_3,Anomaly\n")
    return path


def sessions(mined):
    return {session.block_id: session.events for session in mined.sessions}


def test_templates_come_from_the_lines_of_healthy_blocks_alone(log):
    mined = mine([log], RULES)
    assert sessions(mined) == {"blk_1": (START, STOP), "blk_2": (START, DROP), "blk_4": (STOP,)}
    assert sorted(mined.texts) == sorted([START, STOP, DROP])
    assert mined.left_out == 1
    assert "labels from labels.csv" in mined.notes[0]


def test_a_time_range_takes_whole_blocks(log):
    first = 1226262900000
    mined = mine([log], RULES, begin=first + 1000, end=first + 5000)
    assert sessions(mined) == {"blk_1": (START, STOP)}
    assert mined.outside == 2
    with pytest.raises(UserError, match="no healthy block is left"):
        mine([log], RULES, begin=first + 60_000)


def test_a_time_range_goes_by_times_not_by_the_order_of_lines(tmp_path):
    late, early = tmp_path / "late.log", tmp_path / "early.log"
    early.write_text(line(1, "start blk_1 size 10") + line(2, "start blk_2 size 10") + line(3, "stop blk_2"))
    late.write_text(line(8, "stop blk_1") + line(9, "stop blk_3"))
    for paths in ([early, late], [late, early]):
        assert sessions(mine(paths, RULES, end=1226262905000)) == {"blk_2": (START, STOP)}
        assert sessions(mine(paths, RULES, begin=1226262905000)) == {"blk_3": (STOP,)}


def test_logs_are_one_stream(log, tmp_path):
    more = tmp_path / "later" / "raw.log"
    more.parent.mkdir()
    more.write_text(line(30, "stop blk_2"))
    mined = mine([log, more], RULES)
    assert sessions(mined)["blk_2"] == (START, DROP, STOP)
    assert sessions(read_normal([log, more], mined.lines)) == sessions(mined), "in calibration as in training"


def test_a_log_that_is_given_twice_is_refused(log):
    with pytest.raises(UserError, match="the same file is given twice"):
        mine([log, log.parent / ".." / log.parent.name / log.name], RULES)


def test_labels_of_other_blocks_are_a_mistake(log, tmp_path):
    labels = tmp_path / "other.csv"
    labels.write_text("BlockId,Label\nblk_77,Anomaly\n")
    with pytest.raises(UserError, match="none of the 4 blocks"):
        mine([log], RULES, labels=labels)


def test_what_is_read_later_is_cut_as_in_training(log):
    mined = mine([log], RULES)
    file = read_sessions(log, mined.lines)
    assert {session.block_id: session.events for session in file.sessions} == {
        "blk_1": (START, STOP),
        "blk_2": (START, DROP),
        "blk_3": (LOG[3].strip(), LOG[4].strip(), DROP),
        "blk_4": (STOP,),
    }
    assert {session.block_id for session in file.sessions if session.anomalous} == {"blk_3"}
    assert file.format == "raw log lines"
    assert file.span == (1226262901000, 1226262909000)


@pytest.mark.parametrize(
    "text",
    [
        '{"block_id": "blk_1", "events": ["a"]}\n',
        "timestamp,block_id,event_id\n1,blk_1,a\n",
        "nothing of the kind\n",
        "",
    ],
)
def test_other_files_are_not_raw(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(text)
    assert not is_raw(path, RULES)


def test_without_lines_in_the_model_a_raw_log_is_no_format(log):
    with pytest.raises(UserError, match="raw log lines for a model trained on such"):
        read_sessions(log)


def test_a_bundle_keeps_rules_and_templates(log, tmp_path):
    mined = mine([log], RULES)
    vocabulary = Vocabulary.of((session.events for session in mined.sessions), mined.texts)
    network = Autoencoder(Shape(len(vocabulary), 6, 16, 2, 1, 16)).eval()
    bundle = Bundle(network, vocabulary, {}, mined.lines)
    bundle.save(tmp_path / "model")
    loaded = Bundle.load(tmp_path / "model")
    assert loaded.lines == mined.lines
    assert loaded.vocabulary.template(START) == "start <BLOCK> size <NUMBER>"
    assert loaded.fingerprint != Bundle(network, vocabulary).fingerprint
    facts = tmp_path / "model" / "model.json"
    for old, new in (("stop <BLOCK>", "stop <*>"), ('"templates": [', '"patterns": [')):
        damaged = facts.read_text()
        facts.write_text(damaged[: damaged.index('"lines"')] + damaged[damaged.index('"lines"') :].replace(old, new))
        with pytest.raises(UserError, match=r"fingerprint does not match|damaged"):
            Bundle.load(tmp_path / "model")
        facts.write_text(damaged)


def test_other_rules_are_refused_by_name(log):
    lines = mine([log], RULES).lines
    lines.check(EventSettings())
    for name, value in {"block_pattern": "b[0-9]+", "masks": {"NUMBER": r"\d+"}, "message_pattern": None}.items():
        with pytest.raises(UserError, match=rf"events\.{name} is not what the model was trained with"):
            lines.check(EventSettings(**{name: value}))


def test_the_command_trains_on_a_raw_log(log, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("training: {epochs: 1}\nmodel: {width: 8, heads: 2, layers: 1, feedforward: 8}\n")
    out = tmp_path / "model"

    def train(*options):
        return subprocess.run(
            [sys.executable, "-m", "model", "--config", config, "--out", out, "--normal", *options],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = train(log, "--to", "2008-11-09T20:35:09")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 normal blocks, 1 anomalous ones left out, 1 not as a whole in the time range" in done.stdout
    bundle = Bundle.load(out)
    assert set(bundle.vocabulary.events) == {START, STOP, DROP}
    assert bundle.lines.rules == RULES

    other = tmp_path / "sessions.jsonl"
    other.write_text('{"block_id": "b", "events": ["E5"]}\n')
    for options, said in (
        ((log, other), "cannot be trained on together"),
        ((log, "--templates", other), "--templates belongs to files of events"),
        ((other, "--to", "2008-11-10"), "belong to raw log lines"),
    ):
        done = train(*options)
        assert done.returncode == 2
        assert said in done.stderr.replace("\n", " ")
