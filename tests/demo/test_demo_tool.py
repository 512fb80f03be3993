"""tools/demo.py: its arguments, and how it starts and ends."""

import os
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import util

import pytest
from demo_server import Visitor, image_file
from small_runs import ROOT

from mmseg_volo.cli import run_tool
from mmseg_volo.demo import check_installed
from mmseg_volo.errors import ConfigError

pytest.importorskip('gradio', reason="needs gradio: pip install -e '.[demo]'")
import httpx

from mmseg_volo.demo.server import free_port

pytest_plugins = ['demo_server']


def run_demo(monkeypatch, *arguments: str) -> str | int:
    """The status or message with which the tool ends."""
    spec = util.spec_from_file_location('demo_tool', ROOT / 'tools/demo.py')
    tool = util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, 'argv', ['demo.py', *arguments])
    with pytest.raises(SystemExit) as caught:
        run_tool(tool.main)
    return caught.value.code


def test_bad_arguments_end_in_one_line(trained, monkeypatch, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        said = run_demo(monkeypatch, *trained, '--port', str(port))
    assert said.startswith(f'error: cannot listen on 127.0.0.1 port {port}: Address') and 'another --port' in said
    assert 'no.such.host.invalid' in run_demo(monkeypatch, *trained, '--host', 'no.such.host.invalid')
    assert 'port must be 0-65535' in run_demo(monkeypatch, *trained, '--port', '70000')
    assert 'does not exist' in run_demo(monkeypatch, 'none.py', trained[1], '--port', '0')
    for folder in (str(tmp_path), str(tmp_path / 'gone')):
        assert run_demo(monkeypatch, *trained, '--examples', folder).endswith(f'in {folder}')
    with monkeypatch.context() as patch:
        patch.setattr('importlib.util.find_spec', lambda name: None)
        with pytest.raises(ConfigError, match=r"needs gradio: pip install -e '\.\[demo\]'"):
            check_installed()


@pytest.mark.parametrize('number, host', [(signal.SIGINT, '127.0.0.1'), (signal.SIGTERM, '::1')], ids=str)
def test_it_serves_until_a_signal_and_leaves_nothing(number, host, trained, tmp_path, monkeypatch, capfd):
    try:
        port = free_port(host, 0)
    except ConfigError:
        pytest.skip(f'needs the address {host}')
    url = f'http://{f"[{host}]" if ":" in host else host}:{port}/'
    temporary, ended = tmp_path / 'temporary', threading.Event()
    # Of a test process of pytest-xdist SIGINT is ignored.
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # a proxy that does not answer
    monkeypatch.delenv('no_proxy', raising=False)
    path = image_file(tmp_path / 'one.png')

    def visit() -> None:
        """Predict an image, and start another prediction, as an open tab does; then end the server."""
        try:
            visitor = Visitor(wait_for(url))
            assert 'one.png' in visitor.http.get('config').text
            with visitor.http.stream('GET', 'gradio_api/heartbeat/visitor') as beats:
                next(beats.iter_lines())
                image = visitor.upload(path)
                assert visitor.ask(image)['success'] and any(temporary.rglob('one_classes.png'))
                visitor.join(image, True)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), number)

    arguments = ['--port', str(port), '--host', host, '--device', 'cpu', '--examples', str(tmp_path)]
    with ThreadPoolExecutor(1) as pool:
        visited = pool.submit(visit)
        try:
            assert run_demo(monkeypatch, *trained, *arguments) == 0
        finally:
            ended.set()
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
        visited.result()
    out, err = capfd.readouterr()
    assert out.endswith(f'{url} (Ctrl-C ends it)\nstopping\nstopped; no files were kept\n')
    assert 'Traceback' not in err and 'ERROR' not in err
    assert not os.listdir(temporary)
    with pytest.raises(OSError):
        socket.create_connection((host, port), timeout=1)


def wait_for(url: str) -> str:
    pause = threading.Event()
    for _ in range(300):
        try:
            httpx.head(url, trust_env=False)
            return url
        except httpx.ConnectError:
            pause.wait(0.1)
    raise AssertionError('the server does not start')
