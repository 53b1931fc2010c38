"""The status page: what it is told, and what a person sees of it in a browser."""

import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace

import msgspec
import pytest

from consumer.alerts import Counted
from consumer.board import ALERTS, Board, source_commands
from consumer.drift import EDGES
from consumer.metrics import Metrics, PartitionStatus, Status
from consumer.settings import KafkaSettings, Settings
from consumer.web import WebServer
from model.errors import UserError
from scripts.browser import chromium

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
STATUS = Status(
    ready=True,
    counts={"messages": 5000, "looks": 4900, "cache_hits": 4851, "evicted_blocks": 0},
    alerts={"minor": 2, "major": 1},
    dead_letters={"not_an_event": 3, "other": 0},
    levels={"minor": 0.27, "major": 1.5},
    scores=[10] * (len(EDGES) + 1),
    artifacts={"model": "ab" * 32, "strategy": "max", "calibration_quantile": "0.95"},
    partitions={
        3: PartitionStatus(7, 1_700_000_000_500, 40, 0, {"tail": 0.5, "body": 1.2}, "body"),
        4: PartitionStatus(1, None, None, 0, {"tail": 0.0, "body": 0.0}, None),
    },
)


@pytest.fixture
def board():
    return Board(Settings())


@pytest.fixture
def address(board):
    server = WebServer(Metrics(), board, "127.0.0.1:0")
    yield server.address
    server.close()


@pytest.fixture(scope="module")
def browser():
    try:
        with chromium() as started:
            yield started
    except UserError as reason:
        pytest.skip(str(reason))


def get(address, path, method="GET", **headers):
    request = urllib.request.Request(f"http://{address}{path}", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def blocks(board, after=0):
    return [shown["alert"]["block_id"] for shown in json.loads(board.encode(after))["alerts"]]


def test_the_board_holds_the_latest_alerts_and_a_revision_takes_its_alerts_place(board, make_alert):
    board.post([make_alert(number, block=f"b{number}") for number in range(3 * ALERTS)])
    assert blocks(board) == [f"b{number}" for number in range(2 * ALERTS, 3 * ALERTS)]
    known = json.loads(board.encode())["posted"]
    assert blocks(board, after=known) == []
    board.post([make_alert(2 * ALERTS, block="revised", revision=2)])
    assert blocks(board, after=known) == ["revised"]
    assert len(blocks(board)) == ALERTS
    assert blocks(board)[-1] == "revised"


def test_the_board_measures_rate_and_lag_and_forgets_in_time(board):
    for messages in range(1000):
        board.sample(replace(STATUS, counts={"messages": messages}))
    time.sleep(0.1)
    board.sample(replace(STATUS, counts={"messages": 1999}))
    samples = json.loads(board.encode())["samples"]
    assert len(samples) == 300
    assert samples[-1]["lag"] == 40
    assert 2000 < samples[-1]["rate"] < 10_001


def test_no_secret_of_the_settings_is_shown(make_alert):
    kafka = KafkaSettings.model_validate({"bootstrap.servers": "broker:1", "sasl.password": "s3cret"})
    board = Board(Settings(kafka=kafka))
    board.post([make_alert(1)])
    shown = board.encode().decode()
    assert "kcat -C -e -q -b broker:1 -t log-events -p 4 -o 7 -c 1" in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    "block", ["x'; touch hacked; '", "$(touch hacked)", "-e\n", "\x1b[201~touch hacked", HOSTILE, ""]
)
def test_commands_to_paste_do_what_they_say_whatever_the_block_is_called(make_alert, block, tmp_path):
    (tmp_path / "kcat").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "kcat").chmod(0o755)
    commands = source_commands("a b;c", make_alert(1, block=block))
    for command in commands.values():
        assert command.isprintable()
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.startswith("-C -e -q -b a b;c -t log-events -p 4 -o ")
    assert [path.name for path in tmp_path.iterdir()] == ["kcat"]


def test_the_block_is_looked_for_by_name_where_that_is_safe(make_alert):
    command = source_commands("localhost:9092", make_alert(1, block="-blk_-17"))["block"]
    assert command.endswith("-o 3 -c 7 | grep -Fe -blk_-17")


def test_every_answer_forbids_what_the_page_does_not_need(address):
    for path, kind in (("/", "text/html"), ("/status.json", "application/json"), ("/healthz", "text/plain")):
        code, headers, _ = get(address, path)
        assert code == 200
        assert headers["Content-Type"].startswith(kind)
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
    page = get(address, "/")[2].decode()
    assert not re.search(r"(src|href)=[\"']?(?!data:,)\w|@import|url\(", page), "it asks nobody for anything"


def test_only_reading_is_possible(address):
    assert get(address, "/", "POST")[0] == 405
    assert get(address, "/status.json", "DELETE")[0] == 405
    code, headers, body = get(address, "/", "HEAD")
    assert (code, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


def test_what_the_page_says_it_has_may_be_nonsense(address, board, make_alert):
    board.post([make_alert(1)])
    for after in ("x", "-1", "9" * 100, "", "%00", "1&after=x"):
        code, _, body = get(address, f"/status.json?after={after}")
        assert code == 200
        assert len(json.loads(body)["alerts"]) == (after != "1&after=x")


def test_a_name_that_leads_here_from_elsewhere_reads_nothing(address):
    for path in ("/", "/status.json", "/metrics"):
        assert get(address, path, Host="evil.example")[0] == 421
        assert get(address, path, Host="evil.example:9108")[0] == 421
        assert get(address, path, Host="[")[0] == 421
        assert get(address, path, Host="localhost:1")[0] == 200


@pytest.fixture
def page(browser, address):
    """The status page; every sign of trouble in it fails the test."""
    context = browser.new_context(viewport={"width": 1160, "height": 1400})
    opened = context.new_page()
    own, trouble = f"http://{address}/", []
    opened.on("console", lambda message: trouble.append(message.text))
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("dialog", lambda dialog: trouble.append(dialog.message))
    opened.on("request", lambda request: request.url.startswith((own, "data:,")) or trouble.append(request.url))
    opened.goto(own)
    yield opened
    context.close()
    assert trouble == []


def test_a_person_sees_how_things_stand(page, board):
    board.sample(replace(STATUS, counts=STATUS.counts | {"messages": 0}))
    board.sample(STATUS)
    page.get_by_text("watching").wait_for()
    assert page.locator("#alerts-total").inner_text() == "3"
    assert page.locator("#alerts-by").inner_text() == "1 major · 2 minor"
    assert page.locator("#lag").inner_text() == "40"
    assert page.locator("#open").inner_text() == "8"
    assert page.locator("#cached").inner_text() == "99.0 % of them known already"
    assert page.locator("#dead-by").inner_text() == "3 not an event"
    assert "No alert since" in page.locator("#alerts").inner_text()
    assert page.locator("#partitions tr").count() == 2
    assert "alarm" in page.locator("#partitions tr").first.inner_text()
    assert page.locator("#histogram .limit").count() == 2
    # In one call: the page draws its bars anew every second.
    limit, above, below = page.evaluate(
        """["limit", "above", "below"].map(kind => [...document.querySelectorAll("#histogram ." + kind)].map(
            part => part.getBoundingClientRect().x))"""
    )
    assert len(above) + len(below) == len(EDGES) + 2, "the bar that the threshold lies in is of both"
    assert max(below) < limit[0] <= min(above) + 1


def test_an_alert_comes_in_with_its_window_and_hostile_names_are_only_text(page, board, make_alert):
    board.sample(STATUS)
    page.get_by_text("No alert since").wait_for()
    board.post([make_alert(1, block="blk_1"), make_alert(2, block=HOSTILE, event=HOSTILE, template=HOSTILE)])
    page.locator("article").nth(1).wait_for()
    newest = page.locator("article").first
    assert newest.locator("h3").inner_text() == HOSTILE
    assert f"Event 2 is {HOSTILE}: {HOSTILE}" in newest.inner_text()
    assert "Expected instead: E9 90 % (expected of <*>)" in newest.inner_text()
    assert newest.locator(".window li").all_inner_texts() == ["E5", HOSTILE, "E5"]
    assert newest.locator(".offends").inner_text() == HOSTILE
    colours = [chip.evaluate("chip => getComputedStyle(chip).backgroundColor") for chip in newest.locator("li").all()]
    assert len(set(colours)) == 3, "one colour for each surprisal"
    newest.locator("summary").click()
    assert newest.locator("code").first.inner_text() == "kcat -C -e -q -b localhost:9092 -t log-events -p 4 -o 7 -c 1"
    assert page.evaluate("window.hacked") is None
    assert page.locator("article script, article img").count() == 0

    board.post([make_alert(1, block="blk_1", revision=2)])
    page.get_by_text("revision 2").wait_for()
    assert page.locator("article h3").all_inner_texts() == ["blk_1", HOSTILE]


def test_an_alert_says_which_counts_are_unusual_and_their_names_are_only_text(page, board, make_alert):
    alert = make_alert(1, event="<END>")
    counts = (Counted(HOSTILE, HOSTILE, 9, 1, 7.5), Counted("<OTHER>", None, 2, 0, 6.5))
    offender = msgspec.structs.replace(alert.offender, expected=(), counts=counts)
    board.post([msgspec.structs.replace(alert, reason="counts", offender=offender)])
    article = page.locator("article").first
    article.wait_for()
    assert f"The block ended with 9 × {HOSTILE} ({HOSTILE}), 2 × <OTHER>" in article.inner_text()  # noqa: RUF001
    assert f"Expected instead: 1 × {HOSTILE}, 0 × <OTHER>" in article.inner_text()  # noqa: RUF001
    assert page.evaluate("window.hacked") is None


def test_the_page_follows_the_systems_colours_and_can_be_paused(page, board):
    board.sample(STATUS)
    page.get_by_text("watching").wait_for()
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) != light
    page.get_by_role("button", name="Pause").click()
    board.sample(replace(STATUS, ready=False))
    page.wait_for_timeout(1500)
    assert page.locator("#state").inner_text() == "watching"
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("starting").wait_for()
