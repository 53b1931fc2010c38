"""Which sessions of labelled and unlabelled files a measurement takes."""

from scripts.inputs import read_failing

EVENTS = "timestamp,block_id,event_id\n0,healthy,a\n1,failing,a\n2,unknown,b\n"
LABELS = "BlockId,Label\nhealthy,Normal\nfailing,Anomaly\n"


def names(sessions):
    return [session.block_id for session in sessions]


def test_a_block_without_label_is_failing_only_where_none_has(tmp_path):
    labelled, bare = (tmp_path / name / "events.csv" for name in ("labelled", "bare"))
    for path in (labelled, bare):
        path.parent.mkdir()
        path.write_text(EVENTS)
    labelled.with_name("labels.csv").write_text(LABELS)
    assert names(read_failing("--anomalous", [labelled])) == ["failing"]
    assert names(read_failing("--anomalous", [bare, labelled])) == ["healthy", "failing", "unknown", "failing"]
