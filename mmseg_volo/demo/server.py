"""Serve the demo page from this machine alone: no request goes outside, and no file stays behind."""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read by Gradio, and by what it imports, on import.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import gradio as gr
from starlette.middleware import Middleware

from ..errors import ConfigError
from .guard import Guard
from .page import CSS, Page
from .shared_model import SharedModel
from .store import Store
from .uploads import Limits

_FONTS = ['system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'sans-serif']  # Gradio's own come from Google


def free_port(host: str, port: int) -> int:
    """Check that a server can listen on this address.

    Returns:
        The port; for port 0, one that is free.

    Raises:
        ConfigError: the port is taken, or there is no such host or port.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family) as server:
            return server.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = (getattr(error, 'strerror', None) or str(error)).partition(' (while')[0]
        raise ConfigError(
            f'cannot listen on {host} port {port}: {reason}; choose another --port (0 for any that is free) or --host'
        ) from error


@contextmanager
def serve(model: SharedModel, host: str, port: int, limits: Limits, **options) -> Iterator[Page]:
    """Serve the page. At the end, its predictions are stopped and its files deleted.

    Gradio finds its folder for files through the environment, so one process serves one page at a time.

    Args:
        model: makes the predictions.
        host, port: where to listen, checked by :func:`free_port`.
        limits: on uploads.
        options: title, about, queue and examples of :class:`Page`.
    """
    with tempfile.TemporaryDirectory(prefix='mmseg_volo_demo_', ignore_cleanup_errors=True) as folder:
        folder = Path(folder).resolve()
        # Before Gradio listens, it asks its own address whether it answers: not through a proxy.
        os.environ.update(GRADIO_TEMP_DIR=str(folder), no_proxy='*')
        page = Page(model, limits=limits, **options)
        guard = Middleware(Guard, page=page, store=Store(folder, limits.megabytes), megabytes=limits.megabytes)
        try:
            page.blocks.launch(
                server_name=f'[{host}]' if ':' in host else host,
                server_port=port,
                max_file_size=int(limits.megabytes * 2**20),
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inline=False,
                ssr_mode=False,
                pwa=False,
                show_error=False,  # what visitors may read comes as gr.Error
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                theme=gr.themes.Default(font=_FONTS, font_mono=['ui-monospace', 'monospace']),
                css=CSS,
                app_kwargs={'middleware': [guard]},
            )
            page.blocks.server.config.timeout_graceful_shutdown = 1  # seconds; each open page holds a connection
            yield page
        finally:
            log = logging.getLogger('uvicorn.error')
            log.disabled = True  # it reports each connection that is cut
            page.blocks.close(verbose=False)
            log.disabled = False
            page.stop()
            os.environ.pop('GRADIO_TEMP_DIR', None)
