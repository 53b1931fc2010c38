"""A mistake is one sentence, and the demo does what it says; tests/test_docs.py has every other documented command."""

import re
import subprocess
import sys
from pathlib import Path

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
