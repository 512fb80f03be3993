"""A headless Chromium for tests of pages; they are skipped, with a reason, where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

_NAMES = ('chromium', 'chromium-browser', 'google-chrome-stable', 'google-chrome')
_ARGUMENTS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]


@contextmanager
def chromium() -> Iterator:
    """Playwright's browser object, over the system's Chromium (or ``CHROMIUM``)."""
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright: pip install playwright')
    path = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip('needs Chromium: apt install chromium, or set CHROMIUM to its path')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(browser, **options) -> Iterator:
    """A page in a context of its own.

    ``page.complaints`` gets what it says on the console as an error, and every request to another machine.
    """
    context = browser.new_context(**options)
    try:
        page = context.new_page()
        page.complaints = []
        page.on('console', lambda message: message.type == 'error' and page.complaints.append(message.text))
        page.on('pageerror', lambda error: page.complaints.append(str(error)))
        page.on('request', lambda request: _is_far(request.url) and page.complaints.append(f'request: {request.url}'))
        yield page
    finally:
        context.close()


def _is_far(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ('data', 'blob', 'file', 'about') and parts.hostname not in ('127.0.0.1', 'localhost')
