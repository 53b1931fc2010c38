"""The report: self-contained, everything escaped, true to the numbers. How it looks is for eyes."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.block_scores import block_scores
from calibration.calibrate import calibrate
from calibration.gallery import exhibits
from calibration.report import Findings, write_report
from model.bundle import Bundle
from model.errors import UserError
from model.network import Autoencoder, Shape
from model.scoring import Scorer
from model.sessions import Session
from model.tally import teach
from model.vocabulary import END, UNK, Vocabulary

HOSTILE = '<script>alert("1")</script> & $x$ \ud83d 漢字\n'
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(5)
    vocabulary = Vocabulary(("a", "b", HOSTILE), {"a": "template of a", HOSTILE: HOSTILE})
    network = Autoencoder(Shape(len(vocabulary), 30, 16, 2, 1, 16)).eval()
    with torch.no_grad():
        network.bias[UNK] = -8
    return Scorer(Bundle(network, vocabulary))


@pytest.fixture(scope="module")
def report(scorer, tmp_path_factory):
    random = np.random.default_rng(4)
    sessions = [
        Session(f"{HOSTILE}{number}", tuple(random.choice(["a", "b", HOSTILE, "new<b>"], random.integers(1, 40))))
        for number in range(150)
    ]
    scores = block_scores(sessions, scorer, every=1)
    threshold = calibrate(
        scores.blocks, scorer, quantile=0.9, every=1, idle_timeout_ms=1, levels={"major": 0.99}, blocks_per_day=4000.0
    )
    path = tmp_path_factory.mktemp("report") / "calibration_report.html"
    failing = scores.blocks + 1
    folder = write_report(Findings(threshold, [HOSTILE], scores.blocks, scores.highest, failing, 0.03), scorer, path)
    return path, folder, threshold, scores, sessions


def test_the_page_asks_for_nothing_outside_and_names_from_logs_stay_text(report):
    page = report[0].read_text(encoding="utf-8")
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.links
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not re.search(r"(?i)(https?:|url\(|@import|<link)", page)
    assert '<script>alert("1")</script>' in "".join(parsed.text), "shown as the text that it is"


def test_the_pictures_beside_the_page_are_those_in_it(report):
    path, folder, *_ = report
    assert folder == path.with_name("calibration_report")
    pictures = {picture.name: picture.read_bytes() for picture in folder.iterdir()}
    assert set(pictures) == {
        "distribution.png",
        "alerts_against_quantile.png",
        "highest_blocks.png",
        "detection.png",
    }
    assert all(picture.startswith(PNG) for picture in pictures.values())
    inlined = {base64.b64decode(link.split(",", 1)[1]) for link in Page(path.read_text()).links}
    assert inlined == {picture for name, picture in pictures.items() if name != "highest_blocks.png"}


def test_the_page_gives_thresholds_certificates_and_alerts_a_day(report):
    path, _, threshold, *_ = report
    text = " ".join(" ".join(Page(path.read_text()).text).split())
    for level in threshold.levels:
        low, high = (f"{1e6 * edge:,.0f}" for edge in level.certificate.interval)
        assert f"{level.name} {level.quantile:g} {level.threshold:.4f}" in text
        assert f"{level.expected_alerts_per_million:,} {low} to {high}" in text
    daily = threshold.expected_alerts_per_million * 4000 / 1e6
    assert f"about {daily:,.0f} false alerts a day" in text


def test_the_ten_highest_blocks_are_explained_as_an_alert_would(report, scorer):
    _, _, threshold, scores, sessions = report
    shown = exhibits(scores.highest, scorer, threshold)
    assert [exhibit.score for exhibit in shown] == sorted(scores.blocks.tolist(), reverse=True)[:10]
    by_name = {session.block_id: session for session in sessions}
    for exhibit in shown:
        session = by_name[exhibit.name]
        assert exhibit.count == len(session.events)
        window = session.events[max(0, exhibit.seen - 30) : exhibit.seen]
        assert exhibit.events == (*window, "<END>") if exhibit.is_closing else window, "unknown events by their name"
        assert exhibit.surprisals[exhibit.offender] == max(exhibit.surprisals) == exhibit.score
        assert exhibit.template == scorer.bundle.vocabulary.template(exhibit.events[exhibit.offender])
        assert exhibit.severity == threshold.levels[threshold.rank(exhibit.score) - 1].name
        chances = [other.probability for other in exhibit.expected]
        assert chances == sorted(chances, reverse=True)
        assert exhibit.events[exhibit.offender] not in {other.event_id for other in exhibit.expected}


def test_a_block_of_unusual_counts_is_shown_with_them(scorer, tmp_path):
    torch.manual_seed(5)
    network = Autoencoder(Shape(len(scorer.bundle.vocabulary), 30, 16, 2, 1, 16, tallied=2)).eval()
    with torch.no_grad():
        network.bias[END] = 3  # it may end anywhere: what is left are the counts
    sessions = [Session(f"s{number}", ("a", "b")) for number in range(30)]
    teach(network.tally, [scorer.bundle.vocabulary.encode(session.events) for session in sessions], 1, 500)
    sessions.append(Session("odd", ("a", "a", "a", "a", "a", "b", "new<b>", HOSTILE)))
    counting = Scorer(Bundle(network, scorer.bundle.vocabulary))
    scores = block_scores(sessions, counting, every=1)
    threshold = calibrate(scores.blocks, counting, quantile=0.5, every=1, idle_timeout_ms=1)
    odd = exhibits(scores.highest, counting, threshold)[0]
    assert {(kind.event_id, kind.count, kind.usual) for kind in odd.counts} == {("a", 5, 1), ("<OTHER>", 2, 0)}
    path = tmp_path / "page.html"
    write_report(Findings(threshold, [], scores.blocks, scores.highest, None, 0.03), counting, path)
    text = " ".join(" ".join(Page(path.read_text()).text).split())
    assert re.search(r"the end of the block, with .*5 . a template of a .*expected .*1 . a", text)
    assert re.search(r"2 . <OTHER>", text)


def test_without_labels_and_times_there_are_no_curves_and_no_days(scorer, tmp_path):
    sessions = [Session(f"s{number}", ("a",) * (1 + number % 7)) for number in range(30)]
    scores = block_scores(sessions, scorer, every=2)
    threshold = calibrate(scores.blocks, scorer, quantile=0.5, every=2, idle_timeout_ms=1)
    path = tmp_path / "page.html"
    folder = write_report(Findings(threshold, [], scores.blocks, scores.highest, None, 0.03), scorer, path)
    assert not (folder / "detection.png").exists()
    assert "a day" not in path.read_text()


def test_one_block_is_enough_for_a_report(scorer, tmp_path):
    scores = block_scores([Session("only", ("a",))], scorer, every=1)
    threshold = calibrate(scores.blocks, scorer, quantile=0.5, every=1, idle_timeout_ms=1)
    write_report(
        Findings(threshold, [], scores.blocks, scores.highest, scores.blocks, 0.03), scorer, tmp_path / "r.html"
    )


def test_equal_data_give_an_equal_report(report, scorer, tmp_path):
    path, _, threshold, scores, _ = report
    again = tmp_path / path.name
    findings = Findings(threshold, [HOSTILE], scores.blocks, scores.highest, scores.blocks + 1, 0.03)
    write_report(findings, scorer, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_folder_that_cannot_be_written_is_one_sentence(report, scorer, tmp_path):
    _, _, threshold, scores, _ = report
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(
            Findings(threshold, [], scores.blocks, scores.highest, None, 0.03), scorer, tmp_path / "file" / "r.html"
        )


def test_other_commands_do_not_wait_for_matplotlib():
    code = "import sys, calibration.__main__, consumer.__main__; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0
