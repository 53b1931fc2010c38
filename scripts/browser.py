"""Headless Chromium: for pictures of what the project shows, and for the tests of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_INSTEAD = "install Debian's package chromium, or run: python -m playwright install chromium"


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Run this machine's Chromium, or the one that playwright has installed, while the block runs.

    Raises:
        UserError: there is none.
    """
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only developers have it
    except ImportError:
        raise UserError("playwright is not installed: pip install -e '.[dev]'") from None
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, _NAMES)), playwright.chromium.executable_path)
        if not Path(found).exists():
            raise UserError(f"Chromium is not on this machine; {_INSTEAD}")
        browser = playwright.chromium.launch(executable_path=found)
        try:
            yield browser
        finally:
            browser.close()
