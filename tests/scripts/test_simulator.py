from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from model.sessions import read_events, read_labels, read_sessions, read_templates
from scripts import simulator
from scripts.simulator import TEMPLATES, simulate
from scripts.systems import HDFS, SYSTEMS, VM

seeds = st.integers(0, 2**64)
either_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
every_fault = pytest.mark.parametrize(
    ("system", "kind"),
    [(system, kind) for system in SYSTEMS.values() for kind in system.faults],
    ids=lambda value: getattr(value, "name", value),
)


def follows(events, first, second):
    """Whether each `second` answers a `first` before it, and each `first` is answered."""
    open_ = 0
    for event in events:
        open_ += (event == first) - (event == second)
        if open_ < 0:
            return False
    return open_ == 0


def is_healthy_hdfs(events):
    count = Counter(events)
    copies, deletions = count["replicate"], count["invalidate"]
    steps = [event for event in events if event != "read_broken_off"]
    return (
        count["allocate"] == 1
        and steps[0] in ("allocate", "receive_start")
        and count["responder_end"] == 3
        and follows(events, "responder_end", "received")
        and count["receive_start"] == count["stored"] == 3 + copies
        and copies <= 1
        and all(count[event] == copies for event in ("transfer_start", "copy_received", "transferred"))
        and follows(events, "replicate", "transfer_start")
        and deletions in (0, 3)
        and follows(events, "invalidate", "deleted")
        and not count.keys() & {"write_exception", "mirror_exception", "responder_interrupted"}
    )


def is_healthy_vm(events):
    count = Counter(events)
    return (
        events[0] == "vm_requested"
        and events[-2:] == ("resources_released", "vm_deleted")
        and all(
            follows(events, first, second)
            for first, second in [
                ("vm_scheduled", "resources_claimed"),
                ("image_fetch", "image_fetched"),
                ("boot_started", "boot_finished"),
                ("resize_requested", "resized"),
                ("snapshot_started", "snapshot_stored"),
                ("migration_started", "memory_copied"),
                ("memory_copied", "migrated"),
                ("network_plugged", "network_unplugged"),
                ("volume_attached", "volume_detached"),
                ("shutdown_requested", "powered_off"),
            ]
        )
        and count["image_cached"] + count["image_fetched"] == 1
        and count["powered_off"] == count["disk_deleted"] == 1
        and count["heartbeat"] >= 1
        and count["migrated"] <= 3
        and not count.keys() & {"migration_failed", "rolled_back", "volume_error"}
    )


IS_HEALTHY = {HDFS.name: is_healthy_hdfs, VM.name: is_healthy_vm}


def lives(draw, count, seed=0):
    random = Random(seed)
    return [tuple(event for _, event in sorted(draw(random))) for _ in range(count)]


@either_system
@settings(deadline=None)
@given(seed=seeds)
def test_a_normal_life_is_a_whole_life(system, seed):
    for life in lives(system.life, 20, seed):
        assert IS_HEALTHY[system.name](life), life
        assert len(life) <= 50


@every_fault
@settings(deadline=None)
@given(seed=seeds)
def test_a_faulty_life_is_no_normal_life(system, kind, seed):
    for life in lives(system.faults[kind], 20, seed):
        assert life
        assert not IS_HEALTHY[system.name](life), life


@pytest.mark.parametrize(
    ("system", "kind", "visible"),
    [
        (HDFS, "pipeline_exception", {"write_exception", "mirror_exception", "responder_interrupted"}),
        (HDFS, "missing_replica", set()),
        (HDFS, "truncated_write", set()),
        (HDFS, "replication_storm", set()),
        (HDFS, "failed_delete", {"delete_error"}),
        (VM, "stuck_boot", set()),
        (VM, "failed_migration", {"migration_failed", "rolled_back"}),
        (VM, "migration_loop", set()),
        (VM, "lost_volume", {"volume_error"}),
        (VM, "leak", set()),
    ],
    ids=lambda value: "-".join(sorted(value)) or "none" if isinstance(value, set) else getattr(value, "name", value),
)
def test_half_of_the_faults_hide_among_normal_events(system, kind, visible):
    blocks_with = Counter(event for life in lives(system.life, 10_000) for event in set(life))
    faulty_with = Counter(event for life in lives(system.faults[kind], 1000) for event in set(life))
    assert {event for event, blocks in faulty_with.items() if blocks > 100 and blocks_with[event] < 30} == visible


def test_every_fault_is_tested_for_its_visibility():
    mark = next(mark for mark in test_half_of_the_faults_hide_among_normal_events.pytestmark)
    assert [case[:2] for case in mark.args[1]] == [
        (system, kind) for system in SYSTEMS.values() for kind in system.faults
    ]


@settings(deadline=None, max_examples=25)
@given(
    blocks=st.integers(1, 200),
    share=st.floats(0, 1),
    seed=seeds,
    rate=st.floats(0.01, 1000),
    system=st.sampled_from(list(SYSTEMS.values())),
)
def test_a_workload_is_ordered_complete_and_labelled_exactly(blocks, share, seed, rate, system):
    workload = simulate(blocks, share, seed, blocks_per_second=rate, system=system)
    times = [event.timestamp for event in workload.events]
    assert times == sorted(times)
    assert all(isinstance(time, int) and time >= simulator.BIRTH for time in times)
    assert len(set(workload.blocks)) == len(workload.blocks) == blocks
    assert len(workload.faults) == round(blocks * share)
    sessions = workload.sessions()
    assert [session.block_id for session in sessions] == workload.blocks
    assert sum(len(session.events) for session in sessions) == len(workload.events)
    for session in sessions:
        healthy = IS_HEALTHY[system.name](session.events)
        assert healthy == (session.block_id not in workload.faults) == (session.anomalous is False)


@either_system
def test_the_seed_decides_everything(system):
    workload = simulate(300, 0.1, 7, system=system)
    assert simulate(300, 0.1, 7, system=system) == workload
    other = simulate(300, 0.1, 8, system=system)
    assert not set(other.blocks) & set(workload.blocks)
    assert [session.events for session in other.sessions()] != [session.events for session in workload.sessions()]


@either_system
def test_the_kinds_of_fault_take_turns(system):
    workload = simulate(1000, 0.05, 1, system=system)
    assert Counter(workload.faults.values()) == dict.fromkeys(system.faults, 10)


def test_the_prefix_can_be_chosen():
    assert all(block.startswith("blk_") for block in simulate(5, 0, 1).blocks)
    assert all(block.startswith("demo-") for block in simulate(5, 0, 1, prefix="demo-").blocks)


@either_system
def test_every_event_has_a_template_and_every_template_an_event(system):
    seen = set().union(
        *(lives(system.life, 20_000)), *(life for draw in system.faults.values() for life in lives(draw, 200))
    )
    assert seen == set(system.templates)
    assert len(TEMPLATES) == sum(len(system.templates) for system in SYSTEMS.values())


# The real HDFS sessions: 19.5 events on average, 42 at most; of 5,000 sessions 870 are distinct, the ten commonest
# cover 56 % and the hundred commonest 79 %; 77 % of blocks fall silent for over ten minutes in mid-life.


def test_normal_sequences_are_spread_as_in_real_logs():
    normal = lives(HDFS.life, 5000)
    assert 18 < sum(map(len, normal)) / len(normal) < 21
    counts = [count for _, count in Counter(normal).most_common()]
    assert 700 < len(counts) < 1000
    assert 0.50 < sum(counts[:10]) / len(normal) < 0.62
    assert 0.74 < sum(counts[:100]) / len(normal) < 0.84


def test_blocks_of_every_system_share_few_sequences_and_have_many():
    for system in SYSTEMS.values():
        normal = lives(system.life, 5000)
        assert 13 <= sum(map(len, normal)) / len(normal) <= 25
        counts = [count for _, count in Counter(normal).most_common()]
        assert sum(counts[:100]) / len(normal) > 0.7
        assert counts.count(1) > 300


@either_system
def test_blocks_are_silent_for_long_and_live_side_by_side(system):
    workload = simulate(2000, 0, 1, system=system)
    times = {block: [] for block in workload.blocks}
    for event in workload.events:
        times[event.block_id].append(event.timestamp)
    silences = [max(after - before for before, after in pairwise(life)) / 60_000 for life in times.values()]
    assert sum(minutes > 10 for minutes in silences) / len(silences) > 0.65
    assert max(silences) < 24 * 60  # the default idle timeout: no healthy block is closed in mid-life
    middle = simulator.BIRTH + 500_000
    assert sum(life[0] < middle < life[-1] for life in times.values()) > 1000


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"blocks": 0}, "at least 1 block, not 0"),
        ({"fault_share": 1.5}, "between 0 and 1, not 1.5"),
        ({"fault_share": float("nan")}, "between 0 and 1, not nan"),
        ({"blocks_per_second": 0}, "more than 0, not 0"),
    ],
)
def test_impossible_workloads_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        simulate(**{"blocks": 10, "fault_share": 0.1, "seed": 1} | wrong)


@pytest.fixture
def command(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["simulator", *map(str, arguments)])
        simulator.main()

    return run


@either_system
def test_the_command_writes_what_it_simulated(command, tmp_path, capsys, system):
    command(
        *(
            "--system",
            system.name,
            "--blocks",
            200,
            "--faults",
            0.1,
            "--seed",
            3,
            "--out",
            tmp_path,
            "--name",
            "test",
        )
    )
    shown = capsys.readouterr().out
    workload = simulate(200, 0.1, 3, system=system)
    assert f"{len(workload.events):,}" in shown
    assert all(kind in shown for kind in system.faults)

    folder = tmp_path / "test"
    assert list(read_events(folder / "events.csv.gz")) == workload.events
    labels = read_labels(folder / "labels.csv")
    assert list(labels) == workload.blocks
    assert {block for block, anomalous in labels.items() if anomalous} == workload.faults.keys()
    assert read_sessions(folder / "sessions.jsonl").sessions == workload.sessions()
    assert {session.block_id: session for session in read_sessions(folder / "events.csv.gz").sessions} == {
        session.block_id: session for session in workload.sessions()
    }
    assert read_templates(folder / "templates.csv") == system.templates


def test_the_command_writes_the_same_bytes_again(command, tmp_path):
    for name in ("a", "b"):
        command("--blocks", 50, "--out", tmp_path, "--name", name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["events.csv.gz", "labels.csv", "sessions.jsonl", "templates.csv"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_a_folder_that_cannot_be_is_one_sentence(command, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        command("--blocks", 5, "--out", tmp_path / "file")
