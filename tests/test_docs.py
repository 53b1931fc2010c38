"""What the documentation tells people to type can be typed: every command of every page.

Blocks of shell are run by a real shell which finds no program, so that loops and variables become commands as they
would; each is then given to the parser of the program that it names. Programs of others are held to what they name of
ours.
"""

import argparse
import importlib
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from consumer.settings import Settings
from consumer.topics import SOURCE_CONFIG, STATE_CONFIG

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SHELL = """
PATH=/nowhere LOG_DATA=/data
source() { :; }
cd() { :; }
command_not_found_handle() { printf -v words '%s\\037' "$@"; printf '%s\\036' "$words"; }
"""


def text_of(page):
    return re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


def blocks():
    """Every block of shell, by page; pictures and files of other languages are none."""
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
            if language in {"", "sh", "bash"} and not re.search("[─│►…]", block):
                yield page.name, block


def typed():
    """Every command of the blocks, word by word, as a shell would run it."""
    for page, block in blocks():
        done = subprocess.run(
            ["bash", "-c", SHELL + block + "\nwait"], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.stderr == "", f"{page}: {block}"
        for command in filter(None, done.stdout.split("\036")):
            yield page, tuple(command.removesuffix("\037").split("\037"))


def mentioned():
    """Every `python -m …` in the text, with its options; there arguments may be left out."""
    for page in PAGES:
        for module, rest in re.findall(r"python -m ([a-z_.]+)([^`\n#]*)", text_of(page).replace("\\\n", " ")):
            yield page.name, module.rstrip("."), tuple(sorted(set(re.findall(r"--[a-z-]+", rest))))


class Parsed(Exception):  # noqa: N818
    """A program has read its command line, and goes no further."""


@pytest.fixture
def parser_of(monkeypatch, capsys):
    """Run a program, by its main function, up to its parser; return that and what it says against the arguments."""

    def parse_args(self, *_, **__):
        raise Parsed(self)

    def get(main, arguments=None):
        with monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            try:
                main()
            except Parsed as parsed:
                (parser,) = parsed.args
        said = ""
        if arguments is not None:
            try:
                parser.parse_args(arguments)
            except SystemExit:
                said = capsys.readouterr().err.splitlines()[-1]
        return parser, said

    return get


def main_of(module):
    name = module if "." in module else f"{module}.__main__"
    return importlib.import_module(name).main


def check_python(words, parser_of):
    if words[0] == "-m":
        main = main_of(words[1])
        rest = words[2:]
    else:
        main = runpy.run_path(str(ROOT / words[0]))["main"]
        rest = words[1:]
    return parser_of(main, list(rest))[1]


def check_make(words, _):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return "".join(f"no target {target}" for target in words if target not in targets)


def files_missing(words):
    return "".join(
        f"no file {word}"
        for word in words
        if re.match(r"(deploy|examples|docs|scripts)/", word) and not (ROOT / word).exists()
    )


def check_docker(words, parser_of):
    """Files and arguments exist; what runs in a service is one of our commands."""
    if words[0] == "build":
        known = re.findall(r"^ARG (\w+)", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
        asked = [word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--build-arg"]
        return files_missing(words) + "".join(f"no ARG {name}" for name in asked if name not in known)
    assert words[:3] == ("compose", "-f", "deploy/compose.yaml")
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    action, *rest = words[3:]
    if action == "run":
        service = next(place for place, word in enumerate(rest) if not word.startswith("-"))
        said = check_python(("-m", *rest[service + 1 :]), parser_of)
        return said if rest[service] in services else f"no service {rest[service]}"
    named = [word.partition("=")[0] for word in rest if not word.startswith("-")]
    return "".join(f"no service {name}" for name in named if name not in services)


def check_files(words, _):
    return files_missing(words)


def check_topics(words, _):
    """A topic made by hand is as the consumer would have made it."""
    given = [(option.removeprefix("--"), value) for option, value in itertools.pairwise(words)]
    (name,) = (value for option, value in given if option == "topic")
    topics = Settings().topics
    wanted = {topics.events: SOURCE_CONFIG, topics.state: STATE_CONFIG}
    config = dict(value.split("=") for option, value in given if option == "config")
    return "" if config == wanted.get(name, {}) else f"made with {wanted.get(name, {})} by the consumer"


def check_elsewhere(_, __):
    """kcat is run by tests/kafka/test_examples.py, rights are given as written by tests/kafka/test_security.py."""
    return ""


PROGRAMS = {
    "python": check_python,
    "make": check_make,
    "docker": check_docker,
    "kubectl": check_files,
    "kcat": check_elsewhere,
    "kafka-acls.sh": check_elsewhere,
    "kafka-topics.sh": check_topics,
}


@pytest.mark.parametrize(("page", "words"), sorted(set(typed())), ids=lambda part: " ".join(part)[:60])
def test_every_command_of_the_documentation_is_understood(parser_of, page, words):
    program, *rest = words
    assert program in PROGRAMS, f"{page} says {' '.join(words)}, which no test knows"
    said = PROGRAMS[program](tuple(rest), parser_of)
    assert not said, f"{page}: {' '.join(words)}: {said}"


def test_every_option_that_the_text_names_exists(parser_of):
    known = {}
    for page, module, options in mentioned():
        if module not in known:
            known[module] = parser_of(main_of(module))[0].format_help()
        for option in options:
            assert option in known[module], f"{page}: python -m {module} has no {option}"


@pytest.mark.parametrize(
    "words",
    [
        ("python", "-m", "model", "--nromal", "x"),
        ("python", "-m", "model"),
        ("python", "-m", "scripts.replay", "--rate", "fast", "x"),
        ("python", "examples/webhook.py"),
        ("make", "coffee"),
        ("docker", "build", "-f", "deploy/Dockerfile", "--build-arg", "NOTHING=1", "."),
        ("docker", "compose", "-f", "deploy/compose.yaml", "run", "--rm", "job", "model", "--nromal", "x"),
        ("docker", "compose", "-f", "deploy/compose.yaml", "logs", "nobody"),
        ("kubectl", "apply", "-f", "deploy/kubernetes/nothing.yaml"),
    ],
    ids=" ".join,
)
def test_a_command_with_a_mistake_would_be_noticed(parser_of, words):
    assert PROGRAMS[words[0]](words[1:], parser_of)


def test_links_of_the_documentation_lead_somewhere():
    for page in PAGES:
        for target, _, anchor in re.findall(r"\]\(([^)#:]*)(#([\w-]+))?\)", page.read_text()):
            where = page.parent / target if target else page
            assert where.exists(), f"{page.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", where.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_every_command_and_every_page_is_documented():
    modules = {module for _, module, _ in mentioned()}
    for path in (ROOT / "scripts").glob("*.py"):
        if 'if __name__ == "__main__"' in path.read_text() and path.stem != "demo":  # which is make demo
            assert f"scripts.{path.stem}" in modules
    text = "".join(page.read_text() for page in PAGES)
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]:
        assert re.search(rf"\]\([\w./]*{path.name}\b", text), f"no page links to {path.name}"


def test_logs_are_simulated_as_the_readme_says(tmp_path):
    (command,) = re.findall(r"`python (-m scripts\.simulator [^`]+)`", (ROOT / "README.md").read_text())
    options = command.split()
    options[options.index("--blocks") + 1] = "300"
    options[options.index("--out") + 1] = str(tmp_path)
    subprocess.run([sys.executable, *options], cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "events.csv.gz", "labels.csv", "sessions.jsonl", "templates.csv",
    }  # fmt: skip
