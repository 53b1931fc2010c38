"""`python -m calibration` on files: what is said, what is written, and each mistake in one sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from calibration.__main__ import main
from model.bundle import Bundle
from model.cli import run as command
from model.errors import UserError
from model.network import Autoencoder, Shape
from model.sessions import read_sessions
from model.vocabulary import Vocabulary
from scripts.simulator import simulate, write
from scripts.systems import HDFS

ROOT = Path(__file__).parents[2]
KNOWN = simulate(1, 0.0, 5).events[0].event_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Simulated healthy blocks with and without times, failing ones, and an untrained model."""
    folder = tmp_path_factory.mktemp("calibration")
    write(simulate(400, 0.0, 3), HDFS, folder)
    write(simulate(60, 1.0, 4), HDFS, folder / "failing")
    vocabulary = Vocabulary.of(session.events for session in simulate(50, 0.0, 5).sessions())
    Bundle(Autoencoder(Shape(len(vocabulary), 50, 16, 2, 1, 16)).eval(), vocabulary).save(folder / "model")
    settings = {
        "device": "cpu",
        "model": {"path": str(folder / "model")},
        "calibration": {"path": str(folder / "out" / "threshold.json")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "calibration", "--config", str(folder / "config.yaml"), *map(str, options)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_file_with_times_gives_alerts_a_day_levels_and_a_report(folder):
    done = run(folder, "--normal", folder / "events.csv.gz", "--anomalous", folder / "failing" / "sessions.jsonl")
    assert done.returncode == 0, done.stderr
    raw = json.loads((folder / "out" / "threshold.json").read_text())
    assert [level["name"] for level in raw["levels"]] == ["minor", "major"]
    assert "level critical is left out: 0.999 takes at least 999 normal blocks" in done.stdout
    assert f"{raw['blocks_per_day']:,.0f} normal blocks begin in a day" in done.stdout
    daily = raw["expected_alerts_per_million"] * raw["blocks_per_day"] / 1e6
    assert re.search(rf"minor .* {daily:,.1f} │", done.stdout)
    assert (folder / "out" / "calibration_report.html").is_file()
    assert len(list((folder / "out" / "calibration_report").iterdir())) == 4


def test_a_target_chooses_the_quantile(folder):
    normal = folder / "events.csv.gz"
    out = folder / "target" / "threshold.json"
    run(folder, "--normal", normal, "--out", out, "--no-report")
    per_day = json.loads(out.read_text())["blocks_per_day"]
    target = per_day / 50
    done = run(folder, "--normal", normal, "--out", out, "--no-report", "--target-alerts-per-day", target)
    assert done.returncode == 0, done.stderr
    raw = json.loads(out.read_text())
    assert raw["quantile"] == pytest.approx(0.98, abs=1e-5)
    assert raw["bound"] * per_day <= target
    assert not out.with_name("calibration_report.html").exists()
    done = run(folder, "--normal", normal, "--target-alerts-per-day", per_day / 1000)
    assert re.search("takes at least (999|1,000) calibration blocks, and there are 400", done.stderr)


def test_blocks_that_may_not_be_over_are_warned_of_and_can_be_left_out(folder):
    normal = folder / "events.csv.gz"
    first, last = read_sessions(normal).span
    done = run(folder, "--normal", normal, "--no-report")
    assert "400 of these blocks spoke less than windows.idle_timeout before their log ends" in flat(done.stdout)
    done = run(folder, "--normal", normal, "--no-report", "--to", (first + last) // 2)
    assert re.search(r"\d+ normal sessions, .* left out, \d+ not as a whole in the time range", flat(done.stdout))


@pytest.mark.parametrize(
    ("levels", "options", "q"),
    [
        ("{}", [], None),
        ("{major: 0.99}", [], 0.99),
        ("{critical: 0.999}", [], None),  # left out: too few blocks
        ("{}", ["--target-alerts-per-day", "0.25"], 0.987),
    ],
)
def test_young_blocks_are_warned_of_where_they_decide_the_highest_threshold(
    folder, tmp_path, monkeypatch, capsys, levels, options, q
):
    """Five of 200 blocks spoke in the last day: fewer than may alert at q = 0.95, more than at 0.99."""
    normal = tmp_path / "events.csv"
    hours = [f"{number * 3600_000 + 10**12},b{number},{KNOWN}\n" for number in range(195)]
    days = [f"{(240 + number) * 3600_000 + 10**12},y{number},{KNOWN}\n" for number in range(5)]
    normal.write_text("".join(["timestamp,block_id,event_id\n", *hours, *days]))
    config = tmp_path / "config.yaml"
    config.write_text((folder / "config.yaml").read_text().replace("calibration:", f"calibration:\n  levels: {levels}"))
    options = ["--config", config, "--normal", normal, "--no-report", "--out", tmp_path / "threshold.json", *options]
    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, options)])
    main()
    said = flat(capsys.readouterr().out)
    warning = "5 of these blocks spoke less than windows.idle_timeout before their log ends"
    assert (f"{warning}, more than may alert at q = {q}" in said) if q else (warning not in said)


def test_logs_of_another_system_are_no_normal_traffic(folder, tmp_path, monkeypatch, capsys):
    def calibrate(unknown):
        events = [KNOWN] * (100 - unknown) + ["new"] * unknown
        rows = [{"block_id": str(place), "events": events} for place in range(20)]
        (tmp_path / "sessions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = ["--config", folder / "config.yaml", "--normal", tmp_path / "sessions.jsonl", "--no-report",
                   "--out", tmp_path / "threshold.json"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["calibration", *map(str, options)])
        main()
        return flat(capsys.readouterr().out)

    assert "never seen" not in calibrate(3)
    assert "the model has never seen 100 of these 2,000 events (5%): the threshold will lie high" in calibrate(5)
    calibrate(50)
    (tmp_path / "threshold.json").unlink()
    with pytest.raises(UserError, match=r"never seen 1,020 of these 2,000 events \(51%\); give logs of the system"):
        calibrate(51)
    assert not (tmp_path / "threshold.json").exists()


def test_a_block_silent_for_longer_than_the_idle_timeout_is_calibrated_on_as_several(folder, monkeypatch, capsys):
    config = folder / "short.yaml"
    config.write_text((folder / "config.yaml").read_text() + "windows: {idle_timeout: 1s}\n")
    options = ["--config", config, "--normal", folder / "events.csv.gz", "--no-report", "--out", folder / "short.json"]
    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, options)])
    main()
    said = re.search(r"([\d,]+) normal sessions", capsys.readouterr().out)
    raw = json.loads((folder / "short.json").read_text())
    assert raw["blocks"] == int(said[1].replace(",", "")) > 400
    assert raw["idle_timeout_ms"] == 1000


def test_paths_are_printed_as_they_are(folder):
    normal = folder / "[prod]" / "x[/]:smile:{y}.csv.gz"
    normal.parent.mkdir(parents=True)
    normal.symlink_to(folder / "events.csv.gz")
    out = folder / "[bold]" / "threshold.json"
    done = run(folder, "--normal", normal, "--out", out)
    assert done.returncode == 0, done.stderr
    said = "".join(done.stdout.split())
    for path in (f"{normal}:", f"writtento{out},", f"reportin{out.with_name('calibration_report.html')},"):
        assert path in said


def flat(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "FOLDER"], "is a folder; name a file"),
        (["--out", ""], "--out .: is a folder; name a file"),
        (["--out", "."], "--out .: is a folder; name a file"),
        (["--out", "/proc/nope/threshold.json"], "--out /proc/nope: cannot be written to ("),
        (["--out", f"FOLDER/{'x' * 300}"], "cannot be written (File name too long)"),
        (["--anomalous", "FOLDER/none.jsonl"], "none.jsonl: cannot be read"),
    ],
)
def test_what_ends_it_is_found_before_the_work_begins(folder, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr("calibration.__main__.read_normal", None)
    options = [option.replace("FOLDER", str(tmp_path)) for option in options]
    arguments = ["--config", folder / "config.yaml", "--normal", folder / "sessions.jsonl", *options]
    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, arguments)])
    with pytest.raises(UserError, match=re.escape(said)):
        main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--normal", "sessions.jsonl", "--target-alerts-per-day", "5"], "give an event CSV with its timestamps"),
        (["--normal", "sessions.jsonl", "--from", "2024-01-01"], "without times, so --from and --to cannot choose"),
        (["--topic", "--from", "2024-01-02", "--to", "2024-01-01"], "--from should be earlier than --to"),
        (["--topic", "--from", "yesterday"], "--from yesterday: write a time like"),
        (["--topic", "--target-alerts-per-day", "0"], "should be greater than 0"),
        (["--normal", "sessions.jsonl", "--prior", "2"], "a share between 0 and 1"),
        (["--normal", "sessions.jsonl", "--topic"], "not allowed with argument"),
        ([], "one of the arguments --normal --topic is required"),
    ],
)
def test_mistakes_are_one_sentence(folder, options, said, monkeypatch, capsys):
    options = [folder / option if option.endswith(".jsonl") else option for option in options]
    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, ["--config", folder / "config.yaml", *options])])
    with pytest.raises(SystemExit) as ended:
        command(main)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
