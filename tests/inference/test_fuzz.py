"""Broken and odd images: prediction reports each with a reason, continues, and never crashes."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from test_entries import config, saved

from mmseg_volo.inference import Predictor
from mmseg_volo.inference.files import predict_files

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, WIDTH = 48, 72


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> tuple[Config, str]:
    return config(), saved(tmp_path_factory.mktemp('model') / 'x.pth')


@pytest.fixture(scope='module')
def predictor(model) -> Predictor:
    return Predictor(*model, 'cpu')


def smooth_image() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT))


def write_odd(folder: Path) -> tuple[set[str], set[str]]:
    """Write odd images; return the names of those that can be predicted, and of those that cannot."""
    folder.mkdir(exist_ok=True)
    image = smooth_image()
    pil, grey = Image.fromarray(image), image[..., 0]
    turned = Image.Exif()
    turned[0x112] = 6
    for mode in ('RGBA', 'L', 'LA', 'P', '1'):
        pil.convert(mode).save(folder / f'mode_{mode}.png')
    pil.convert('P').save(folder / 'transparent.png', transparency=0)
    pil.convert('CMYK').save(folder / 'cmyk.jpg')
    pil.save(folder / 'progressive.jpg', progressive=True)
    for suffix in ('jpg', 'png', 'webp'):
        pil.save(folder / f'turned_{suffix}.{suffix}', exif=turned)
    for suffix in ('webp', 'png', 'tif'):
        pil.save(folder / f'several_{suffix}.{suffix}', save_all=True, append_images=[pil.rotate(90)] * 2)
    pil.save(folder / 'a_jpeg.png', format='JPEG')
    for name in ('ünïcödé 图.png', 'new\nline.png', '[ab]*.png', '%d.png', 'two  words.PNG', '-o.png'):
        pil.save(folder / name)
    Path(os.fsdecode(os.fsencode(folder) + b'/no\xff\xfeutf8.png')).write_bytes((folder / '%d.png').read_bytes())
    for suffix in ('png', 'tif'):
        cv2.imwrite(str(folder / f'deep_{suffix}.{suffix}'), image.astype(np.uint16) * 257)
        cv2.imwrite(str(folder / f'deep_alpha_{suffix}.{suffix}'), np.dstack([image, grey]).astype(np.uint16) * 257)
    cv2.imwrite(str(folder / 'deep_grey.png'), grey.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / 'float.tif'), (image / 255).astype(np.float32))
    Image.new('RGB', (1, 1)).save(folder / 'pixel.png')
    pil.crop((0, 0, 30, 30)).save(folder / 'small.bmp')
    Image.new('RGB', (1, HEIGHT)).save(folder / 'column.png')
    (folder / 'folder.png').mkdir()
    pil.save(folder / 'folder.png/inside.png')
    fine = {path.name for path in folder.rglob('*') if path.is_file()}
    Image.new('RGB', (3000, 1)).save(folder / 'line.png')
    cv2.imwrite(str(folder / 'large_values.tif'), image.astype(np.float32) * 9)
    (folder / 'empty.png').touch()
    (folder / 'empty.jpg').touch()
    (folder / 'text.png').write_text('no image\n' * 50, encoding='utf-8')
    header = b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0'
    (folder / 'claims_60000_pixels.png').write_bytes(header + b'\0' * 100)
    for name in ('mode_RGBA.png', 'progressive.jpg'):
        data = (folder / name).read_bytes()
        (folder / f'cut_{name}').write_bytes(data[: len(data) // 2])
    return fine, {path.name for path in folder.rglob('*') if path.is_file()} - fine


def mutations(folder: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents without end: images of the folder cut, flipped, overwritten, shortened, or noise."""
    rng = np.random.default_rng(seed)
    sources = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size > 20)

    def flip(data: bytearray) -> bytearray:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        return data

    def overwrite(data: bytearray) -> bytearray:
        start = rng.integers(len(data))
        data[start : start + 16] = rng.bytes(16)
        return data

    def drop(data: bytearray) -> bytearray:
        first, last = sorted(rng.integers(0, len(data), 2))
        return data[:first] + data[last:]

    kinds: list[Callable] = [
        lambda data: data[: rng.integers(len(data))],
        flip,
        overwrite,
        drop,
        lambda data: bytearray(rng.bytes(rng.integers(1, 3000))),
    ]
    for number in itertools.count():
        source = sources[rng.integers(len(sources))]
        yield f'{number}{source.suffix.lower()}', bytes(kinds[number % len(kinds)](bytearray(source.read_bytes())))


def check(predictor: Predictor, folder: Path, out: Path, capsys) -> set[str]:
    """Predict a folder; check that each image has a result or is reported. Return the names of the reported ones."""
    failed = predict_files(predictor, [str(folder)], str(out))
    messages = capsys.readouterr().err
    for path, reason in failed.items():
        name = str(path).encode('utf-8', 'backslashreplace').decode()
        assert reason and f'skipped {name}: {reason}' in messages
        assert '\n' not in reason, reason
    images = {path for path in folder.rglob('*') if path.is_file()}
    assert set(failed) <= images
    maps = [path for path in out.rglob('*.png') if path.is_file()]
    assert len(maps) == len(images) - len(failed) and not list(out.rglob('*.part*'))
    for path in maps:
        found = cv2.imdecode(np.fromfile(os.fsencode(path), np.uint8), -1)
        assert found.ndim == 2 and found.max() < 19
    return {path.name for path in failed}


def test_odd_images(predictor, tmp_path, capsys):
    fine, broken = write_odd(tmp_path / 'odd')
    assert len(fine) > 25 and len(broken) >= 8
    assert check(predictor, tmp_path / 'odd', tmp_path / 'out', capsys) == broken
    turned = cv2.imread(str(tmp_path / 'out/turned_jpg.png'), -1)
    assert turned.shape == (WIDTH, HEIGHT)  # upright, as EXIF says
    plain, *same = (cv2.imread(str(tmp_path / f'out/{name}.png'), -1) for name in ('%d', 'mode_RGBA', 'several_tif'))
    assert all((plain == other).all() for other in same)


def test_mutated_images(predictor, tmp_path, capsys):
    write_odd(tmp_path / 'odd')
    (tmp_path / 'mutated').mkdir()
    for name, data in itertools.islice(mutations(tmp_path / 'odd', 0), 60):
        (tmp_path / 'mutated' / name).write_bytes(data)
    failed = check(predictor, tmp_path / 'mutated', tmp_path / 'out', capsys)
    assert 30 < len(failed) < 60


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 6))
def test_many_mutated_images(seed, predictor, tmp_path, capsys):
    write_odd(tmp_path / 'odd')
    (tmp_path / 'mutated').mkdir()
    for name, data in itertools.islice(mutations(tmp_path / 'odd', seed), 120):
        (tmp_path / 'mutated' / name).write_bytes(data)
    check(predictor, tmp_path / 'mutated', tmp_path / 'out', capsys)


def arguments(folder: Path) -> dict[str, tuple[list[str], int, str]]:
    """Return by name: arguments of ``predict.py`` after config and checkpoint, exit status, part of the message."""
    image, out = str(folder / 'a.png'), ['--out', str(folder / 'out')]
    (folder / 'taken').write_text('a file')
    (folder / 'nothing').mkdir()
    return {
        'plain': ([image, *out], 0, ''),
        'everything': (
            [image, *out, '--aug-test', '--overlay', '--confidence', '--channels-last', '--precision', 'bf16'],
            0,
            '',
        ),
        'twice': ([image, image, *out], 0, ''),
        'pattern': ([f'{folder}/[a].p?g', *out], 0, ''),
        'no source': (out, 2, 'required: source'),
        'no out': ([image], 2, 'required: --out'),
        'empty name': (['', *out], 1, 'no image found'),
        'gone': ([f'{folder}/gone.png', *out], 1, 'gone.png: no image found'),
        'nothing': ([f'{folder}/nothing', *out], 1, 'nothing: no image found'),
        'pattern of nothing': ([f'{folder}/**/*.webp', *out], 1, 'no image found'),
        'broken pattern': ([f'{folder}/[', *out], 1, 'no image found'),
        'device': ([image, *out, '--device', 'gpu'], 1, 'error: device'),
        'no gpu': ([image, *out, '--device', 'cuda:99'], 1, 'error: device cuda:99'),
        'precision': ([image, *out, '--precision', 'fp8'], 2, 'invalid choice'),
        'no windows': ([image, *out, '--window-batch', '0'], 1, 'error: window_batch must be 1 or more'),
        'windows': ([image, *out, '--window-batch', 'x'], 2, 'invalid int'),
        'a file as folder': ([image, '--out', str(folder / 'taken')], 1, 'taken'),
        'unknown': ([image, *out, '--unknown'], 2, 'unrecognized'),
    }


@pytest.mark.slow
def test_all_options_of_predict(model, tmp_path):
    cfg, checkpoint = model
    cfg.dump(tmp_path / 'small.py')
    cv2.imwrite(str(tmp_path / 'a.png'), smooth_image())
    paths = str(tmp_path / 'small.py'), checkpoint
    cases = {name: ([*paths, *given], *expected) for name, (given, *expected) in arguments(tmp_path).items()}
    one = [str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out')]
    cases['no config'] = ([str(tmp_path / 'x.py'), checkpoint, *one], 1, 'error: config')
    cases['no checkpoint'] = ([paths[0], str(tmp_path / 'x.pth'), *one], 1, 'x.pth does not exist')
    cases['a folder as checkpoint'] = ([paths[0], str(tmp_path), *one], 1, 'is a folder')
    cases['an image as checkpoint'] = ([paths[0], one[0], *one], 1, 'a.png: the file is cut off or is no checkpoint')
    for name, (given, status, message) in cases.items():
        command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/predict.py'), *given]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
        assert done.returncode == status and message in done.stderr, (name, done.stderr)
        assert 'Traceback' not in done.stderr, (name, done.stderr)
