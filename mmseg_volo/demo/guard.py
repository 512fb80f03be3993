"""ASGI middleware of the demo: what visitors may request, whose work they may touch, and how much they may send."""

import asyncio
import json
import re
import secrets
import time
from collections import Counter
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .page import Page
from .store import IDLE, Store

# What the page itself requests. Gradio's other routes would fetch addresses, or let programs call the model.
_ROUTES = re.compile(
    r'/|/(assets|static)/.+|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)'
    r'|/gradio_api/(file=(?!.*://).+|heartbeat/\w+|queue/(join|data)|run/predict|cancel|reset|startup-events)'
    r'|/gradio_api/upload(_progress)?'
)
_FILE = '/gradio_api/file='
_CALLS = ('/gradio_api/queue/join', '/gradio_api/run/predict', '/gradio_api/cancel')
_HEADERS = {
    # The browser, too, is told to contact no other machine.
    'content-security-policy': "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'; object-src 'none'",
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
}
_COOKIE = 'mmseg_volo_demo'
_ALIAS = '/visitors'  # what visitors see in place of the folder with their files
_TEXT = ('application/json', 'text/html')
_MOST_JSON = 2**16  # bytes of a request that is no upload
_FORM = 2**14  # bytes around the file in an upload
_UPLOADS = 16  # at the same time
_LONGEST = 600  # seconds of a request


class _Refused(Exception):
    """The response to a request that is not passed on."""

    def __init__(self, status: int, message: str):
        self.response = PlainTextResponse(message, status)


class Guard:
    """Pass on what the page itself sends, and nothing else.

    - Only the routes and events of the page are open. The event that ends a session is not: it comes from Gradio.
    - A session, the random name of an open tab, belongs to the browser that used it first, as told by a cookie.
    - The size, the duration and the number of uploads are limited.
    - The folder with visitors' files has another name in all that is sent.

    Args:
        app: the application behind.
        page: the page.
        store: the folder with visitors' files.
        megabytes: the largest upload, in units of 2**20 bytes.
    """

    def __init__(self, app: ASGIApp, page: Page, store: Store, megabytes: float):
        self._app, self._page, self._store = app, page, store
        self._most = int(megabytes * 2**20) + _FORM
        self._owners: dict[str, str] = {}  # session -> cookie of its browser
        self._tabs: Counter[str] = Counter()  # session -> open connections that end it
        self._uploads = 0
        folder = str(store.folder)
        self._names = [name.encode() for name in {folder: 0, quote(folder): 0, json.dumps(folder)[1:-1]: 0}]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see the class."""
        if scope['type'] == 'lifespan':
            return await self._app(scope, receive, send)
        if scope['type'] != 'http':
            return await send({'type': 'websocket.close'})
        browser, cookie = _browser(Headers(scope=scope)), None
        if not browser and scope['path'] in ('/', '/config'):
            cookie = f'{_COOKIE}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Strict'
        answer = _Answer(send, self._names, cookie)
        try:
            await self._handle(scope, receive, answer.send, browser)
        except ClientDisconnect:  # during an upload
            return
        except _Refused as refused:
            if not answer.started:
                await refused.response(scope, receive, answer.send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, browser: str | None) -> None:
        path = scope['path']
        if not _ROUTES.fullmatch(path):
            raise _Refused(404, 'The demo page has nothing here.')
        if path.startswith(_FILE):
            scope = dict(scope, path=_FILE + self._file(path.removeprefix(_FILE)))
        elif path == '/gradio_api/upload':
            return await self._upload(scope, receive, send)
        elif path.startswith('/gradio_api/heartbeat/'):
            return await self._heartbeat(scope, receive, send, browser)
        elif path == '/gradio_api/queue/data':
            self._admit(parse_qs(scope['query_string'].decode('latin-1')).get('session_hash', [None])[0], browser)
        elif scope['method'] == 'POST':
            body = await _read(receive, _MOST_JSON)
            if path in _CALLS:
                answer = self._call(path, body, browser)
                if answer:
                    return await answer(scope, receive, send)
                await run_in_threadpool(self._store.make_room)
            body = body.replace(_ALIAS.encode() + b'/', self._names[-1] + b'/')
            headers = MutableHeaders(raw=list(scope['headers']))
            headers['content-length'] = str(len(body))
            scope, receive = dict(scope, headers=headers.raw), _once(body, receive)
        await self._app(scope, receive, send)

    def _file(self, target: str) -> str:
        """The path of a visitor's file from the one in an address."""
        folder = str(self._store.folder)
        if target.startswith(f'{_ALIAS}/'):
            target = folder + target.removeprefix(_ALIAS)
        if not target.startswith(f'{folder}/') or '..' in Path(target).parts:
            raise _Refused(404, 'There is no such file.')
        return target

    def _call(self, path: str, body: bytes, browser: str | None) -> Response | None:
        """Check the call of an event. Return the response, if the call need not be passed on."""
        try:
            call = json.loads(body)
            number, session = call['fn_index'], call['session_hash']
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Refused(400, 'This is no request of the page.') from error
        event = self._page.blocks.fns.get(number) if type(number) is int else None
        # Events without a component are those of Gradio's own, such as the end of a session.
        if event is None or any(component is None for component, _ in event.targets) or call.get('batched'):
            raise _Refused(404, 'The demo page has nothing here.')
        self._admit(session, browser)
        if path.endswith('cancel') and call.get('event_id') not in self._pending(session):
            return JSONResponse({'success': True})  # it has ended already, or is not of this session
        if path.endswith('predict') and (event.queue or event.fn is None):
            raise _Refused(404, 'The demo page has nothing here.')
        if path.endswith('join') and not event.queue:
            raise _Refused(404, 'The demo page has nothing here.')
        return None

    def _admit(self, session: str | None, browser: str | None) -> None:
        """Refuse a request about a session that belongs to another browser."""
        if not isinstance(session, str) or not re.fullmatch(r'\w{1,64}', session):
            raise _Refused(400, 'This is no request of the page.')
        if browser is None:
            raise _Refused(403, 'The page needs cookies. Please allow them for this site, and reload the page.')
        if self._owners.get(session, browser) != browser and self._in_use(session):
            raise _Refused(403, 'This session belongs to another browser.')
        self._owners.pop(session, None)
        self._owners[session] = browser
        if len(self._owners) > 10_000:
            for old in list(self._owners)[:1000]:
                if not self._in_use(old):
                    del self._owners[old]

    def _in_use(self, session: str) -> bool:
        return bool(self._tabs[session] or self._pending(session) or session in self._page.sessions())

    def _pending(self, session: str) -> set[str]:
        """Events of a session that wait or run."""
        return self._page.blocks._queue.pending_event_ids_session.get(session, set())

    async def _heartbeat(self, scope: Scope, receive: Receive, send: Send, browser: str | None) -> None:
        session = scope['path'].rpartition('/')[2]
        self._admit(session, browser)
        self._tabs[session] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._tabs[session] -= 1
            self._tabs += Counter()  # drops what is 0

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get('content-length', '0')
        if length.isdigit() and int(length) > self._most:
            raise _Refused(413, 'The file exceeds the maximum allowed size.')
        if self._uploads >= _UPLOADS:
            raise _Refused(503, 'Too many uploads at this moment. Please try again.')
        self._uploads += 1
        try:
            await run_in_threadpool(self._store.make_room)
            await self._app(scope, _limited(receive, self._most), send)
        finally:
            self._uploads -= 1
            if not self._uploads:
                await run_in_threadpool(self._store.make_room, time.time())


class _Answer:
    """Sends a response with the security headers and the cookie, and without the name of a folder of the server."""

    def __init__(self, send: Send, names: list[bytes], cookie: str | None):
        self._send, self._names, self._cookie = send, names, cookie
        self._start: Message | None = None
        self._held: list[bytes] | None = None
        self._stream = self.started = False

    async def send(self, message: Message) -> None:
        """Send a part of the response. Text is held back until it is complete, because its length changes."""
        if message['type'] == 'http.response.start':
            headers = MutableHeaders(raw=list(message['headers']))
            headers.update(_HEADERS)
            if self._cookie:
                headers.append('set-cookie', self._cookie)
            kind = headers.get('content-type', '')
            self._stream, self.started = kind.startswith('text/event-stream'), True
            self._start = dict(message, headers=headers.raw)
            if kind.startswith(_TEXT):
                self._held = []
                return
            await self._send(self._start)
        elif message['type'] != 'http.response.body' or (self._held is None and not self._stream):
            await self._send(message)
        elif self._held is None:
            await self._send(dict(message, body=self._hide(message.get('body', b''))))
        else:
            self._held.append(message.get('body', b''))
            if not message.get('more_body'):
                body = self._hide(b''.join(self._held))
                headers = MutableHeaders(raw=self._start['headers'])
                if body:  # a response to HEAD has the length of the body that it does not have
                    headers['content-length'] = str(len(body))
                await self._send(dict(self._start, headers=headers.raw))
                await self._send({'type': 'http.response.body', 'body': body})

    def _hide(self, body: bytes) -> bytes:
        for name in self._names:
            body = body.replace(name, _ALIAS.encode())
        return body


def _browser(headers: Headers) -> str | None:
    """The cookie that tells browsers apart, if the request has it."""
    try:
        cookie = SimpleCookie(headers.get('cookie', '')).get(_COOKIE)
    except CookieError:
        return None
    return cookie.value if cookie and re.fullmatch(r'[\w-]{16,64}', cookie.value) else None


def _limited(receive: Receive, most: int) -> Receive:
    """Receive a request that has no more bytes than ``most``, pauses that are short, and an end."""
    size, end = 0, time.monotonic() + _LONGEST

    async def limited() -> Message:
        nonlocal size
        try:
            message = await asyncio.wait_for(receive(), min(IDLE, max(0, end - time.monotonic())))
        except asyncio.TimeoutError as error:
            raise _Refused(408, 'The request took too long. Please try again.') from error
        size += len(message.get('body', b''))
        if size > most:
            raise _Refused(413, 'The request exceeds the maximum allowed size.')
        return message

    return limited


async def _read(receive: Receive, most: int) -> bytes:
    limited, body, more = _limited(receive, most), b'', True
    while more:
        message = await limited()
        if message['type'] == 'http.disconnect':
            raise _Refused(400, 'The request was cut off.')
        body, more = body + message.get('body', b''), message.get('more_body', False)
    return body


def _once(body: bytes, receive: Receive) -> Receive:
    """Receive a body that was read already, and then what follows, such as the end of the connection."""
    messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def once() -> Message:
        return messages.pop() if messages else await receive()

    return once
