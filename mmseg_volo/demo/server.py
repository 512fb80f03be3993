"""The server of the page: one process that asks nothing of the outside and leaves nothing behind."""

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

# Read by Gradio on import, and by what it imports.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import gradio as gr
import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from .model import SharedModel
from .page import FOLDER, Limits, Visits, build

_LOG = logging.getLogger('uvicorn.error')
_FONTS = ['system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'sans-serif']
# The browser, too, is told to ask nobody else.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
_HEADERS = {
    'content-security-policy': _POLICY,
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
}


class _Guard:
    """ASGI middleware: headers on every answer, and no fetching of addresses for visitors, which Gradio offers."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        if '://' in scope['path'] or '/proxy=' in scope['path']:
            await send({'type': 'http.response.start', 'status': 403, 'headers': []})
            return await send({'type': 'http.response.body', 'body': b'Addresses are not fetched.'})

        async def with_headers(message: dict) -> None:
            if message['type'] == 'http.response.start':
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, 'headers': [*message.get('headers', ()), *more]}
            await send(message)

        return await self.app(scope, receive, with_headers)


class DemoServer(uvicorn.Server):
    """The page of one model.

    Gradio keeps its folder for temporary files in the environment, so a process has one such server at a time.

    Args:
        bound: where to listen, from :func:`bind`.
        model: answers.
        title, about: plain text for the head of the page.
        limits: of pictures.
        queue: how many pictures may wait.

    Attributes:
        url: where the page is.
        page: it, for Gradio.
        folder: the temporary files, gone after :meth:`run`.
        visits: the predictions under way.
    """

    def __init__(
        self,
        bound: socket.socket,
        model: SharedModel,
        title: str,
        about: str = '',
        limits: Limits = Limits(),  # noqa: B008  (a tuple)
        queue: int = 16,
    ):
        self._socket = bound
        host, port = bound.getsockname()[:2]
        self.url = f'http://{f"[{host}]" if ":" in host else host}:{port}/'
        self.folder = Path(tempfile.mkdtemp(prefix='mmseg_volo_demo_')).resolve()
        self.visits = Visits()
        os.environ['GRADIO_TEMP_DIR'] = str(self.folder)
        try:
            self.page = build(model, title, about, limits, queue, self.visits)
            app = gr.mount_gradio_app(
                FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
                self.page,
                path='/',
                app_kwargs={'openapi_url': None},
                server_name=host,
                server_port=port,
                footer_links=[],
                run_history=False,
                show_error=False,  # what visitors may read comes as gr.Error
                ssr_mode=False,
                pwa=False,
                max_file_size=int(limits.megabytes * 2**20),
                theme=gr.themes.Default(font=_FONTS, font_mono=['ui-monospace', 'monospace']),
                css_paths=FOLDER / 'page.css',
            )
            # Or Gradio, which is mounted here and not launched, does not check which files it is asked for.
            self.page.has_launched = self.page.is_running = True
        except BaseException:
            self._close()
            raise
        super().__init__(
            uvicorn.Config(
                _Guard(app), log_level='warning', timeout_graceful_shutdown=1, server_header=False, ws='none'
            )
        )

    def run(self) -> None:
        """Serve until a signal or :meth:`stop` ends it, then remove the temporary files."""
        level = _LOG.level
        try:
            super().run(sockets=[self._socket])
        finally:
            _LOG.setLevel(level)
            self._close()

    def stop(self) -> None:
        """Have :meth:`run` end soon; predictions under way end too."""
        self.visits.stop()
        _LOG.setLevel(logging.CRITICAL)  # pages that are open have a connection each, and uvicorn tells of every one
        self.should_exit = True

    def handle_exit(self, sig: int, frame: object) -> None:
        """As in uvicorn."""
        self.stop()
        super().handle_exit(sig, frame)

    def _close(self) -> None:
        self._socket.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.pop('GRADIO_TEMP_DIR', None)


def serve(server: DemoServer) -> None:
    """Run it in the main thread, as a command does: Ctrl-C and SIGTERM end it well."""

    def end(sig: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)  # uvicorn raises what ended it again, when it has ended
    try:
        server.run()
    except KeyboardInterrupt:
        print('stopped; nothing was kept')


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address for :class:`DemoServer`; port 0 for any that is free.

    Raises:
        ConfigError: the port is taken, or there is no such host.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f'--port must be from 0 to 65535, got {port}')
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f'cannot listen on host {host!r}: {error.strerror}') from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == 'posix':  # on Windows it would share the port with who has it
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f'cannot listen on {host} port {port}: {error.strerror}; choose another --port, or 0 for any that is free'
        ) from error
    return bound
