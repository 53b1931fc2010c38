"""Raw lines: cut by rules, matched from memory as by the plain way."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.events import MAX_ID_BYTES
from model.config import EventSettings
from model.lines import MAX_NAME_BYTES, LineCutter, LineFormat, LineReader, LineRules
from model.rawlog import texts
from model.templates import ANY, Matcher, event_id, learn

RULES = LineRules.of(EventSettings())
HEAD = "081109 203615 148 INFO dfs.DataNode$DataXceiver: "


def plainly(rules, templates, text):
    """The oracle: no memory, no index, one step after the other."""
    blocks = [match[match.re.groups] for match in re.finditer(rules.block_pattern, text)]
    shape = re.sub(rules.block_pattern, lambda m: m[0].replace(m[m.re.groups], "<BLOCK>"), text)
    line = re.sub("[0-9]+", "0", shape[:4096])
    if rules.message_pattern and (front := re.search(rules.message_pattern, line)):
        line = line[front.end() :]
    for name, pattern in rules.masks:
        line = re.sub(pattern, f"<{name}>", line)
    line, longer = " ".join(line.split()), None
    while line != longer:  # of a list of variables one is left
        longer, line = line, re.sub(r"(?<!\w)(<[A-Z_]+>)[,;]? \1(?=[\s,;\])}]|$)", r"\1", line)
    words = line.split()
    fitting = []
    for place, template in enumerate(templates):
        parts = template.split()
        if len(parts) == len(words) and all(part in (ANY, word) for part, word in zip(parts, words, strict=True)):
            fitting.append((parts.count(ANY), place))
    return list(dict.fromkeys(blocks)), event_id(templates[min(fitting)[1]]) if fitting else None


def masked(message, rules=RULES):
    cutter = LineCutter(rules)
    return cutter.masked(cutter.cut(message)[1])


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (HEAD + "Receiving block blk_-7 src: /10.0.0.1:500 dest: /10.0.0.2:50010",
         "Receiving block <BLOCK> src: <ADDRESS> dest: <ADDRESS>"),
        ("of size 67108864 at 3.5 and -4", "of size <NUMBER> at <NUMBER> and <NUMBER>"),
        ("file /mnt/data/sub7/blk_5 gone", "file <PATH> gone"),
        ("GET http://a.b/c?d=1 took 15 ms or 2.5s", "GET <PATH> took <DURATION> or <DURATION>"),
        ("after 120000 millis", "after <DURATION>"),
        ("nodes [10.0.0.1:5, 10.0.0.2:5] part7 8", "nodes [<ADDRESS>] part<NUMBER> <NUMBER>"),
        ("id 3f2504e0-4f89-11d3-9a0c-0305e82c3301 at 0x7ffe12 sha 9fceb02d0ae598e9", "id <ID> at <HEX> sha <HEX>"),
        ("peer fe80:0:0:0:1:2:3:4 up", "peer <ADDRESS> up"),
        ("delete blk_1 blk_2 blk_-3", "delete <BLOCK>"),
        ("to 10.0.0.1:5, 10.0.0.2:5, 10.0.0.3:5 done", "to <ADDRESS> done"),
        ("at 10.0.0.1:5 10.0.0.2:5:Got it", "at <ADDRESS> <ADDRESS>:Got it"),
        ("facade bead add 12 workers", "facade bead add <NUMBER> workers"),
    ],
)  # fmt: skip
def test_variables_become_their_names(message, wanted):
    assert masked(message) == wanted


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part",
    ["g", "a", "٣", "a0", "foo_bar", "a:", ":", "a-", "/", "/a", "/a ", "0.", "0:", "٣.", "0x", "w:/", "<", "A", "<A",
     "<A>,", " ", "-0"],
)  # fmt: skip
def test_a_long_word_takes_no_step_for_each_pair_of_its_letters(part):
    for word in (part * (600_000 // len(part)), "a" * 300_000 + "0" + part * (300_000 // len(part)) + "g"):
        LineCutter(RULES).masked(f"blk {word}".encode())


PLAINER = {  # masks that such a word did take long with
    "PATH": r"\w+://[^\s,;]+|(?<![\w/])(?:/[\w.$<>@+~-]+){2,}/?",
    "HEX": r"(?i)\b(?:0x[0-9a-f]+|(?:[a-f]+\d[a-f]+|\d[a-f]+\d)[0-9a-f]*)\b",
}


@given(st.sampled_from(sorted(PLAINER)), st.text(alphabet="aF0xg٣_/:.-, <>", max_size=40))
@example("HEX", "a0a a0aa0 0a0 0a aa0 0x0 0x a0ag a٣a a٣٣ g_a0a")
@example("PATH", "a://b a://,b://c d://\t/a/b//c/d x/a/b a/://b")
def test_masks_find_what_plainer_ones_find(name, text):
    assert re.sub(dict(RULES.masks)[name], "<>", text) == re.sub(PLAINER[name], "<>", text)


def test_own_masks_come_in_their_order():
    settings = EventSettings(masks={"USER": r"user \w+", "NUMBER": r"\d+"}, message_pattern=None)
    assert masked("user alice7 blk_1 paid 3", LineRules.of(settings)) == "<USER> <BLOCK> paid <NUMBER>"


def test_a_line_is_an_event_of_each_block_that_it_names_once():
    cutter = LineCutter(RULES)
    assert list(cutter.cut("delete blk_1 blk_12 blk_1 blk_-3")[0]) == ["blk_1", "blk_12", "blk_-3"]
    assert list(cutter.cut("no block here")[0]) == []
    group = LineCutter(LineRules.of(EventSettings(block_pattern=r"req=(\w*)")))
    assert list(group.cut("req=a1 req= req=b req=a1")[0]) == ["a1", "b"]
    assert group.masked(group.cut("x req=a1 y")[1]) == "x req=<BLOCK> y"


@pytest.mark.parametrize(
    ("form", "pattern", "text", "wanted"),
    [
        ("%y%m%d %H%M%S", r"^\d{6} \d{6}", "081109 203530 148 INFO", 1226262930000),
        ("%y%m%d %H%M%S", r"^\d{6} \d{6}", "691109 203530 148 INFO", None),  # 1969
        ("%y%m%d %H%M%S", r"^\d{6} \d{6}", "081399 203530 148 INFO", None),
        ("%y%m%d %H%M%S", r"^\d{6} \d{6}", "java.io.IOException", None),
        ("%Y/%m/%d-%H:%M:%S", r"\[([^]]+)\]", "x [2008/11/09-20:35:30] y", 1226262930000),
        ("%d/%b/%Y:%H:%M:%S %z", r"\[([^]]+)\]", "x [09/Nov/2008:21:35:30 +0100] y", 1226262930000),
        ("iso", r"^\S+ \S+", "2008-11-09 20:35:30,250 WARN", 1226262930250),
        ("ms", r"^\d+", "1226262930250 x", 1226262930250),
        ("s", r"^[\d.]+", "1226262930.25 x", 1226262930250),
        ("s", r"^\d+", "9" * 30, None),
        ("iso", None, "2008-11-09T20:35:30Z", None),
    ],
)
def test_a_line_says_when_it_was_written(form, pattern, text, wanted):
    cutter = LineCutter(LineRules.of(EventSettings(timestamp_format=form, timestamp_pattern=pattern)))
    assert cutter.time(text) == wanted


def test_a_line_of_no_template_stands_for_itself_within_bounds():
    assert MAX_NAME_BYTES <= MAX_ID_BYTES
    reader = LineReader(LineFormat(RULES, ("start <BLOCK>",)))
    assert reader.read("  start blk_1") == (["blk_1"], event_id("start <BLOCK>"), None)
    assert reader.read("\tkaputt blk_1 \r") == (["blk_1"], "kaputt blk_1", None)
    event = reader.read("blk_1 " + "ü" * 10_000)[1]
    assert event.startswith("blk_1 üü")
    assert MAX_NAME_BYTES - 2 < len(event.encode()) <= MAX_NAME_BYTES


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("model.lines._CACHE_BYTES", 10_000)
    reader = LineReader(LineFormat(RULES, ("start <BLOCK> of <*>",)))
    for number in range(500):
        word = "".join(chr(ord("g") + int(digit)) for digit in str(number))
        assert reader.read(f"start blk_{number} of {word}")[1] == event_id("start <BLOCK> of <*>")
        assert len(reader._by_shape) < 50


def test_a_line_that_names_no_block_is_neither_masked_nor_remembered():
    reader = LineReader(LineFormat(RULES, ("start <BLOCK>", "start <*>")))
    lines = [HEAD + "start " + letter for letter in "abcdefg"]
    assert reader.read_all(lines) == ([[]] * 7, [""] * 7, [None] * 7)
    assert not reader._by_shape
    assert not reader._by_masked
    assert reader.read_all([*lines, "start blk_1"])[1] == [""] * 7 + [event_id("start <BLOCK>")]
    assert list(reader._by_shape) == [b"start <BLOCK>"]


WORDS = st.sampled_from(
    ["start", "stop", "blk_1", "blk_-22", "blk_1,", "10.0.0.1:80", "10.0.0.12:8080,", "/a/b/c7", "7", "1234", "0x1f",
     "12ms", "[1.2.3.4", "5.6.7.8]",
     "3 s", "x9", "00", "<*>", "<BLOCK>", "ü", "٣", ":", "\t"]
)  # fmt: skip
LINES = st.lists(WORDS, max_size=8).map(" ".join)


@given(st.lists(LINES, max_size=12), st.lists(LINES, min_size=1, max_size=20))
def test_from_memory_as_by_the_plain_way(training, lines):
    cutter = LineCutter(RULES)
    templates = learn(cutter.masked(cutter.cut(line)[1]) for line in training)
    reader = LineReader(LineFormat(RULES, templates))
    many = [*lines, *training, *lines]
    together = zip(*LineReader(LineFormat(RULES, templates)).read_all(many), strict=True)
    assert list(together) == list(map(reader.read, many))
    for line in many:
        blocks, event, _ = reader.read(line)
        wanted_blocks, wanted = plainly(RULES, templates, line)
        assert list(blocks) == wanted_blocks
        if blocks:
            assert event == (line.strip() if wanted is None else wanted)


@given(st.lists(LINES, min_size=1, max_size=15))
def test_every_line_that_was_learned_from_matches(lines):
    cutter = LineCutter(RULES)
    shapes = [cutter.masked(cutter.cut(line)[1]) for line in lines]
    matcher = Matcher(learn(shapes))
    assert None not in map(matcher.match, shapes)


def test_the_most_exact_template_matches():
    matcher = Matcher(["<*> b <*>", "a b <*>", "a b c", "a b <*> d"])
    assert [matcher.match(line) for line in ("a b c", "a b x", "x b x", "a b x d", "x y z", "")] == [
        event_id("a b c"), event_id("a b <*>"), event_id("<*> b <*>"), event_id("a b <*> d"), None, None,
    ]  # fmt: skip


REAL = Path(os.environ.get("LOG_DATA", "../shared/data")) / "hdfs" / "replay" / "raw.log.gz"


@pytest.mark.data
@pytest.mark.skipif(not REAL.exists(), reason="no real logs here: name their folder in LOG_DATA")
def test_real_lines_from_memory_as_by_the_plain_way():
    lines = [line for line, _ in zip(texts(REAL), range(30_000), strict=False)][::7]
    cutter = LineCutter(RULES)
    templates = learn(cutter.masked(cutter.cut(line)[1]) for line in lines[:500])
    reader = LineReader(LineFormat(RULES, templates))
    unmatched = 0
    for line in lines:
        blocks, wanted = plainly(RULES, templates, line)
        found, event, time = reader.read(line)
        assert (list(found), event) == (blocks, line.strip() if wanted is None else wanted)
        assert time is not None
        unmatched += wanted is None
    assert 0 < unmatched < len(lines) / 2
