"""A mistake is one sentence, and the demo does what it says; tests/test_docs.py has every other documented command."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import UserError
from model.files import check_folder
from scripts.output import check_file

ROOT = Path(__file__).parents[2]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


def test_a_mistake_is_one_sentence_without_a_traceback(tmp_path):
    (tmp_path / "no_model.yaml").write_text(f"model: {{path: {tmp_path / 'nothing'}}}")
    for arguments, said in (
        (["model", "--normal", tmp_path / "none.jsonl"], "none.jsonl"),
        (["consumer", "--config", tmp_path / "none.yaml"], "none.yaml"),
        (["calibration", "--config", tmp_path / "no_model.yaml", "--normal", ROOT / "README.md"], "python -m model"),
    ):
        module, *rest = arguments
        done = run("-m", module, *rest)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("ablation", "--normal", "none", "--held-out", "none", "--json", "FILE"),
        ("benchmark", "--json", "FILE"),
        ("benchmark", "--pictures", "FOLDER"),
        ("concepts", "--out", "FILE"),
        ("demo", "--folder", "FOLDER"),
        ("drift", "--normal", "none", "--json", "FILE"),
        ("evaluate", "--normal", "none", "--anomalous", "none", "--json", "FILE"),
        ("faults", "none", "--json", "FILE"),
        ("faults", "none", "--keep", "FOLDER"),
        ("lines", "none", "--json", "FILE"),
        ("screenshots", "--folder", "FOLDER"),
        ("simulator", "--out", "FOLDER"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_written_is_found_before_the_work_begins(tmp_path, monkeypatch, words):
    (tmp_path / "file").write_text("kept")
    places = {"FILE": str(tmp_path / "none" / "out.json"), "FOLDER": str(tmp_path / "file" / "out")}
    command, *rest = (places.get(word, word) for word in words)
    monkeypatch.setattr(sys, "argv", [command, *rest])
    with pytest.raises(UserError, match=rf"^{rest[-2]} {re.escape(rest[-1])}: cannot be written"):
        importlib.import_module(f"scripts.{command}").main()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_asking_whether_a_place_can_be_written_to_changes_nothing_there(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("kept")
    for path in (None, there, tmp_path / "new.json"):
        check_file("--json", path)
    with pytest.raises(UserError, match="Is a directory"):
        check_file("--json", tmp_path)
    check_folder("--out", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_the_demo_finds_the_faults_it_injected(tmp_path):
    done = run(
        "-m", "scripts.demo", "--folder", tmp_path, "--blocks", 250, "--training-blocks", 500, "--epochs", 12,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What came of it" in done.stdout
    found, injected = re.search(r"│ all\s+│\s+(\d+)\s+│\s+(\d+)", done.stdout).groups()[::-1]
    assert int(injected) == 8
    assert int(found) >= 6
