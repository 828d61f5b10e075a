"""The browser that the page's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For a module, no longer: while it is there, its event loop runs in this thread, and tests that run their own cannot."""
    binary = shutil.which("chromium")
    assert binary, "chromium is missing; make page-test installs it where it may"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield launched
        launched.close()
