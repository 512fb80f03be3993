"""What a checkpoint must not be able to do."""

import os
import pickle
import random
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Evil:
    """Makes the folder ``trace`` when it is unpickled, as any code could be run."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class Canary:
    """Files, modules and a server whose code makes a folder ``trace`` in every way that a config text can name code.

    The folder ``place`` must be on ``sys.path``, and be the current folder for relative paths.
    """

    def __init__(self, place: Path):
        self.place, self.trace = place, place / 'code-ran'
        code = f'import os\nos.makedirs({str(self.trace)!r}, exist_ok=True)\ndef run(*args, **kwargs): pass\n'
        (place / 'evil_module.py').write_text(code)
        for package in ('evil_scope', 'EvilScope'):
            (place / package).mkdir()
            (place / package / '__init__.py').write_text(code)
            (place / package / 'registry.py').write_text(code)
        (place / 'memcached').mkdir()
        (place / 'memcached/mc.py').write_text(code)
        (place / 'evil.py').write_text(f'{code}model = dict()\n')
        for suffix in ('pkl', 'pickle', 'npy', 'PKL', 'txt'):
            (place / f'evil.{suffix}').write_bytes(pickle.dumps(Evil(self.trace)))
        for suffix in ('yaml', 'yml', 'YML'):
            (place / f'evil.{suffix}').write_text(f'!!python/object/apply:os.mkdir [{str(self.trace)!r}]\n')
        handler = partial(_Silent, directory=str(place))
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def strings(self) -> list[str]:
        """Values that lead to code, somewhere."""
        call = f'__import__("os").mkdir({str(self.trace)!r})'
        files = ['evil.pkl', 'evil.yaml', 'evil.yml', 'evil.pickle', 'evil.npy', './evil.PKL', 'evil.YML', 'evil.py']
        return [
            *(
                'evil_module',
                'evil_module.run',
                'evil_scope',
                'EvilScope',
                'evil_scope.registry',
                'os.mkdir',
                'memcached',
            ),
            *files,
            *(str(self.place / file) for file in files),
            *(f'{self.url}/{file}' for file in files),
            *(f'{self.url}/evil.txt?x=evil.pkl', f'file://{self.place}/evil.pkl', 'local-dir:.', 'hf-hub:evil/evil'),
            *(f'{{{{$NO_SUCH:{call}}}}}', '{{$HOME:x}}', '{{ fileDirname }}', '{{_base_.model}}', f"'{call}'", call),
            *(f'x{{{{$NO_SUCH:"+{call}+"}}}}', '{0.__class__}', "'+evil_module.run()+'", 'evil\nimport evil_module\n'),
        ]

    def statements(self) -> list[str]:
        """Lines of a config text that run code."""
        call = f'__import__("os").mkdir({str(self.trace)!r})'
        return [
            'import evil_module',
            'from evil_module import *',
            "custom_imports = dict(imports=['evil_module'], allow_failed_imports=False)",
            "custom_imports = dict(imports=['mmseg_volo', 'evil_module'])",
            "custom_imports = dict(imports='evil_module')",
            "custom_imports = ['evil_module']",
            "_base_ = './evil.py'",
            f"_base_ = ['{self.place}/evil.py']",
            "_base_ = '{{$NO_SUCH:./evil.py}}'",
            f'x = {call}',
            f'x = [{call} for _ in (1,)]',
            f'x = (lambda: {call})()',
            f'x = f"{{{call}}}"',
            f'x = {{**{call}}}',
            f'x: {call} = 1',
            f'x = dict({call})',
            f'x = dict(**{call})',
            f'x = {{{{$NO_SUCH:{call.replace(" ", "")}}}}}',
            f'x = {{{{"$NO_SUCH:{call}"}}}}',
            f'with read_base():\n    {call}',
            'from mmengine.config import read_base\nwith read_base():\n    from .evil import *',
            f'def f(a={call}):\n    pass',
            f'class A({call}):\n    pass',
            f'assert {call}',
            f'x = 1 if {call} else 2',
            f'(x := {call})',
            "default_scope = 'evil_scope'",
            "model = dict(type='evil_module')",
            "model = dict(type='evil_scope.Net')",
            "model = dict(type='EncoderDecoder', _scope_='evil_scope')",
            "model = dict(type='EncoderDecoder', backbone=dict(type='evil_module'))",
            "runner_type = 'evil_module'",
            "test_dataloader = dict(collate_fn='evil_module')",
            "custom_hooks = [dict(type='EMAHook', ema_type='evil_module')]",
            "visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='evil_module')])",
            "test_pipeline = [dict(type='LoadImageFromFile', backend_args=dict(backend='memcached', sys_path='.'))]",
            "test_pipeline = [dict(type='LoadBiomedicalImageFromFile', decode_backend='pickle')]",
            "test_pipeline = [dict(type='RandomResize', scale=(8, 8), resize_type='evil_module')]",
        ]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of all values in nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in places(one, (*path, key)))]


def planted(config: dict, canary: Canary, draw: random.Random) -> dict:
    """A copy of a plain config with one to three values that lead to code, at random places."""
    out = _lists(config)
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([path for path in places(out) if path])
        holder = out
        for key in path[:-1]:
            holder = holder[key]
        text = draw.choice(canary.strings())
        target = holder[path[-1]]
        if isinstance(target, dict) and draw.random() < 0.6:
            holder, path = target, (draw.choice(_KEYS),)
        forms = [text, text, text, [text], dict(type=text), dict(backend=text), {text: 1}, (text, 1)]
        holder[path[-1]] = draw.choice(forms)
    return out


_KEYS = (
    *(
        'type',
        '_scope_',
        'class_weight',
        'init_cfg',
        'pretrained',
        'checkpoint',
        'ann_file',
        'metainfo',
        'backend_args',
    ),
    *(
        'file_client_args',
        'collate_fn',
        'norm_layer',
        'ema_type',
        'resize_type',
        'padding_mode',
        'conv_type',
        'constructor',
    ),
    *(
        'custom_imports',
        '_base_',
        '_delete_',
        'data_root',
        'classes',
        'imports',
        'sys_path',
        'decode_backend',
        'loss_name',
    ),
    *(
        'norm_cfg',
        'act_cfg',
        'conv_cfg',
        'sampler',
        'rfstructure_file',
        'model_name',
        'checkpoint_path',
        'path',
        'scope',
    ),
)


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value
