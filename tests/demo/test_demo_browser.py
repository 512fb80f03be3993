"""The demo page in a real browser, as its visitors use it."""

import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import chromium, watched
from demo_server import bad_files, image_file

from mmseg_volo.inference import Predictor, read_image
from mmseg_volo.inference.visualize import overlay

pytest_plugins = ['demo_server']
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser, page, width: int = 1200, **options):
    """A tab with the page; at its end nothing may be on the console, and no other machine may have been asked."""
    with watched(browser, viewport=dict(width=width, height=900), accept_downloads=True, **options) as tab:
        tab.set_default_timeout(20_000)
        tab.goto(page.blocks.local_url)
        tab.wait_for_selector('#predict')
        yield tab
        assert tab.complaints == []


def choose(tab, path: Path) -> None:
    tab.set_input_files('#image input[type=file]', str(path))
    tab.wait_for_selector('#image img', state='attached')


def download(tab, name: str) -> np.ndarray:
    with tab.expect_download() as caught:
        tab.click(f'#download-{name}:not([disabled])')
    return cv2.imread(str(caught.value.path()), cv2.IMREAD_UNCHANGED)


def test_upload_slider_classes_and_downloads(browser, page, predictor, tmp_path):
    path = image_file(tmp_path / 'image.png')
    image, expected = read_image(path), predictor(read_image(path))
    with opened(browser, page) as tab:
        assert tab.title() == 'a <b>model</b>' and tab.inner_text('h1') == 'a <b>model</b>'
        assert tab.is_disabled('#download-ids')
        choose(tab, path)
        tab.click('#predict')
        assert np.array_equal(download(tab, 'ids'), expected)
        assert np.array_equal(download(tab, 'overlay'), overlay(image, expected, predictor.palette))

        box = tab.locator('#slider .slider-wrap').bounding_box()
        middle = box['y'] + box['height'] / 2
        for x in (0.2, 0.8):  # the overlay is to the right of the handle
            tab.mouse.move(*(c['x'] + c['width'] / 2 for c in [tab.locator('#slider .inner').bounding_box()]), middle)
            tab.mouse.down()
            tab.mouse.move(box['x'] + x * box['width'], middle, steps=4)
            tab.mouse.up()
            handle = tab.locator('#slider .inner').bounding_box()
            assert handle['x'] + handle['width'] / 2 == pytest.approx(box['x'] + x * box['width'], abs=4)

        tab.get_by_role('tab', name='Classes').click()
        legend = tab.locator('#classes .legend-item')
        counts = np.bincount(expected.ravel(), minlength=19)
        assert legend.count() == np.count_nonzero(counts)
        share = 100 * counts.max() / counts.sum()
        assert legend.nth(0).inner_text().strip() == f'{predictor.classes[counts.argmax()]} {share:.1f} %'
        legend.nth(0).hover()
        tab.wait_for_selector('#classes .mask.active')
        assert tab.locator('#classes .mask.inactive').count() == legend.count() - 1
        tab.get_by_role('tab', name='Confidence').click()
        tab.wait_for_selector('#confidence img')


def test_an_example_on_a_phone(browser, page):
    with opened(browser, page, width=360, has_touch=True, is_mobile=True) as tab:
        tab.tap('#examples button')
        tab.wait_for_selector('#image img')
        tab.tap('#predict')
        tab.wait_for_selector('#slider img')
        assert download(tab, 'ids').shape == (96, 160)
        assert tab.evaluate('document.documentElement.scrollWidth') <= 360
        tab.get_by_role('tab', name='Classes').tap()
        tab.wait_for_selector('#classes .legend-item')


def test_progress_stop_and_a_closed_tab(browser, page, predictor, tmp_path):
    path = image_file(tmp_path / 'large.png', 5, 512, 512)
    with opened(browser, page) as tab, slowed(predictor, 0.3):
        choose(tab, path)
        tab.check('input[type=checkbox]')
        tab.click('#predict')
        tab.wait_for_selector('text=/\\d+ of \\d+ windows/')
        tab.click('#stop')
        wait_until(lambda: not page._running)
        assert tab.is_disabled('#download-ids')
        tab.click('#predict')
        tab.wait_for_selector('text=/\\d+ of \\d+ windows/')
        tab.close()
        wait_until(lambda: not page._running)


def test_two_visitors_wait_for_each_other(browser, page, predictor, tmp_path):
    paths = [image_file(tmp_path / f'{i}.png', i, 96, 160 + 32 * i) for i in range(2)]
    with opened(browser, page) as one, opened(browser, page) as two, slowed(predictor, 1):
        for tab, path in zip((one, two), paths, strict=True):
            choose(tab, path)
        one.click('#predict')
        two.click('#predict')
        two.wait_for_selector('text=/queue: 1\\/1/')
        for tab, path in zip((one, two), paths, strict=True):
            assert np.array_equal(download(tab, 'ids'), predictor(read_image(path)))


def test_refusals_are_read_on_the_page(browser, page, tmp_path):
    path, words = bad_files(tmp_path)['wide.png']
    heavy = tmp_path / 'heavy.png'
    heavy.write_bytes(path.read_bytes() + bytes(2**20))
    with opened(browser, page) as tab:
        choose(tab, path)
        tab.click('#predict')
        tab.wait_for_selector(f'[data-testid=toast-body]:has-text("{words}")')
    with watched(browser) as tab:  # Gradio refuses this one, and complains on the console too
        tab.goto(page.blocks.local_url)
        tab.wait_for_selector('#predict')
        tab.set_input_files('#image input[type=file]', str(heavy))
        tab.wait_for_selector('[data-testid=toast-body]:has-text("exceed the maximum allowed size of 1.0 Mb")')
        assert not any(text.startswith('request') for text in tab.complaints)


@contextmanager
def slowed(predictor: Predictor, seconds: float):
    """Make each forward pass take longer, as that of a large model does."""
    backbone = predictor.model.backbone
    hook = backbone.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def wait_until(condition, seconds: float = 10) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
