"""The demo page as its visitors' browsers and raw requests see it."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
import pytest
from demo_server import Visitor, bad_files, image_file
from small_runs import ROOT

from mmseg_volo.inference import read_image
from mmseg_volo.inference.visualize import overlay

pytest.importorskip('gradio', reason="needs gradio: pip install -e '.[demo]'")
import httpx
from gradio.route_utils import delete_files_created_by_app

pytest_plugins = ['demo_server']


@pytest.fixture
def visitor(page) -> Visitor:
    return Visitor(page.blocks.local_url)


@pytest.mark.parametrize('options', [(False, 'fp32'), (True, 'fp32'), (False, 'bf16'), (True, 'bf16')], ids=str)
def test_the_page_shows_what_the_predictor_predicts(visitor, predictor, tmp_path, options):
    path = image_file(tmp_path / 'my image.png')
    image = read_image(path)
    shown = visitor.predict(path, *options)
    expected = predictor.with_options(options[0], precision=options[1], confidence=True)
    expected = expected.predict(expected.prepare(image))

    files = [shown[name]['value'] for name in ('ids', 'overlay')]
    assert [file['path'].rpartition('/')[2] for file in files] == ['my image_classes.png', 'my image_overlay.png']
    assert all(shown[name]['interactive'] for name in ('ids', 'overlay'))
    ids, over = map(visitor.image, files)
    assert ids.dtype == np.uint8 and np.array_equal(ids, expected.classes)
    assert np.array_equal(over, overlay(image, expected.classes, predictor.palette))

    before, after = map(visitor.image, shown['slider'])
    assert np.abs(before.astype(int) - image).mean() < 5
    assert np.abs(after.astype(int) - overlay(image, expected.classes, predictor.palette, 0.6)).mean() < 12

    masks = shown['classes']['value']['annotations']
    counts = np.bincount(expected.classes.ravel(), minlength=19)
    order = sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
    assert len(masks) == len(order) > 2
    for mask, i in zip(masks, order, strict=True):
        assert mask['label'] == f'{predictor.classes[i]} {100 * counts[i] / ids.size:.1f} %'
        pixels = visitor.image(mask['image'])
        assert np.array_equal(pixels[..., 3] > 0, expected.classes == i)
        assert np.array_equal(pixels[expected.classes == i][0, :3], predictor.palette[i][::-1])
        assert shown['classes']['color_map'][mask['label']] == '#{:02x}{:02x}{:02x}'.format(*predictor.palette[i])

    sure = cv2.applyColorMap(np.uint8(expected.confidence * 255), cv2.COLORMAP_VIRIDIS)
    assert np.abs(visitor.image(shown['confidence']).astype(int) - sure).mean() < 10
    assert shown['note'].startswith('160 x 96 pixels, ' + ('multi-scale' if options[0] else 'single scale'))


def test_a_large_image_is_shown_smaller_and_downloads_have_its_size(visitor, predictor, tmp_path):
    path = image_file(tmp_path / 'long.png', 0, 400, 1600)
    shown = visitor.predict(path)
    assert [visitor.image(file).shape for file in shown['slider']] == [(320, 1280, 3)] * 2
    assert np.array_equal(visitor.image(shown['ids']['value']), predictor(read_image(path)))


def test_visitors_read_what_is_wrong_and_nothing_about_the_server(page, visitor, tmp_path):
    files = bad_files(tmp_path)
    for name in ('empty.png', 'text.png', 'drawing.svg', 'bomb.png', 'moving.gif'):
        said = visitor.refusal(files[name][0])
        assert files[name][1] in said and page.blocks.GRADIO_CACHE not in said
    assert visitor.refusal(None) == 'Choose an image first.'
    path = image_file(tmp_path / 'image.png')
    for precision in ('fp8', ['fp32'], {'fp32': 1}):
        assert visitor.refusal(path, False, precision) == 'this model does not offer this option'
    data = dict(url='data:image/png;base64,AAAA', meta={'_type': 'gradio.FileData'})  # would pass by the limits
    assert not visitor.ask(dict(data, path=''))['success']
    heavy = dict(files=('heavy.png', path.read_bytes() + bytes(2**20)))
    answer = visitor.http.post('gradio_api/upload', files=heavy)
    assert answer.status_code == 413 and 'maximum' in answer.text
    assert not list(Path(page.blocks.GRADIO_CACHE).rglob('heavy.png'))
    visitor.predict(path)  # it goes on


def test_an_unforeseen_error_is_logged_and_hidden(page, visitor, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError('secret')

    path = image_file(tmp_path / 'image.png')
    with monkeypatch.context() as patch:
        patch.setattr(page._model, 'predict', fail)
        assert visitor.refusal(path) == 'The prediction failed; the server log has the reason.'
        assert 'secret' in caplog.text
        patch.setattr(page._model, 'predict', lambda *_: np.empty(10**15))
        assert 'not have enough memory' in visitor.refusal(path)
    visitor.predict(path)


def test_no_address_is_fetched(visitor):
    listener = socket.create_server(('127.0.0.1', 0))
    listener.settimeout(1)
    address = f'http://127.0.0.1:{listener.getsockname()[1]}/image.png'
    given = {'path': address, 'url': address, 'meta': {'_type': 'gradio.FileData'}}
    assert visitor.refusal(given) == 'This is not an uploaded image.'
    for path in (f'gradio_api/file={address}', f'gradio_api/proxy={address}'):
        assert visitor.http.get(path).status_code == 404
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()


def test_only_images_of_visitors_and_routes_of_the_page_are_served(page, visitor, trained, tmp_path):
    path, folder = image_file(tmp_path / 'served.png'), Path(page.blocks.GRADIO_CACHE)
    visitor.predict(path)
    inside = next(folder.rglob('served_classes.png'))
    assert len(inside.parent.name) >= 8 and inside.parent.parent == folder  # nobody guesses the address
    assert visitor.http.get(f'gradio_api/file={quote(str(inside))}').content == inside.read_bytes()
    outside = (path, *trained, '/etc/passwd', f'{inside.parent}/../../../etc/passwd')
    for target in (Path(__file__).resolve(), folder, *outside):
        assert visitor.http.get(f'gradio_api/file={quote(str(target))}').status_code in (403, 404), target
    for target in outside:
        message = visitor.ask({'path': str(target), 'meta': {'_type': 'gradio.FileData'}})
        assert not message['success'] and str(target) not in str(message), target
    visitor.predict({'path': str(inside), 'meta': {'_type': 'gradio.FileData'}})

    svg = visitor.upload(bad_files(tmp_path)['drawing.svg'][0])
    answer = visitor.http.get(f'gradio_api/file={svg["path"]}')  # never shown as a page of this server
    assert answer.headers['content-disposition'].startswith('attachment')

    closed = 'docs redoc openapi.json monitoring gradio_api/info gradio_api/runs gradio_api/openapi.json'
    for route in closed.split():
        assert visitor.http.get(route).status_code == 404, route
    for route in ('call/_predict', 'run/_predict', 'api/_predict', 'component_server', 'process_recording'):
        assert visitor.http.post(f'gradio_api/{route}', json={'data': []}).status_code == 404, route
    body = dict(data=[None, False, 'fp32'], fn_index=visitor.functions['_predict'], session_hash='visitor')
    assert visitor.http.post('gradio_api/run/predict', json=body).status_code == 404  # past the queue


def test_the_page_names_no_other_machine_and_no_folder_of_the_server(page, visitor, trained, tmp_path):
    answer = visitor.http.get('')
    assert "default-src 'self'" in answer.headers['content-security-policy']
    assert answer.headers['x-content-type-options'] == 'nosniff'
    assert '<b>model' not in answer.text
    for text in (answer.text, visitor.http.get('config').text):
        assert 'cdnjs' not in text and 'fonts.g' not in text
        assert str(ROOT) not in text and str(Path(trained[0]).parent) not in text
        assert '/examples' not in text and 'example 0.png' in text
    sent = visitor.upload(image_file(tmp_path / 'sent.png'))
    answers = [visitor.http.get(path).text for path in ('', 'config', 'gradio_api/file=/visitors/none.png')]
    answers += [str(sent), str(visitor.ask(sent))]
    assert str(page.blocks.GRADIO_CACHE) not in ''.join(answers) and sent['path'].startswith('/visitors/')
    config = visitor.http.get('config').json()
    assert not config['analytics_enabled'] and all(f['api_visibility'] == 'private' for f in config['dependencies'])


def test_two_visitors_at_once_get_their_own(page, predictor, tmp_path):
    paths = []
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        paths.append(image_file(tmp_path / str(i) / 'same name.png', i, 96, 128 + 16 * i))

    def visit(path: Path) -> np.ndarray:
        visitor = Visitor(page.blocks.local_url, f'visitor{path.parent.name}')
        return visitor.image(visitor.predict(path)['ids']['value'])

    with ThreadPoolExecutor(2) as pool:
        for path, ids in zip(paths, pool.map(visit, paths), strict=True):
            assert np.array_equal(ids, predictor(read_image(path)))


def wait_until(condition, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_queue_has_an_end(page, model, tmp_path):
    path = image_file(tmp_path / 'image.png')
    visitors = [Visitor(page.blocks.local_url, f'visitor{i}') for i in range(4)]
    with model._lock:  # the first is at work, two wait
        for number, visitor in enumerate(visitors[:3]):
            assert visitor.join(visitor.upload(path)).status_code == 200
            wait_until(lambda n=number: page._running and len(page.blocks._queue) == n)
        answer = visitors[3].join(visitors[3].upload(path))
        assert answer.status_code == 503 and 'Queue is full' in answer.text
        assert len(page._running) == 1
    assert all(visitor.result()['success'] for visitor in visitors[:3])


def test_a_prediction_ends_with_its_session_and_no_other(page, model, tmp_path):
    path = image_file(tmp_path / 'image.png')
    first, second = (Visitor(page.blocks.local_url, name) for name in ('first', 'second'))
    stop = dict(fn_index=first.functions['_leave'], data=[])
    with model._lock:
        assert first.join(first.upload(path)).status_code == 200
        wait_until(lambda: page._running)
        flag = next(iter(page._running))
        second.http.post('gradio_api/run/predict', json=dict(stop, session_hash='second')).raise_for_status()
        assert not flag.is_set()
        with first.http.stream('GET', 'gradio_api/heartbeat/first') as beats:  # an open tab, which is then closed
            next(beats.iter_lines())
        wait_until(flag.is_set)
    assert first.result()['output']['error'] == 'Stopped.'
    assert not page._running
    second.predict(path)


def test_nobody_else_can_touch_the_work_of_a_session(page, model, tmp_path):
    """Even a stranger who knows the session and the event."""
    path = image_file(tmp_path / 'image.png')
    victim, stranger = (Visitor(page.blocks.local_url, name) for name in ('victim', 'stranger'))
    outside = httpx.Client(base_url=page.blocks.local_url, trust_env=False)  # without the page's cookie
    ends = [number for number, event in page.blocks.fns.items() if any(name == 'unload' for _, name in event.targets)]
    assert ends
    with model._lock:
        event = victim.join(victim.upload(path)).json()['event_id']
        wait_until(lambda: page._running)
        flag = next(iter(page._running))
        for http in (stranger.http, outside):
            for number in page.blocks.fns:
                call = dict(data=[], fn_index=number, session_hash='victim', event_id=event)
                for route in ('run/predict', 'queue/join', 'cancel'):
                    assert http.post(f'gradio_api/{route}', json=call).status_code in (403, 404), (number, route)
            for route in ('heartbeat/victim', 'queue/data?session_hash=victim'):
                with http.stream('GET', f'gradio_api/{route}') as answer:
                    assert answer.status_code == 403
        own = dict(data=[], session_hash='stranger', event_id=event)
        stranger.http.post(
            'gradio_api/cancel', json=dict(own, fn_index=stranger.functions['_predict'])
        ).raise_for_status()
        for number in (*ends, 'x', None, 99, True, 1.0):
            for route in ('run/predict', 'queue/join'):
                assert stranger.http.post(f'gradio_api/{route}', json=dict(own, fn_index=number)).status_code == 404
        for odd in (b'', b'[' * 60_000, b'{}', b'{"fn_index": 1, "session_hash": ["victim"]}'):
            assert stranger.http.post('gradio_api/queue/join', content=odd).status_code == 400
        assert not flag.is_set()
    assert victim.result()['success']


def test_what_visitors_send_is_limited(page, visitor, tmp_path):
    path = image_file(tmp_path / 'image.png')
    assert visitor.http.post('gradio_api/queue/join', content=bytes(2**17)).status_code == 413
    two = [('files', (f'{i}.png', bytes(600_000))) for i in range(2)]  # each is small enough
    assert visitor.http.post('gradio_api/upload', files=two).status_code == 413

    def chunks() -> Iterator[bytes]:  # a request that does not tell its length
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        yield from [bytes(2**16)] * 20

    kind = {'content-type': 'multipart/form-data; boundary=x'}
    assert visitor.http.post('gradio_api/upload', content=chunks(), headers=kind).status_code == 413
    head = (
        b'POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n'
        b'Content-Length: 90000\r\n\r\n--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    address = page.blocks.local_url.removeprefix('http://').strip('/').split(':')
    slow = []

    def refused() -> bool:
        slow.append(socket.create_connection(address))
        slow[-1].sendall(head)
        return visitor.http.post('gradio_api/upload', files=two[:1]).status_code == 503

    wait_until(refused)
    assert len(slow) >= 16
    for connection in slow:
        connection.close()
    wait_until(lambda: visitor.http.post('gradio_api/upload', files=two[:1]).status_code == 200)
    wait_until(lambda: not [p for p in Path(page.blocks.GRADIO_CACHE).iterdir() if p.is_file()])
    visitor.predict(path)


def test_files_of_visitors_are_deleted_and_examples_stay(page, visitor, tmp_path):
    path, folder = image_file(tmp_path / 'mine.png', 7), Path(page.blocks.GRADIO_CACHE)
    image = visitor.upload(path)
    visitor.predict(image)
    delete_files_created_by_app(page.blocks, age=3600)
    assert len(list(folder.rglob('mine*.png'))) == 3
    delete_files_created_by_app(page.blocks, age=0)
    left = sorted(p.name for p in folder.rglob('*') if p.is_file())
    assert left == ['example 0.png', 'example 1.png']
    assert 'no longer on the server' in visitor.refusal(image)
    example = next(folder.rglob('example 0.png'))
    visitor.predict({'path': str(example), 'meta': {'_type': 'gradio.FileData'}})
