"""Files with an odd inner structure end in one CheckpointError, quickly, at every entry of this package."""

import json
import random
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from safetensors.torch import save_file
from small_models import segmentor_config
from small_runs import checkpoint

from mmseg_volo import init_model
from mmseg_volo.checkpoints.content import as_checkpoint
from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.checkpoints.writing import save, seal
from mmseg_volo.engine.resume import check_resumable
from mmseg_volo.errors import CheckpointError

SECONDS = 10  # of one core, for one file


def nested(levels: int, kind: type = list) -> object:
    value = 1
    for _ in range(levels):
        value = {'a': value} if kind is dict else kind([value])
    return value


def laughs(levels: int = 40) -> list:
    value = ['ha']
    for _ in range(levels):
        value = [value, value]
    return value


def itself() -> list:
    value = [1]
    value.append(value)
    return value


def itself_as_dict() -> dict:
    value = OrderedDict()
    value['meta'] = dict(value=value)
    return value


def unbacked(*shape: int) -> torch.Tensor:
    return torch.ones(1).expand(*shape)


def write_pickle(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the ZIP file of :func:`torch.save` around pickled bytes."""
    with zipfile.ZipFile(path, 'w', compression) as file:
        file.writestr('archive/data.pkl', data)
        file.writestr('archive/byteorder', 'little')
        file.writestr('archive/version', '3\n')


def odd_values() -> dict[str, object]:
    return {
        'deep list': nested(300),
        'deep tuple': nested(300, tuple),
        'deep dict': nested(150, dict),
        'itself': itself(),
        'itself as dict': itself_as_dict(),
        'laughs': laughs(),
        'unbacked': unbacked(10**6, 10**6),
        'objects': np.array([[1], [2, 3]], dtype=object),
        'meta tensor': torch.ones(3, device='meta'),
        'sparse': torch.ones(3, 3).to_sparse(),
        'number': 3,
        'text': 'abc',
        'list': [1, 'a', None],
        'none': None,
        'set': {1, 2},
        'numbers as keys': {1: 2, (1, 2): [3]},
        'huge number': 2**900,
        'nan': float('nan'),
        'slice': slice([1], {}, ()),
        'size': torch.Size([3]),
        'empty history': HistoryBuffer(),
        'long text': 'a' * 10**6,
        'bytearray': bytearray(3),
    }


# Where a value is put; None is the whole file.
PLACES = (
    *(
        None,
        ('meta',),
        ('meta', 'dataset_meta'),
        ('meta', 'dataset_meta', 'classes'),
        ('meta', 'dataset_meta', 'palette'),
    ),
    *(
        ('meta', 'CLASSES'),
        ('meta', 'PALETTE'),
        ('meta', 'cfg'),
        ('meta', 'config'),
        ('meta', 'iter'),
        ('meta', 'epoch'),
    ),
    *(
        ('meta', 'seed'),
        ('meta', 'saved_at'),
        ('meta', 'world_size'),
        ('meta', 'sealed_by'),
        ('meta', 'experiment_name'),
    ),
    *(('state_dict',), ('state_dict', 'backbone.pos_embed'), ('state_dict', 'decode_head.conv_seg.bias')),
    *(
        ('state_dict', 'x'),
        ('optimizer',),
        ('optimizer', 'state'),
        ('optimizer', 'param_groups'),
        ('param_schedulers',),
    ),
    *(('message_hub',), ('message_hub', 'runtime_info'), ('message_hub', 'runtime_info', 'cfg'), ('x',)),
    *(('message_hub', 'log_scalars'), ('message_hub', 'resumed_keys'), ('model',), ('ema_state_dict',)),
)


@pytest.fixture(scope='module')
def segmentor() -> dict:
    """A config and a checkpoint of a training run that fits it."""
    init_default_scope('mmseg')
    config = Config(dict(default_scope='mmseg', model=segmentor_config().to_dict()))
    content = checkpoint()
    content['state_dict'] = MODELS.build(config.model).state_dict()
    content['param_schedulers'] = [dict(last_step=3)]
    content['meta']['dataset_meta'] = dict(classes=[str(i) for i in range(7)], palette=[[i, i, i] for i in range(7)])
    del content['meta']['sealed_by']
    return dict(config=config, content=content)


def with_value(content: dict, place: tuple | None, value: object) -> object:
    if place is None:
        return value
    out = dict(content)
    inner = out
    for key in place[:-1]:
        inner[key] = dict(inner[key]) if isinstance(inner.get(key), dict) else {}
        inner = inner[key]
    inner[place[-1]] = value
    return out


def try_entries(config: Config, path: Path) -> list[str]:
    """Read a file at each entry; returns how each ended: 'loaded' or the error's text."""
    start, ended = time.process_time(), []
    for entry in (
        lambda: init_model(config, path, 'cpu'),
        lambda: check_resumable(as_checkpoint(load_from_local(str(path)), str(path)), path),
        lambda: MODELS.build(
            dict(config.model.backbone, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
        ).init_weights(),
    ):
        try:
            entry()
            ended.append('loaded')
        except CheckpointError as error:
            assert str(path) in str(error), error
            assert len(str(error)) < 3000
            ended.append(str(error))
    assert time.process_time() - start < SECONDS, ended
    return ended


def fuzz(segmentor: dict, folder: Path, count: int) -> int:
    draw, refused = random.Random(0), 0
    cases = [[(place, name)] for place in PLACES for name in odd_values()]
    draw.shuffle(cases)
    cases += [[draw.choice(one) for one in draw.sample(cases, draw.randint(2, 4))] for _ in range(count)]
    for i, odd in enumerate(cases[:count]):
        content = segmentor['content']
        for place, name in odd:
            content = with_value(content, place, odd_values()[name]) if isinstance(content, dict) else content
        path = folder / f'odd{i}.pth'
        try:
            torch.save(content, path, _use_new_zipfile_serialization=i % 4 > 0)
        except (RecursionError, RuntimeError):  # torch cannot write it
            continue
        ended = try_entries(segmentor['config'], path)
        refused += any(end != 'loaded' for end in ended)
        path.unlink()
    return refused


def test_odd_values_at_odd_places(segmentor, tmp_path):
    assert fuzz(segmentor, tmp_path, 8) > 2


@pytest.mark.slow
def test_every_odd_value_at_every_place_and_several_at_once(segmentor, tmp_path):
    assert fuzz(segmentor, tmp_path, 2000) > 500


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.', 'nested more than 100 levels'),
        (b'\x80\x02' + b')' + b'\x85' * 50_000 + b'.', 'nested more than 100 levels'),
        (b'\x80\x02' + b'}' * 1 + b'X\x01\x00\x00\x00a' + b'h\x00' + b's.', 'cut off or is no checkpoint'),
        (b'\x80\x02' + b'X\xff\xff\xff\x7fabc.', 'cut off or is no checkpoint|expected a dict'),
        (b'\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.', 'more than the file|cut off'),
        (b'\x80\x02cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x02\x85\x85R.', 'more than the file|cut off'),
        (b'\x80\x02cbuiltins\nbytes\n\x8a\x05\x00\x00\x00\x00\x10\x85R.', 'cut off'),
        (b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81.', 'without its values'),
        (b'\x80\x02cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81}b.', 'cut off'),
        (b'.', 'cut off or is no checkpoint'),
        (b'', 'cut off or is no checkpoint'),
    ],
    ids=range(11),
)
def test_pickles_written_by_hand(data, message, tmp_path):
    write_pickle(tmp_path / 'x.pth', data)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        load_from_local(str(tmp_path / 'x.pth'))
    assert time.process_time() - start < SECONDS


def test_a_compressed_file_that_unpacks_to_gigabytes(tmp_path):
    write_pickle(tmp_path / 'x.pth', b'\x80\x02' + b'N' * (2**26 + 2**22), zipfile.ZIP_DEFLATED)
    assert (tmp_path / 'x.pth').stat().st_size < 2**20
    seal(tmp_path / 'x.pth')  # anybody can do that
    with pytest.raises(CheckpointError, match=r'x\.pth: refused, because it unpacks to 0\.1 GiB'):
        load_from_local(str(tmp_path / 'x.pth'))


def test_a_compressed_checkpoint_is_read(tmp_path):
    torch.save(dict(w=torch.arange(1000.0)), tmp_path / 'a.pth')
    with (
        zipfile.ZipFile(tmp_path / 'a.pth') as old,
        zipfile.ZipFile(tmp_path / 'b.pth', 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert torch.equal(load_from_local(str(tmp_path / 'b.pth'))['w'], torch.arange(1000.0))


def test_safetensors_with_odd_headers(tmp_path):
    path = tmp_path / 'x.safetensors'
    start = time.process_time()
    for classes in ('[' * 50_000 + ']' * 50_000, '[' * 900 + ']' * 900, '3', '"abc"', '{"a": 1}', '[[1], 2]', '[null]'):
        for palette in ('[' * 5000, '[1, 2]', '["a"]', '[[1, 2, "3"]]', 'null'):
            save_file({'w': torch.ones(1)}, path, dict(classes=classes, palette=palette, config='x' * 10))
            try:
                as_checkpoint(load_from_local(str(path)))
            except CheckpointError as error:
                assert str(path) in str(error)
    assert time.process_time() - start < 3 * SECONDS
    header = b'{"__metadata__": {"a": "' + b'x' * 2**25 + b'"}}'
    path.write_bytes(len(header).to_bytes(8, 'little') + header)
    path.write_bytes(path.read_bytes() + b'\0')
    with pytest.raises(CheckpointError, match=r'refused, because its header has 32 MiB'):
        load_from_local(str(path))
    for size in (0, 7, 2**62, 2**64 - 1):
        path.write_bytes(size.to_bytes(8, 'little') + b'{}')
        with pytest.raises(CheckpointError, match='cut off or is no checkpoint'):
            load_from_local(str(path))
    shape = json.dumps({'w': dict(dtype='F32', shape=[2**40, 2**40], data_offsets=[0, 4])}).encode()
    path.write_bytes(len(shape).to_bytes(8, 'little') + shape + b'abcd')
    with pytest.raises(CheckpointError, match='cut off or is no checkpoint'):
        load_from_local(str(path))


def a_statistic(buffer: HistoryBuffer) -> float:
    """A method as users register them."""
    return buffer.data[0].sum()


def test_log_histories(tmp_path, monkeypatch):
    """Those of mmengine are read, and change no other buffer: mmengine would take their functions for all of them."""
    monkeypatch.setitem(HistoryBuffer._statistics_methods, 'a_statistic', a_statistic)
    buffers = dict(floats=HistoryBuffer([1.0, 3.0], [1, 1]), empty=HistoryBuffer(), numbers=HistoryBuffer([1], [2]))
    hub = MessageHub.get_instance(str(tmp_path))
    for value in (1, 2.5, torch.tensor(3), np.float32(4), np.array([5])):
        hub.update_scalar('loss', value)
    hub.update_info('numbers', np.arange(3))
    hub.update_info('names', np.array(['a', 'bc']))
    torch.save(dict(buffers=buffers, hub=hub.state_dict()), tmp_path / 'mmengine.pth')
    save(dict(buffers=buffers, hub=hub.state_dict()), tmp_path / 'ours.pth')
    monkeypatch.setitem(HistoryBuffer._statistics_methods, 'mean', HistoryBuffer.max)
    torch.save(dict(buffers=buffers, hub=hub.state_dict()), tmp_path / 'swapped.pth')
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match='a_statistic'):  # a function that this process does not know
        load_from_local(str(tmp_path / 'mmengine.pth'))
    load_from_local(str(tmp_path / 'ours.pth'))
    monkeypatch.setitem(HistoryBuffer._statistics_methods, 'a_statistic', a_statistic)
    for name in ('mmengine', 'ours', 'swapped'):
        read = load_from_local(str(tmp_path / f'{name}.pth'))
        assert type(read['buffers']['floats']) is HistoryBuffer
        assert read['buffers']['floats'].statistics('mean') == 2.0
        assert read['buffers']['floats'].statistics('a_statistic') == 4.0
        read['buffers']['empty'].update(1.0)
        fresh = MessageHub.get_instance(f'{tmp_path}{name}')
        fresh.load_state_dict(read['hub'])
        assert fresh.get_scalar('loss').data[0].tolist() == [1, 2.5, 3, 4, 5]
        torch.save(read, tmp_path / 'again.pth')
        assert load_from_local(str(tmp_path / 'again.pth'))['buffers']['numbers'].current() == 1


def numpy_dtype(name: str, *state: object) -> object:
    """Pickled as the data type ``name`` of NumPy with any state."""
    return Pickled(np.dtype, (name, False, True), state)


class Pickled:
    """Is pickled as a call and a state."""

    def __init__(self, *how: object):
        self.how = how

    def __reduce__(self) -> tuple:
        return self.how


def crafted_arrays() -> dict[str, object]:
    """Arrays and numbers with which NumPy would read outside of their bytes."""
    f8, multiarray = np.dtype('f8'), np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    states = {
        'negative size': ('U1', 3, '<', None, None, None, -(2**31), 4, 8),
        'other size': ('U1', 3, '<', None, None, None, 8, 4, 8),
        'pointer': ('f8', 3, '<', None, None, None, -1, -1, 4),
        'all flags': ('f8', 3, '<', None, None, None, -1, -1, 63),
        'true is one': ('f8', 3, '<', None, None, None, -1, -1, False),
        'parts': ('f8', 3, '<', (f8, (100, 100)), None, None, 8, 8, 0),
        'fields': ('U1', 3, '<', None, ('a',), {'a': (f8, 10**9)}, 4, 4, 8),
        'notes': ('f8', 4, '<', None, None, None, -1, -1, 0, {}),
        'short': ('f8', 3),
        'array': ('f8', 3, np.ones(3), None, None, None, -1, -1, 0),
    }
    out = {}
    for name, (kind, *state) in states.items():
        dtype = numpy_dtype(kind, *state)
        out[f'{name}, number'] = Pickled(multiarray.scalar, (dtype, b'A\0\0\0' * 2))
        out[f'{name}, array'] = Pickled(
            multiarray._reconstruct, (np.ndarray, (0,), b'b'), (1, (4,), dtype, False, b'A\0\0\0' * 8)
        )
        out[f'{name}, buffer'] = Pickled(np.ndarray, ((10**5,), dtype, bytearray(32)))

    def array(*state: object, begin: tuple = (np.ndarray, (0,), b'b')) -> Pickled:
        return Pickled(multiarray._reconstruct, begin, state)

    return {
        **out,
        'large': array(1, (2**40,), f8, False, bytes(32)),
        'negative': array(1, (-4, -1), f8, False, bytes(32)),
        'objects': array(1, (1,), np.dtype('O'), False, [1]),
        'no characters': array(1, (1,), np.dtype('U1'), False, b'\xff' * 4),
        'few bytes': array(1, (4,), f8, False, b'abc'),
        'of a text': array(1, (4,), 'f8', False, bytes(32)),
        'of a list': array(begin=(list, (0,), b'b')),
        'records': Pickled(np.dtype, ([('a', 'O')],)),
        'many': Pickled(np.dtype, ('(100000,100000)f8',)),
        'empty texts': array(1, (10**9,), Pickled(np.dtype, ('U0', False, True)), False, b''),
        'uninitialized': Pickled(np.ndarray, ((1000,),)),
        'short number': Pickled(multiarray.scalar, (f8, b'abc')),
    }


@pytest.mark.parametrize('name', crafted_arrays())
def test_arrays_that_reach_outside_of_their_bytes(name, tmp_path):
    torch.save(dict(a=crafted_arrays()[name]), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth: (refused, because it holds|the file is cut off)'):
        load_from_local(str(tmp_path / 'x.pth'))


def test_arrays_come_back_as_numpy_wrote_them(tmp_path):
    kinds = ('?', 'i1', 'i8', 'u2', 'f2', '>f4', 'f8', 'c8', 'U3', '>U2')
    values = [np.array([[0, 1], [1, 0], [0, 0]]).astype(kind) for kind in kinds]
    values += [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3), np.zeros((0, 4))]
    values += [value.ravel()[0] for value in values if value.size]
    torch.save(values, tmp_path / 'x.pth')
    expected = torch.load(tmp_path / 'x.pth', weights_only=False)
    for _ in range(2):
        read = load_from_local(str(tmp_path / 'x.pth'))
        for found, value in zip(read, expected, strict=True):
            assert found.dtype == value.dtype and found.shape == value.shape and np.all(found == value)
            assert isinstance(found, type(value)) and found.flags.fnc == value.flags.fnc
        torch.save(read, tmp_path / 'x.pth')  # as a run that resumes writes them again
    assert torch.load(tmp_path / 'x.pth', weights_only=False)[0].__class__ is np.ndarray


@pytest.mark.parametrize(
    'palette', ['red', [1, 2, 3], [(1, 2, 3, 4)], [(300, 0, 0)], [(-1, 0, 0)], ['#ff0000'], dict(a=(1, 2, 3)), [None]]
)
def test_class_names_and_colours_that_are_none_are_left_out(palette, tmp_path):
    meta = dict(CLASSES=('a', None), PALETTE=palette, dataset_meta=dict(classes=[1, 'b'], palette=palette))
    torch.save(dict(state_dict={'w': torch.ones(1)}, meta=meta), tmp_path / 'x.pth')
    assert as_checkpoint(load_from_local(str(tmp_path / 'x.pth')))['meta'] == dict(
        dataset_meta=dict(classes=['1', 'b'])
    )
