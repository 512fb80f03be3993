"""The page to try a model in a real browser, as its visitors use it: by mouse, touch and keys."""

import re
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import chromium, watched
from demo_server import bad_files, picture_file

from mmseg_volo.inference import Predictor, read_image
from mmseg_volo.inference.visualize import overlay

pytest_plugins = ['demo_server']
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser, server, width: int = 1200, **options):
    """The page, loaded; at the end it must have said nothing on the console and asked no other machine."""
    with watched(browser, viewport=dict(width=width, height=900), accept_downloads=True, **options) as page:
        page.set_default_timeout(20_000)
        page.goto(server.url)
        page.wait_for_selector('.volo-empty')
        yield page
        assert page.complaints == []


def choose(page, path: Path) -> None:
    page.set_input_files('#picture input[type=file]', str(path))
    page.wait_for_selector('#picture img')


def predict(page, path: Path) -> None:
    choose(page, path)
    page.click('#predict')
    page.wait_for_selector('.volo-stage')
    page.wait_for_selector('#download-overlay:not([disabled])')


def download(page, name: str) -> np.ndarray:
    with page.expect_download() as caught:
        page.click(f'#download-{name}')
    return cv2.imread(str(caught.value.path()), cv2.IMREAD_UNCHANGED)


def test_upload_result_hover_slider_and_downloads(browser, server, predictor, tmp_path):
    path = picture_file(tmp_path)
    image = read_image(path)
    expected = predictor(image)
    with opened(browser, server) as page:
        assert page.title() == 'a <b>model</b>' and page.is_disabled('#download-classes')
        predict(page, path)
        assert np.array_equal(download(page, 'classes'), expected)
        assert np.array_equal(download(page, 'overlay'), overlay(image, expected, predictor.palette))

        page.evaluate('scrollTo(0, 0)')
        box = page.locator('.volo-stage').bounding_box()
        assert box['width'] / box['height'] == pytest.approx(160 / 96, rel=0.02)
        seen = set()
        for x, y in np.random.default_rng(0).integers((0, 0), (160, 96), (40, 2)):
            page.mouse.move(box['x'] + (x + 0.5) / 160 * box['width'], box['y'] + (y + 0.5) / 96 * box['height'])
            assert page.locator('.volo-line').get_attribute('data-id') == str(expected[y, x])
            text = page.inner_text('.volo-tip')
            assert text.startswith(predictor.classes[expected[y, x]]) and text.endswith('% sure')
            seen.add(expected[y, x])
        assert len(seen) > 3

        rows = page.locator('.volo-viewer tbody tr')
        counts = np.bincount(expected.ravel(), minlength=19)
        assert rows.count() == np.count_nonzero(counts)
        first = rows.nth(0).inner_text().split('\t')
        assert first[0].strip() == predictor.classes[counts.argmax()]
        assert first[-1].strip() == f'{100 * counts.max() / counts.sum():.1f} %'

        def cut() -> float:
            style = page.locator('.volo-stage canvas').evaluate('node => getComputedStyle(node).clipPath')
            return float(style.split()[-1].rstrip('%)'))

        assert cut() == 50
        handle = page.locator('.volo-divider').bounding_box()
        page.mouse.move(handle['x'] + handle['width'] / 2, handle['y'] + handle['height'] / 2)
        page.mouse.down()
        page.mouse.move(box['x'] + 0.2 * box['width'], box['y'] + 20, steps=4)
        page.mouse.up()
        assert cut() == pytest.approx(20, abs=1)
        page.focus('#volo-compare')
        page.keyboard.press('ArrowRight')
        assert cut() == pytest.approx(21, abs=1)
        page.keyboard.press('End')
        assert cut() == 100

        page.locator('.volo-stage').click(position=dict(x=box['width'] / 2, y=box['height'] * 0.255))
        page.focus('.volo-stage')
        page.keyboard.press('ArrowRight')  # 160 / 50 pixels
        page.keyboard.press('Shift+ArrowDown')
        x, y = map(int, re.search(r'at (\d+), (\d+)', page.inner_text('.volo-line')).groups())
        assert (x, y) == (83, 25)
        assert page.locator('.volo-line').get_attribute('data-id') == str(expected[y, x])
        assert page.inner_text('#viewer [role=status]').startswith(predictor.classes[expected[y, x]])
        button = rows.nth(0).locator('button')
        button.focus()
        page.keyboard.press('Enter')
        assert button.get_attribute('aria-pressed') == 'true'


def test_phone_touch_and_examples(browser, server, predictor):
    with opened(browser, server, width=360, has_touch=True, is_mobile=True) as page:
        page.tap('#examples button')
        page.wait_for_selector('#picture img')
        page.tap('#predict')
        page.wait_for_selector('.volo-stage')
        page.wait_for_selector('#download-overlay:not([disabled])')
        assert page.evaluate('document.documentElement.scrollWidth') <= 360
        expected = download(page, 'classes')
        box = page.locator('.volo-stage').bounding_box()
        page.locator('.volo-stage').tap(position=dict(x=box['width'] * 0.2, y=box['height'] * 0.8))
        height, width = expected.shape
        assert page.is_visible('.volo-point')
        found = int(page.locator('.volo-line').get_attribute('data-id'))
        assert found == expected[int(height * 0.8), int(width * 0.2)]


def test_progress_stop_and_a_closed_tab(browser, server, predictor, tmp_path):
    path = picture_file(tmp_path, 5, (512, 512))
    with opened(browser, server) as page, slowed(predictor, 0.3):
        choose(page, path)
        page.check('input[type=checkbox]')
        page.click('#predict')
        page.wait_for_selector('text=/\\d+ of \\d+ windows/')
        page.click('#stop')
        wait_until(lambda: not server.visits._flags, 5)
        assert page.is_visible('.volo-empty')
        page.click('#predict')
        page.wait_for_selector('text=/\\d+ of \\d+ windows/')
        page.close()
        wait_until(lambda: not server.visits._flags, 5)
    with opened(browser, server) as page:
        predict(page, path)
        assert np.array_equal(download(page, 'classes'), predictor(read_image(path)))


def test_wrong_files_are_told_in_words(browser, server, predictor, tmp_path):
    files = bad_files(tmp_path)
    with opened(browser, server) as page:
        for name in ('text.png', 'cut.jpg', 'empty.png', 'wide.png', 'moving.gif'):
            path, words = files[name]
            page.set_input_files('#picture input[type=file]', str(path))
            page.wait_for_selector('#picture img', state='attached')
            page.click('#predict')
            page.wait_for_selector(f'[data-testid=toast-body]:has-text("{words}")')
            page.click('[data-testid=toast-close]')
            page.click('#picture [aria-label="Clear"], #picture [aria-label="Remove Image"]')
            page.wait_for_selector('#picture img', state='detached')
        predict(page, picture_file(tmp_path))  # it goes on
    with watched(browser) as page:  # Gradio's own words, and a complaint of its own on the console
        page.goto(server.url)
        page.wait_for_selector('.volo-empty')
        page.set_input_files('#picture input[type=file]', str(files['heavy.png'][0]))
        page.wait_for_selector('[data-testid=toast-body]:has-text("exceed the maximum allowed size of 1.0 Mb")')
        assert not any(text.startswith('request') for text in page.complaints)


def test_two_visitors_at_once(browser, server, predictor, tmp_path):
    paths = [picture_file(tmp_path, seed, (96, 160 + 32 * seed)) for seed in range(2)]
    with opened(browser, server) as one, opened(browser, server) as two, slowed(predictor, 1):
        for page, path in zip((one, two), paths, strict=True):
            choose(page, path)
        one.click('#predict')
        two.click('#predict')
        two.wait_for_selector('text=/queue: 1\\/1/')
        for page, path in zip((one, two), paths, strict=True):
            page.wait_for_selector('#download-classes:not([disabled])')
            expected = predictor(read_image(path))
            assert np.array_equal(download(page, 'classes'), expected)
            assert page.inner_text('.volo-note').startswith(f'{expected.shape[1]} x 96 pixels')


@contextmanager
def slowed(predictor: Predictor, seconds: float):
    """Each forward pass takes so much longer, as that of a large model does."""
    backbone = predictor.model.backbone
    hook = backbone.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def wait_until(condition, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
