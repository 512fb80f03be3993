"""A small data set of street scenes that the package draws itself, in the folder layout of Cityscapes.

A model can be trained and tested on it in minutes, with nothing downloaded.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS
from rich.progress import track

from .street_drawing import draw_scene

CITIES = {'train': 'elmstadt', 'val': 'lindbruck'}
_FORMAT = 2  # counts up when the same parameters give other scenes
_SCENES_PER_SPLIT = 1_000_000


def _pair(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """The paths of an image and its label, named as Cityscapes names them."""
    folder = f'{split}/{CITIES[split]}'
    name = f'{CITIES[split]}_{index:06d}_000019'
    return (
        root / 'leftImg8bit' / folder / f'{name}_leftImg8bit.png',
        root / 'gtFine' / folder / f'{name}_gtFine_labelTrainIds.png',
    )


def _is_drawn(root: Path, wanted: dict) -> bool:
    """Whether ``root`` holds the wanted set; False if it is free, an error if it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    record = root / 'scenes.json'
    if not record.is_file():
        raise FileExistsError(
            f'{root} is a file, or a folder that holds other things: it is not empty and has no scenes.json. '
            'Nothing was changed. Choose another folder for the street scenes.'
        )
    try:
        found = json.loads(record.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{record} cannot be read ({error}); delete {root} to have it drawn again') from error
    if found != wanted:
        raise ValueError(
            f'{root} holds street scenes drawn with {found}, but {wanted} is asked for. Nothing was changed. '
            'Choose another folder, ask for the same parameters, or delete the folder to have it drawn again.'
        )
    paths = [path for split in CITIES for index in range(wanted[split]) for path in _pair(root, split, index)]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f'{root} lacks {len(missing)} of {len(paths)} files of street scenes, such as {missing[0]}; delete the '
            'folder to have it drawn again'
        )
    return True


def draw_street_scenes(
    root: str | Path, train: int = 96, val: int = 24, size: Sequence[int] = (256, 512), seed: int = 0
) -> None:
    """Draw a data set of street scenes in the folder layout of Cityscapes, unless it is there already.

    Writes ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and
    ``gtFine/{train,val}/<city>/*_gtFine_labelTrainIds.png``, and the parameters to ``scenes.json``. The files are drawn
    in a hidden folder beside ``root``, which is renamed at the end, so ``root`` is never half-written. A killed process
    may leave the hidden folder ``.<root>.*.tmp`` behind; it can be deleted.

    Args:
        root: Folder of the data set; it must be absent, empty, or hold the same set.
        train: Number of training scenes.
        val: Number of validation scenes, of another city and with other seeds.
        size: (height, width) of the scenes in pixels.
        seed: Number of the data set.

    Raises:
        FileExistsError: If ``root`` is a file, or a folder with other things in it.
        ValueError: If ``root`` holds scenes drawn with other parameters or lacks some of its files, or if a
            parameter is out of range.
        OSError: If a file cannot be written.
    """
    root, counts = Path(root).absolute(), {'train': train, 'val': val}
    if min(train, val, seed) < 0 or max(train, val) > _SCENES_PER_SPLIT:
        raise ValueError(f'need 0 to {_SCENES_PER_SPLIT} scenes and a seed >= 0, got {counts} and seed {seed}')
    wanted = {'format': _FORMAT, **counts, 'size': list(map(int, size)), 'seed': seed}
    if _is_drawn(root, wanted):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}.', suffix='.tmp', dir=root.parent) as folder:
        draft = Path(folder, root.name)
        for number, split in enumerate(CITIES):
            for path in _pair(draft, split, 0):
                path.parent.mkdir(parents=True)
            for index in track(range(counts[split]), description=f'Drawing street scenes for {split}'):
                scene = draw_scene((2 * seed + number) * _SCENES_PER_SPLIT + index, tuple(size))
                for path, pixels in zip(_pair(draft, split, index), scene, strict=True):
                    if not cv2.imwrite(str(path), pixels):
                        raise OSError(f'cannot write {path}')
        (draft / 'scenes.json').write_text(json.dumps(wanted) + '\n', encoding='utf-8')
        try:
            os.replace(draft, root)
        except OSError:
            # Another process may have drawn the same set in the meantime; anything else is an error.
            if not _is_drawn(root, wanted):
                raise


@DATASETS.register_module()
class StreetSceneDataset(CityscapesDataset):
    """A Cityscapes data set whose ``data_root`` is drawn on first use, see :func:`draw_street_scenes`.

    Of several processes each draws, and the first that is ready provides the files; so they need no common disk.

    Args:
        data_root: Folder of the data set.
        train, val, size, seed: As for :func:`draw_street_scenes`.
        **kwargs: Arguments of ``mmseg.datasets.CityscapesDataset``, with ``data_prefix`` such as
            ``dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')``.

    Raises:
        FileExistsError, ValueError, OSError: As :func:`draw_street_scenes`.
    """

    draws_itself = True  # data checks that must be quick leave it out

    def __init__(
        self,
        data_root: str | Path,
        train: int = 96,
        val: int = 24,
        size: Sequence[int] = (256, 512),
        seed: int = 0,
        **kwargs,
    ):
        draw_street_scenes(data_root, train, val, size, seed)
        super().__init__(data_root=str(data_root), **kwargs)
