"""Checkpoints are written in a thread during training, and resuming finds the newest complete one."""

import errno
import logging
import os
import shutil

import pytest
from small_runs import checkpoint

from mmseg_volo.checkpoints.writing import replace_text, save
from mmseg_volo.engine.resume import newest_checkpoint
from mmseg_volo.engine.saving import Writer
from mmseg_volo.errors import CheckpointError, SaveError

LOGGER = logging.getLogger('test_checkpoint_hook')


def test_writer_raises_its_error_once(tmp_path, monkeypatch):
    writer = Writer()
    settled = []
    writer.save(checkpoint(), tmp_path / 'a.pth', lambda: settled.append('a'))
    writer.wait()
    assert settled == ['a'] and not writer.failed
    monkeypatch.setattr(os, 'fsync', lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, 'gone')))
    writer.save(checkpoint(), tmp_path / 'b.pth', lambda: settled.append('b'))
    with pytest.raises(SaveError, match=r'b\.pth'):
        writer.wait()
    monkeypatch.undo()
    writer.wait()
    assert settled == ['a'] and os.listdir(tmp_path) == ['a.pth']


def test_an_error_after_the_save_is_a_save_error(tmp_path):
    """As when the disk is gone while last_checkpoint is written or older checkpoints are removed."""
    writer = Writer()
    writer.save(checkpoint(), tmp_path / 'a.pth', lambda: replace_text(tmp_path / 'gone/last_checkpoint', 'a'))
    with pytest.raises(SaveError, match=r'gone/.*last_checkpoint.*No such file'):
        writer.wait()


def test_newest_is_decided_by_the_content_of_the_files(tmp_path, caplog):
    work = tmp_path / 'work'
    work.mkdir()
    assert newest_checkpoint([work], LOGGER) is None
    for step in (2, 10, 4):
        save(checkpoint(step), work / f'iter_{step}.pth')
        os.utime(work / f'iter_{step}.pth', (0, 1000 - step))
    save(checkpoint(99), work / 'best_mIoU_iter_99.pth')
    (work / 'last_checkpoint').write_text('/nowhere/iter_4.pth')
    moved = tmp_path / 'moved'
    work.rename(moved)
    assert newest_checkpoint([moved], LOGGER)[0] == str(moved / 'iter_10.pth')

    (moved / 'iter_12.pth').write_bytes(b'')
    (moved / 'iter_11.pth').write_bytes((moved / 'iter_10.pth').read_bytes()[:-3000])
    shutil.copy(moved / 'iter_2.pth', moved / 'iter_500.pth')
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint([moved], LOGGER)[0] == str(moved / 'iter_10.pth')
    assert all(f'iter_{step}.pth' in caplog.text for step in (11, 12))
    for step in (10, 4, 2):
        (moved / f'iter_{step}.pth').unlink()
    with pytest.raises(CheckpointError, match=r'none of 3 .*iter_500.pth: was saved at iter 2, but its name says 500'):
        newest_checkpoint([moved], LOGGER)
