"""Checkpoint files are complete or absent, and rejected after any change to their bytes."""

import errno
import io
import logging
import os
import pickle
import random
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evil import Evil
from small_runs import checkpoint

from mmseg_volo.checkpoints import writing
from mmseg_volo.checkpoints.reading import CheckpointError, load_from_local, read_meta
from mmseg_volo.checkpoints.writing import seal_holds
from mmseg_volo.engine.resume import newest_checkpoint
from mmseg_volo.errors import SaveError

LOGGER = logging.getLogger('test_writing')


def test_a_sealed_file_is_an_ordinary_checkpoint(tmp_path):
    content, path = checkpoint(), tmp_path / 'iter_10.pth'
    writing.save(content, path)
    assert os.listdir(tmp_path) == ['iter_10.pth']
    for kwargs in (dict(), dict(mmap=True)):
        plain = torch.load(path, weights_only=True, **kwargs)
        assert all(torch.equal(plain['state_dict'][name], value) for name, value in content['state_dict'].items())
    assert zipfile.ZipFile(path).testzip() is None
    moved = shutil.copy(path, tmp_path / 'other.pth')
    assert seal_holds(Path(moved)) is True
    assert load_from_local(moved)['optimizer']['state'].keys() == content['optimizer']['state'].keys()
    assert read_meta(path)['iter'] == 10


def test_tensors_are_written_for_the_cpu():
    """A tensor on a GPU is marked as a CPU tensor, so torch.save copies it only while it writes it."""
    saved = []

    class Recorder(writing._Pickler):
        def save(self, obj, save_persistent_id=True):
            saved.append(obj)

    Recorder(io.BytesIO()).save_pers(('storage', torch.FloatStorage, '0', 'cuda:3', 12))
    assert saved == [('storage', torch.FloatStorage, '0', 'cpu', 12)]


def test_saving_needs_memory_for_one_tensor_at_a_time(tmp_path):
    """Saving 400 MB in tensors of 4 MB must not need another 400 MB."""
    content = dict(state_dict={str(i): torch.ones(1_000_000) for i in range(100)})
    writing.save(dict(state_dict={'0': torch.ones(1_000_000)}), tmp_path / 'warm_up.pth')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    writing.save(content, tmp_path / 'large.pth')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


@pytest.mark.parametrize('reason', [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, reason):
    path = tmp_path / 'iter_10.pth'
    writing.save(checkpoint(), path)
    old = path.read_bytes()
    room = [4000]

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(reason, os.strerror(reason))
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

    opened = Path.open
    monkeypatch.setattr(
        Path, 'open', lambda self, mode='r': Full(opened(self, mode)) if mode == 'wb' else opened(self, mode)
    )
    with pytest.raises(SaveError, match=rf'iter_10.pth.*{os.strerror(reason)}.*intact'):
        writing.save(checkpoint(11), path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ['iter_10.pth'] and path.read_bytes() == old


def test_a_disk_that_returns_other_bytes(tmp_path):
    path = tmp_path / 'iter_10.pth'
    part = writing.write(checkpoint(), path)
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    part.write_bytes(damaged)
    with pytest.raises(SaveError, match='read back'):
        writing.finish(part, path)
    assert os.listdir(tmp_path) == []


def mutations(good: bytes, count: int, ran: Path):
    """Yield (kind, file name, bytes) of files that must all be rejected."""
    draw = random.Random(1)
    for i in range(count):
        kind = ('truncated', 'flipped', 'flipped', 'foreign', 'malicious')[i % 5]
        name = 'iter_10.pth'
        if kind == 'truncated':
            data = good[: draw.choice([draw.randrange(len(good)), len(good) - 1 - i, i])]
        elif kind == 'flipped':
            data = bytearray(good)
            # Half of them in the last bytes, which hold the ZIP directory and the seal.
            position = draw.randrange(len(good)) if i % 2 else len(good) - 1 - draw.randrange(3000)
            data[position] ^= 1 << draw.randrange(8)
            data = bytes(data)
        elif kind == 'foreign':
            data = (
                draw.randbytes(5000),
                b'PK\x03\x04' + draw.randbytes(3000),
                b'\x89PNG\r\n\x1a\n' + draw.randbytes(500),
                b'<html><body>404 Not Found</body></html>',
                pickle.dumps([1, 2, i]),
                pickle.dumps(np.arange(i + 1)),
                b'\0' * (i + 1),
                b'version https://git-lfs.github.com/spec/v1\n',
            )[i // 5 % 8]
        else:
            place = i // 5 % 5
            evil = dict(state_dict=dict(w=torch.zeros(1)), meta=dict(iter=10, x=Evil(ran)))
            file = ran.with_name('evil')
            if place < 3:
                torch.save(evil, file, _use_new_zipfile_serialization=place > 0)
                if place == 2:
                    from mmseg_volo.checkpoints.writing import seal

                    seal(file)  # a valid seal does not make a file safe
                data = file.read_bytes()
                file.unlink()
            else:
                data = pickle.dumps(evil if place == 3 else Evil(ran))
            name = 'iter_10.safetensors' if place == 4 else name
        yield kind, name, data


def refuse_all(tmp_path: Path, count: int) -> dict[str, int]:
    path = tmp_path / 'iter_10.pth'
    writing.save(checkpoint(), path)
    good, ran, tried = path.read_bytes(), tmp_path / 'ran', {}
    for kind, name, data in mutations(good, count, ran):
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            load_from_local(str(file))
        if name.endswith('.pth'):
            with pytest.raises(CheckpointError, match=name):
                newest_checkpoint([tmp_path], LOGGER)
        file.unlink()
        assert not ran.exists()
        tried[kind] = tried.get(kind, 0) + 1
    for step in range(max(1, count // 10)):
        renamed = tmp_path / f'iter_{step + 11}.pth'
        renamed.write_bytes(good)
        with pytest.raises(CheckpointError, match=f'was saved at iter 10, but its name says {step + 11}'):
            newest_checkpoint([tmp_path], LOGGER)
        renamed.unlink()
        tried['renamed'] = tried.get('renamed', 0) + 1
    return tried


def test_mutated_checkpoints_are_refused(tmp_path):
    refuse_all(tmp_path, 40)


@pytest.mark.slow
def test_hundreds_of_mutated_checkpoints_are_refused(tmp_path):
    tried = refuse_all(tmp_path, 400)
    print(tried)
    assert sum(tried.values()) == 440
