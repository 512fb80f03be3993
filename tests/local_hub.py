"""A stand-in of the Hugging Face hub: the part of its HTTP interface that ``huggingface_hub`` uses here.

Repositories with commits, branches and pull requests; uploads in a commit or through Git LFS; downloads, where large
files come from another host, as from the hub's; private and gated repositories; tokens. Xet is not offered.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {'hf_writes': 'write', 'hf_reads': 'read'}  # both of the user "user"
LICENSES = ('apache-2.0', 'cc-by-nc-4.0', 'other')
_LFS = ('.pth', '.safetensors')  # what the hub's .gitattributes lists
_ROUTES = [
    ('POST', r'/api/repos/create', 'create'),
    ('POST', r'/api/validate-yaml', 'validate'),
    ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?', 'info'),
    ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)', 'tree'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)', 'preupload'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)', 'commit'),
    ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/discussions', 'open'),
    ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<number>\d+)', 'discussion'),
    ('POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'batch'),
    ('PUT', r'/storage/(?P<oid>[0-9a-f]{64})', 'store'),
    ('POST', r'/storage/(?P<oid>[0-9a-f]{64})', 'verify'),
    ('GET', r'/storage/(?P<oid>[0-9a-f]{64})', 'fetch'),
    ('GET', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
]


@dataclass
class Repository:
    """Commits by id, each with its files; branches and pull requests are names of commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = 'main', message: str = 'initial commit') -> str:
        """Make these the files of a branch; returns the commit."""
        content = sorted((path, _git_oid(data)) for path, data in files.items())
        oid = hashlib.sha1(repr((len(self.commits), message, content)).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.messages.append(message)
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the main branch."""
        return self.commits[self.refs['main']]


class LocalHub:
    """The server; ``url`` is what ``HF_ENDPOINT`` must be.

    Args:
        lfs: whether large files are uploaded through Git LFS; otherwise inside the commit, as small ones.

    Attributes:
        repositories: by ``user/name``.
        requests: method and path of all requests so far.
        down: answer every request with status 503.
    """

    def __init__(self, lfs: bool = True):
        self.lfs, self.down = lfs, False
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.storage: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.other_host = f'http://localhost:{self.server.server_port}'

    def __enter__(self) -> 'LocalHub':
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process whose client uses this hub, with its cache in ``home`` and a token that may write."""
        return dict(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_TOKEN='hf_writes', HF_HUB_DISABLE_XET='1')

    def add(self, name: str, files: dict[str, bytes], **about: bool) -> Repository:
        """Add a repository with these files."""
        repository = self.repositories[name] = Repository(**about)
        repository.commit({'.gitattributes': b'', **files})
        return repository

    def asked(self, method: str, part: str) -> int:
        """How many requests had this method and this text in their path."""
        return sum(one == method and part in path for one, path in self.requests)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: str):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.hub.requests.append((self.command, parts.path))
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        method = 'GET' if self.command == 'HEAD' else self.command
        try:
            if self.hub.down:
                raise _Refused(503, 'Service Unavailable')
            for verb, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if found and verb == method:
                    getattr(self, f'_{name}')(**{k: v and unquote(v) for k, v in found.groupdict().items()})
                    return
            raise _Refused(404, f'no such route: {self.command} {parts.path}')
        except _Refused as refused:
            headers = {'X-Error-Message': str(refused), **({'X-Error-Code': refused.code} if refused.code else {})}
            self._answer(dict(error=str(refused), **refused.body), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, body: dict | list | bytes, status: int = 200, headers: dict | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {'Content-Length': len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _role(self) -> str | None:
        given = self.headers.get('Authorization')
        if given is None:
            return None
        role = TOKENS.get(given.removeprefix('Bearer '))
        if role is None:
            raise _Refused(401, 'Invalid credentials in Authorization header')
        return role

    def _check_writes(self, namespace: str) -> None:
        role = self._role()
        if role is None:
            raise _Refused(401, 'Invalid username or password.')
        if role != 'write' or namespace != 'user':
            raise _Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _repository(self, name: str) -> Repository:
        role, found = self._role(), self.hub.repositories.get(name)
        if found is None or (found.private and role is None):
            status = 401 if role is None else 404
            raise _Refused(status, 'Repository not found' if role else 'Invalid username or password.', 'RepoNotFound')
        return found

    def _commit_of(self, repository: Repository, revision: str | None) -> str:
        found = repository.refs.get(revision or 'main', revision)
        if found not in repository.commits:
            raise _Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return found

    def _create(self) -> None:
        given = json.loads(self.body)
        name = f'{given.get("organization") or "user"}/{given["name"]}'
        self._check_writes(name.split('/')[0])
        if name in self.hub.repositories:
            raise _Refused(409, 'You already created this model repo', url=f'{self.hub.url}/{name}')
        # The keys of older clients and of newer ones.
        self.hub.add(name, {}, private=bool(given.get('private')) or given.get('visibility') == 'private')
        self._answer(dict(url=f'{self.hub.url}/{name}', name=name))

    def _validate(self) -> None:
        data = yaml.safe_load(json.loads(self.body)['content'].split('---')[1])
        if data.get('license', 'other') not in LICENSES:
            errors = [dict(message=f'"license" must be one of [{", ".join(LICENSES)}]')]
            self._answer(dict(errors=errors, warnings=[]), 400)
        else:
            self._answer(dict(errors=[], warnings=[]))

    def _info(self, repo: str, revision: str | None) -> None:
        repository = self._repository(repo)
        sha = self._commit_of(repository, revision)
        files = [dict(rfilename=path) for path in repository.commits[sha]]
        about = dict(private=repository.private, gated='manual' if repository.gated else False, tags=[], downloads=0)
        self._answer(dict(about, id=repo, modelId=repo, sha=sha, siblings=files, likes=0, disabled=False))

    def _tree(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        self._answer([self._entry(path, data) for path, data in files.items()])

    def _entry(self, path: str, data: bytes) -> dict:
        entry = dict(type='file', path=path, size=len(data), oid=_git_oid(data))
        if path.endswith(_LFS):
            entry['lfs'] = dict(oid=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=134)
        return entry

    def _preupload(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        self._check_writes(repo.split('/')[0])
        there = repository.commits[self._commit_of(repository, revision)]

        def mode(path: str) -> str:
            return 'lfs' if self.hub.lfs and path.endswith(_LFS) else 'regular'

        def oid(path: str) -> str | None:
            data = there.get(path)
            if data is None:
                return None
            return hashlib.sha256(data).hexdigest() if mode(path) == 'lfs' else _git_oid(data)

        paths = [one['path'] for one in json.loads(self.body)['files']]
        self._answer(
            dict(files=[dict(path=p, uploadMode=mode(p), shouldIgnore=False, oid=oid(p)) for p in paths]),
        )

    def _batch(self, repo: str) -> None:
        self._check_writes(repo.split('/')[0])
        objects = json.loads(self.body)['objects']
        for one in objects:
            if one['oid'] not in self.hub.storage:
                place = dict(href=f'{self.hub.other_host}/storage/{one["oid"]}')
                verify = dict(href=f'{self.hub.url}/storage/{one["oid"]}')
                one['actions'] = dict(upload=place, verify=verify)
        self._answer(dict(transfer='basic', objects=objects))

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, 'The SHA-256 is another')
        self.hub.storage[oid] = self.body
        self._answer({})

    def _verify(self, oid: str) -> None:
        if len(self.hub.storage.get(oid, b'')) != json.loads(self.body)['size']:
            raise _Refused(422, 'The size is another')
        self._answer({})

    def _commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        self._check_writes(repo.split('/')[0])
        files = dict(repository.commits[self._commit_of(repository, revision)])
        message = ''
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry['key'], entry['value']
            if key == 'header':
                message = value['summary']
            elif key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.storage:
                    raise _Refused(400, f'{value["path"]}: its content was not uploaded')
                files[value['path']] = self.hub.storage[value['oid']]
            elif key == 'deletedFile':
                del files[value['path']]
        opens = '1' in self.query.get('create_pr', [])
        number = len(repository.refs)
        oid = repository.commit(files, f'refs/pr/{number}' if opens else revision, message)
        answer = dict(success=True, commitOid=oid, commitUrl=f'{self.hub.url}/{repo}/commit/{oid}')
        if opens:
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo}/discussions/{number}'
        self._answer(answer)

    def _open(self, repo: str) -> None:
        repository = self._repository(repo)
        self._check_writes(repo.split('/')[0])
        number = len(repository.refs)
        repository.refs[f'refs/pr/{number}'] = repository.refs['main']
        self._answer(dict(num=number))

    def _discussion(self, repo: str, number: str) -> None:
        title = dict(title='Upload', createdAt='2026-01-01T00:00:00.000Z', status='draft')
        place = dict(repo=dict(name=repo, type='model'), events=[], changes=dict(base='refs/heads/main'))
        self._answer(dict(title, num=int(number), isPullRequest=True, filesWithConflicts=[], **place))

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        if repository.gated:
            raise _Refused(403, f'Access to model {repo} is restricted', 'GatedRepo')
        commit = self._commit_of(repository, revision)
        data = repository.commits[commit].get(path)
        headers = {'X-Repo-Commit': commit}
        if data is None:
            raise _Refused(404, 'Entry not found', 'EntryNotFound')
        if not path.endswith(_LFS):
            self._answer(data, headers={**headers, 'ETag': f'"{_git_oid(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.storage[oid] = data
        linked = {'X-Linked-ETag': f'"{oid}"', 'X-Linked-Size': len(data)}
        place = {'Location': f'{self.hub.other_host}/storage/{oid}'}
        self._answer(b'', 302, {**headers, **linked, **place})

    def _fetch(self, oid: str) -> None:
        if self.headers.get('Authorization'):
            raise _Refused(400, 'a token was sent to another host')
        self._answer(self.hub.storage[oid], headers={'ETag': f'"{oid}"'})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
