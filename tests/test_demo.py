"""The page to try a model: the server as Gradio's client and raw requests see it."""

import base64
import gzip
import itertools
import json
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import cv2
import numpy as np
import pytest
from demo_server import LIMITS, bad_files, picture_file
from PIL import Image
from small_runs import ROOT

from mmseg_volo.cli import run_tool
from mmseg_volo.datasets.street_drawing import draw_scene
from mmseg_volo.demo import check_installed
from mmseg_volo.demo.model import SharedModel, Stopped
from mmseg_volo.demo.uploads import RefusedPicture, read_upload
from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor, read_image
from mmseg_volo.inference.visualize import overlay

pytest.importorskip('gradio', reason="needs gradio: pip install -e '.[demo]'")

import httpx
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

pytest_plugins = ['demo_server']


@pytest.fixture(scope='module', autouse=True)
def _temporary_folder(tmp_path_factory):
    """Gradio's client makes folders there and leaves them."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp('temporary'))
    yield
    tempfile.tempdir = before


@pytest.fixture
def client(server) -> Client:
    return Client(server.url, verbose=False)


def ask(client: Client, path: Path, multi_scale: bool = False, precision: str = 'fp32') -> tuple:
    return client.predict(handle_file(path), multi_scale, precision, api_name='/predict')


def unpacked(text: str, shape: tuple[int, int]) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def get(server, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(server.url + path, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask_for(server, path: str | Path) -> str:
    """What the server answers where a file that is on it already is asked for, without a client's own checks."""
    given = {'path': str(path), 'meta': {'_type': 'gradio.FileData'}}
    url = server.url + 'gradio_api/call/predict'
    body = json.dumps({'data': [given, False, 'fp32']}).encode()
    request = urllib.request.Request(url, body, {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request, timeout=20) as answer:
        event = json.load(answer)['event_id']
    with urllib.request.urlopen(f'{url}/{event}', timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.parametrize('options', [(False, 'fp32'), (True, 'fp32'), (False, 'bf16'), (True, 'bf16')], ids=str)
def test_the_page_gives_what_the_predictor_gives(client, predictor, tmp_path, options):
    path = picture_file(tmp_path)
    shown, classes, over = ask(client, path, *options)
    expected = predictor.with_options(options[0], precision=options[1], confidence=True)
    expected = expected.predict(expected.prepare(read_image(path)))
    ids = cv2.imread(classes, cv2.IMREAD_UNCHANGED)
    assert ids.dtype == np.uint8 and np.array_equal(ids, expected.classes)
    assert np.array_equal(cv2.imread(over), overlay(read_image(path), expected.classes, predictor.palette))
    assert (Path(classes).name, Path(over).name) == ('street 0_classes.png', 'street 0_overlay.png')
    assert np.array_equal(unpacked(shown['ids'], ids.shape), ids)
    assert np.array_equal(unpacked(shown['confidence'], ids.shape), np.rint(expected.confidence * 100))
    counts = np.bincount(ids.ravel(), minlength=19) / ids.size
    assert len(shown['shares']) > 2 and dict(map(tuple, shown['shares'])) == {i: c for i, c in enumerate(counts) if c}
    assert [part for _, part in shown['shares']] == sorted(counts[counts > 0], reverse=True)
    assert shown['names'] == list(predictor.classes) and shown['note'].startswith('160 x 96 pixels')


def test_pictures_of_every_kind_are_taken_as_the_package_reads_them(tmp_path):
    image = draw_scene(3, (64, 96))[0]
    rgb = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
    cv2.imwrite(str(tmp_path / 'deep.png'), image.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / 'alpha.png'), np.dstack((image, np.full(image.shape[:2], 90, np.uint8))))
    cv2.imwrite(str(tmp_path / 'grey.png'), image[..., 0])
    for name in ('plain.bmp', 'plain.tif', 'plain.webp', 'plain.gif'):
        rgb.save(tmp_path / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / 'turned.jpg', exif=exif)
    rgb.save(tmp_path / 'two.jpg', format='MPO', save_all=True, append_images=[rgb.rotate(90)])
    for path in sorted(tmp_path.iterdir()):
        read = read_upload(path, LIMITS)
        assert np.array_equal(read, read_image(path)) and read.dtype == np.uint8
        assert read.shape == ((96, 64, 3) if path.name == 'turned.jpg' else (64, 96, 3)), path
    for name in ('deep.png', 'alpha.png', 'plain.bmp', 'plain.tif'):
        assert np.array_equal(read_upload(tmp_path / name, LIMITS), image), name


def test_what_is_no_picture_or_too_large_is_refused_in_words(tmp_path):
    for path, words in bad_files(tmp_path).values():
        with pytest.raises(RefusedPicture, match=words):
            read_upload(path, LIMITS)
    with pytest.raises(RefusedPicture, match='no longer on the server'):
        read_upload(tmp_path / 'gone.png', LIMITS)


def test_the_server_says_what_is_wrong_and_nothing_of_itself(client, server, tmp_path):
    files = bad_files(tmp_path)
    for name in ('empty.png', 'text.png', 'bomb.png', 'moving.gif'):
        with pytest.raises(AppError, match=files[name][1]) as caught:
            ask(client, files[name][0])
        assert str(server.folder) not in str(caught.value)
    with pytest.raises(AppError, match='Choose a picture first'):
        client.predict(None, False, 'fp32', api_name='/predict')
    with pytest.raises(AppError):
        ask(client, picture_file(tmp_path), False, 'fp8')
    with files['heavy.png'][0].open('rb') as heavy:
        answer = httpx.post(server.url + 'gradio_api/upload', files={'files': heavy})
    assert answer.status_code == 413 and 'maximum' in answer.text
    assert not list(server.folder.rglob('heavy.png'))
    assert len(ask(client, picture_file(tmp_path))) == 3  # it goes on


def test_an_address_is_not_fetched(client, server):
    listener = socket.create_server(('127.0.0.1', 0))
    listener.settimeout(1)
    address = f'http://127.0.0.1:{listener.getsockname()[1]}/picture.png'
    given = {'path': address, 'url': address, 'meta': {'_type': 'gradio.FileData'}}
    with pytest.raises(AppError, match='no uploaded picture'):
        client.predict(given, False, 'fp32', api_name='/predict')
    for path in (f'gradio_api/file={address}', f'gradio_api/proxy={address}'):
        assert get(server, path)[0] == 403
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()


def test_nothing_but_pictures_is_served(client, server, trained, tmp_path):
    path = picture_file(tmp_path, name='served.png')
    classes = ask(client, path)[1]
    inside = next(server.folder.rglob('served_classes.png'))
    status, data = get(server, f'gradio_api/file={urllib.parse.quote(str(inside))}')
    assert status == 200 and data == Path(classes).read_bytes()
    assert len(inside.parent.name) >= 8 and inside.parent.parent == server.folder
    secret = Path(__file__).resolve()
    for target in (secret, *trained, '/etc/passwd', server.folder, f'{inside.parent}/../../../etc/passwd', path):
        assert get(server, f'gradio_api/file={urllib.parse.quote(str(target))}')[0] in (403, 404), target
    for target in (path, *trained, '/etc/passwd', f'{inside.parent}/../../../etc/passwd'):
        assert 'event: error' in ask_for(server, target), target
    assert 'event: complete' in ask_for(server, inside)
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    uploaded = httpx.post(server.url + 'gradio_api/upload', files={'files': ('a.svg', drawing)}).json()[0]
    assert 'not a picture of a kind' in ask_for(server, uploaded)
    answer = httpx.get(f'{server.url}gradio_api/file={uploaded}')  # never shown as a page of this server
    assert answer.headers['content-disposition'].startswith('attachment'), answer.headers
    for path in ('docs', 'redoc', 'openapi.json'):
        assert get(server, path)[0] == 404
    with urllib.request.urlopen(server.url) as answer:
        assert "default-src 'self'" in answer.headers['content-security-policy']
        text = answer.read().decode()
    assert '<b>model' not in text and 'cdnjs' not in text and 'fonts.g' not in text


def test_two_visitors_at_once_get_their_own(server, predictor, tmp_path):
    paths = [
        picture_file(tmp_path, seed, (96, 128 + 16 * seed), 'same name.png' if seed > 3 else '') for seed in range(4)
    ]

    def visit(path: Path) -> np.ndarray:
        return cv2.imread(ask(Client(server.url, verbose=False), path)[1], cv2.IMREAD_UNCHANGED)

    with ThreadPoolExecutor(2) as pool:
        for path, found in zip(paths, pool.map(visit, paths), strict=True):
            assert np.array_equal(found, predictor(read_image(path)))


def test_one_prediction_at_a_time(model):
    steps, image = [], draw_scene(0, (64, 128))[0]

    def visit(name: str) -> None:
        model.predict(image, True, 'fp32', lambda done, total: steps.append((name, done, total)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(visit, 'abc'))
    names = [name for name, _, _ in steps]
    assert set(names) == set('abc') and len(names) >= 9
    assert sum(a != b for a, b in itertools.pairwise(names)) == 2, names
    assert steps[-1][1] == steps[-1][2] > 1


def test_a_prediction_can_be_stopped_and_the_next_is_right(model, predictor):
    image = draw_scene(0, (96, 160))[0]

    def stop(done: int, total: int) -> None:
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        model.predict(image, True, 'fp32', stop)
    assert np.array_equal(model.predict(image).classes, predictor(image))


def test_only_options_that_there_are(predictor, model):
    class Plain(Predictor):
        """One that cannot choose, as a model of mmseg's own."""

        def __init__(self, inner: Predictor):
            self.classes, self.palette, self._inner = inner.classes, inner.palette, inner

        def with_options(self, aug_test: bool = False, **options):
            if aug_test or options:
                raise ConfigError('no such options')
            return self._inner

    assert model.precisions == ['fp32', 'bf16', 'fp16'] and model.multi_scale
    plain = SharedModel(Plain(predictor))
    assert plain.precisions == [] and not plain.multi_scale
    image = draw_scene(0, (64, 128))[0]
    found = plain.predict(image)
    assert found.confidence is None and np.array_equal(found.classes, predictor(image))
    with pytest.raises(ConfigError, match='no such option'):
        plain.predict(image, multi_scale=True)


def test_the_queue_has_an_end(server, model, tmp_path):
    path = picture_file(tmp_path)
    clients = [Client(server.url, verbose=False) for _ in range(4)]
    with model._lock:  # the first is at work, two wait
        jobs = []
        for client in clients[:3]:
            jobs.append(client.submit(handle_file(path), False, 'fp32', api_name='/predict'))
            limit = time.monotonic() + 20
            while len(server.visits._flags) < 1 or len(server.page._queue) < len(jobs) - 1:
                assert time.monotonic() < limit
                time.sleep(0.01)
        with pytest.raises(Exception, match='Queue is full'):
            clients[3].predict(handle_file(path), False, 'fp32', api_name='/predict')
    assert all(len(job.result(30)) == 3 for job in jobs)


def test_files_of_visitors_go_and_examples_stay(client, server, tmp_path):
    path = picture_file(tmp_path, 7, name='mine.png')
    ask(client, path)
    upload = next(server.folder.rglob('mine.png'))
    examples = sorted((server.folder / 'examples').iterdir())
    assert len(examples) == 3 and list(server.folder.rglob('mine_*.png'))
    delete_files_created_by_app(server.page, age=3600)
    assert upload.exists()
    delete_files_created_by_app(server.page, age=0)
    assert not list(server.folder.rglob('mine*.png')) and all(p.exists() for p in examples)
    answer = ask_for(server, upload)
    assert 'event: error' in answer and 'no longer on the server' in answer
    assert 'event: complete' in ask_for(server, examples[0])


def run_demo(monkeypatch, *arguments: str) -> str:
    """What the tool says when it ends with an error."""
    spec = util.spec_from_file_location('demo_tool', ROOT / 'tools/demo.py')
    tool = util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, 'argv', ['demo.py', *arguments])
    with pytest.raises(SystemExit) as caught:
        run_tool(tool.main)
    return str(caught.value)


def test_a_taken_port_or_a_missing_library_is_one_line(server, trained, monkeypatch):
    port = urllib.parse.urlsplit(server.url).port
    said = run_demo(monkeypatch, *trained, '--port', str(port))
    assert said.startswith(f'error: cannot listen on 127.0.0.1 port {port}: ') and 'choose another --port' in said
    assert 'no.such.host.invalid' in run_demo(monkeypatch, *trained, '--host', 'no.such.host.invalid')
    assert '--port must be' in run_demo(monkeypatch, *trained, '--port', '70000')
    assert 'does not exist' in run_demo(monkeypatch, 'none.py', trained[1], '--port', '0')
    with monkeypatch.context() as patch:
        patch.setattr('importlib.util.find_spec', lambda name: None)
        with pytest.raises(ConfigError, match=r"gradio and uvicorn: pip install -e '\.\[demo\]'"):
            check_installed()
