"""Which sessions of labelled and unlabelled files a measurement takes, and what is too little for one."""

import pytest

from model.errors import UserError
from model.sessions import read_anomalous
from scripts.inputs import read_healthy

EVENTS = "timestamp,block_id,event_id\n0,healthy,a\n1,failing,a\n2,unknown,b\n"
LABELS = "BlockId,Label\nhealthy,Normal\nfailing,Anomaly\n"


def names(sessions):
    return [session.block_id for session in sessions]


def test_a_block_without_label_is_healthy_where_others_have_labels_and_failing_only_where_none_has(tmp_path):
    labelled, bare = (tmp_path / name / "events.csv" for name in ("labelled", "bare"))
    for path in (labelled, bare):
        path.parent.mkdir()
        path.write_text(EVENTS)
    labelled.with_name("labels.csv").write_text(LABELS)
    assert names(read_anomalous([labelled])) == ["failing"]
    assert names(read_anomalous([bare])) == ["healthy", "failing", "unknown"]
    assert names(read_healthy("--normal", [labelled])) == ["healthy", "unknown"]
    assert names(read_healthy("--normal", [bare])) == ["healthy", "failing", "unknown"]


def test_files_without_enough_such_sessions_are_one_sentence(tmp_path):
    healthy, failing = tmp_path / "healthy.jsonl", tmp_path / "failing.jsonl"
    for path, label in ((healthy, "Normal"), (failing, "Anomaly")):
        path.write_text(f'{{"block_id": "b", "events": ["a"], "label": "{label}"}}\n')
    with pytest.raises(UserError, match=r"healthy.jsonl: no session is anomalous; check the labels"):
        read_anomalous([healthy])
    with pytest.raises(UserError, match=r"^--training: 0 normal sessions are too few, it takes at least 1; "):
        read_healthy("--training", [failing])
    with pytest.raises(UserError, match=r"^--normal: 1 normal sessions are too few, it takes at least 2; "):
        read_healthy("--normal", [healthy], least=2)
