"""What the documentation tells people to type exists, and the demo does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def documented():
    """Every `python -m module --option …` of the documentation, continued lines joined."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for module, rest in re.findall(r"python -m ([a-z_.]+)([^`\n#]*)", text):
            yield module.rstrip("."), tuple(sorted(set(re.findall(r"--[a-z-]+", rest)))), page.name


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope="module")
def help_of():
    known = {}

    def get(module):
        if module not in known:
            known[module] = run("-m", module, "--help")
        return known[module]

    return get


@pytest.mark.parametrize(("module", "options", "page"), sorted(set(documented())))
def test_documented_commands_and_options_exist(help_of, module, options, page):
    done = help_of(module)
    assert done.returncode == 0, f"{page}: python -m {module}: {done.stderr}"
    for option in options:
        assert option in done.stdout, f"{page}: python -m {module} has no {option}"


def test_links_of_the_documentation_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_documented():
    modules = {module for module, _, _ in documented()}
    for path in (ROOT / "scripts").glob("*.py"):
        if 'if __name__ == "__main__"' in path.read_text() and path.stem != "demo":  # which is make demo
            assert f"scripts.{path.stem}" in modules


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
