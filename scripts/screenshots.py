"""`python -m scripts.screenshots`: takes the pictures of the documentation, of a run that happens while it does.

A simulated cluster, the embedded broker and the real commands, as in `scripts.demo`; headless Chromium looks.
"""

import io
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from PIL import Image

from consumer.settings import load_settings
from model.cli import argument_parser, console, run
from model.errors import UserError
from model.files import check_folder
from scripts.browser import chromium
from scripts.demo import command, configure, embedded_broker
from scripts.replay import paced, replay
from scripts.simulator import Workload, simulate, write
from scripts.systems import HDFS

if TYPE_CHECKING:
    from playwright.sync_api import Page

_BLOCKS = 3000
_EPOCHS = 25
_FAILING = 0.02
_SECONDS = 75
_LOOK_AFTER_SECONDS = 60
_START_SECONDS = 60
_LEVELS = {"quantile": 0.99, "levels": {"major": 0.999, "critical": 0.9995}}
_COLOURS = 256
_HEIGHT = 4000  # more than is shown of any page


def main() -> None:
    """Train, calibrate, stream, look."""
    parser = argument_parser("scripts.screenshots", "Take the pictures of the documentation.")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/screenshots"), help="where the run is written")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the pictures go (default: docs)")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    check_folder("--folder", folder)
    check_folder("--out", arguments.out)
    for name, share, seed in (("train", 0.0, 1), ("calibration", 0.0, 2), ("failing", 1.0, 3)):
        write(simulate(_BLOCKS if share == 0 else 300, share, seed), HDFS, folder / name)
    live = simulate(_BLOCKS, _FAILING, 4, prefix="blk_")
    with embedded_broker() as bootstrap:
        config = configure(folder, bootstrap, _EPOCHS, calibration=_LEVELS, metrics={"listen": "127.0.0.1:0"})
        command("model", config, "--normal", str(folder / "train" / "sessions.jsonl"))
        command(
            "calibration", config, "--normal", str(folder / "calibration" / "sessions.jsonl"),
            "--anomalous", str(folder / "failing" / "sessions.jsonl"),
        )  # fmt: skip
        status = _watch(config, live, folder / "consumer.log")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": _HEIGHT})
        page.goto((folder / "calibration_report.html").resolve().as_uri())
        report = _top(page, "section", 3)
    for name, picture in (("status", status), ("calibration_report", report)):
        path = arguments.out / f"{name}.png"
        few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1)
        few.save(path, optimize=True)
        console.print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def _watch(config: Path, live: Workload, log: Path) -> bytes:
    """Stream the events to the real consumer process; return what its status page looks like meanwhile."""
    settings = load_settings(config)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "consumer", "--config", str(config)], stdout=output, stderr=output
        )
    try:
        address = _address(process, log)
        events = paced(iter(live.events), rate=len(live.events) / _SECONDS)
        last_events = Counter(event.block_id for event in live.events)
        stream = Thread(target=replay, args=(settings, events), kwargs={"last_events": last_events}, daemon=True)
        stream.start()
        with chromium() as browser, console.status(f"streaming {len(live.events):,} events"):
            page = browser.new_page(viewport={"width": 1160, "height": _HEIGHT})
            page.goto(f"http://{address}/")
            time.sleep(_LOOK_AFTER_SECONDS)
            page.get_by_role("button", name="Pause").click()
            page.wait_for_timeout(2000)  # what has just come in is still marked as new
            picture = _top(page, "article", 3)
        stream.join()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    return picture


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        said = log.read_text(encoding="utf-8")
        found = re.search(r"http://(\S+)/metrics", said)
        if found and "assigned" in said:
            return found[1]
        time.sleep(0.2)
    raise UserError(f"the consumer does not start; its last words are in {log}")


def _top(page: "Page", selector: str, count: int) -> bytes:
    """Return a picture of the page down to the end of the `count`-th element that `selector` names."""
    box = page.locator(selector).nth(count - 1).bounding_box()
    if box is None:
        raise UserError(f"the page has no {count} things to show; something in the run went wrong")
    width = page.evaluate("innerWidth")
    return page.screenshot(clip={"x": 0, "y": 0, "width": width, "height": box["y"] + box["height"] + 12})


if __name__ == "__main__":
    run(main)
