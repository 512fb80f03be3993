"""A small street-scene data set that the package draws itself, in the folder layout of Cityscapes.

It exists so that a model can be trained and tested in minutes with nothing downloaded.
"""

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import cv2
from mmengine.dist import barrier, is_main_process
from mmseg.datasets import CityscapesDataset
from mmseg.registry import DATASETS
from rich.progress import track

from .street_drawing import draw_scene

FORMAT_VERSION = 1
CITIES = {'train': 'elmstadt', 'val': 'lindbruck'}
_SCENES_PER_SPLIT = 1_000_000


def _pair(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """The paths of an image and its label, named as Cityscapes names them."""
    city = CITIES[split]
    name = f'{city}_{index:06d}_000019'
    return (
        root / 'leftImg8bit' / split / city / f'{name}_leftImg8bit.png',
        root / 'gtFine' / split / city / f'{name}_gtFine_labelTrainIds.png',
    )


def _is_drawn(root: Path, wanted: dict) -> bool:
    """Whether ``root`` holds the wanted set; False if it is free, an error if it holds something else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise FileExistsError(f'{root} is a file; choose another folder for the street scenes')
    record = root / 'scenes.json'
    if not record.is_file():
        if any(root.iterdir()):
            raise FileExistsError(
                f'{root} is not empty and holds no scenes.json, so it was not drawn by mmseg_volo; nothing in it was '
                'touched. Choose another folder for the street scenes, or empty this one.'
            )
        return False
    try:
        found = json.loads(record.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{record} cannot be read ({error}); delete {root} to have it drawn again') from error
    if found != wanted:
        raise ValueError(
            f'{root} holds street scenes drawn with {found}, but {wanted} is asked for; nothing in it was touched. '
            'Choose another folder, ask for the same parameters, or delete the folder to have it drawn again.'
        )
    pairs = [_pair(root, split, index) for split in CITIES for index in range(wanted[split])]
    missing = [str(path) for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise ValueError(
            f'{root} lacks {len(missing)} of {2 * len(pairs)} street-scene files, such as {missing[0]}; delete the '
            'folder to have it drawn again'
        )
    return True


def draw_street_scenes(
    root: str | Path, train: int = 96, val: int = 24, size: tuple[int, int] = (256, 512), seed: int = 0
) -> None:
    """Draw a data set of street scenes in the folder layout of Cityscapes, unless it is there already.

    Writes ``leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and
    ``gtFine/{train,val}/<city>/*_gtFine_labelTrainIds.png``, and the parameters to ``scenes.json``. Everything is drawn
    into a hidden folder beside ``root`` (``.<root>.<random>.tmp``) and renamed at the end, so ``root`` is never
    half-written; a killed process can at most leave that hidden folder behind, which may be deleted.

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
    root = Path(root).absolute()
    counts = {'train': train, 'val': val}
    if min(counts.values()) < 0 or max(counts.values()) > _SCENES_PER_SPLIT or seed < 0:
        raise ValueError(f'need 0 to {_SCENES_PER_SPLIT} scenes and a seed >= 0, got {counts} and seed {seed}')
    wanted = {'format': FORMAT_VERSION, **counts, 'size': [int(length) for length in size], 'seed': seed}
    if _is_drawn(root, wanted):
        return

    root.parent.mkdir(parents=True, exist_ok=True)
    draft = root.with_name(f'.{root.name}.{uuid.uuid4().hex}.tmp')
    try:
        jobs = [(split, index) for split in CITIES for index in range(counts[split])]
        for folder in {path.parent for split in CITIES for path in _pair(draft, split, 0)}:
            folder.mkdir(parents=True)
        for split, index in track(jobs, description='Drawing street scenes'):
            number = 2 * seed + list(CITIES).index(split)
            scene = draw_scene(number * _SCENES_PER_SPLIT + index, size)
            for path, picture in zip(_pair(draft, split, index), scene, strict=True):
                if not cv2.imwrite(str(path), picture):
                    raise OSError(f'cannot write {path}')
        (draft / 'scenes.json').write_text(json.dumps(wanted) + '\n', encoding='utf-8')
        try:
            os.replace(draft, root)
        except OSError:
            # Another process may have drawn the same set in the meantime; anything else is an error.
            if not _is_drawn(root, wanted):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@DATASETS.register_module()
class StreetSceneDataset(CityscapesDataset):
    """A Cityscapes data set whose ``data_root`` is drawn on first use, see :func:`draw_street_scenes`.

    With several processes the main one draws and the others wait; where they do not share a disk, each node then draws
    its own copy.

    Args:
        data_root: Folder of the data set.
        train: Number of training scenes.
        val: Number of validation scenes.
        size: (height, width) of the scenes in pixels.
        seed: Number of the data set.
        **kwargs: Arguments of ``mmseg.datasets.CityscapesDataset``, with ``data_prefix`` such as
            ``dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')``.

    Raises:
        FileExistsError, ValueError, OSError: As :func:`draw_street_scenes`.
    """

    def __init__(
        self,
        data_root: str | Path,
        train: int = 96,
        val: int = 24,
        size: Sequence[int] = (256, 512),
        seed: int = 0,
        **kwargs,
    ) -> None:
        scenes = {'train': train, 'val': val, 'size': tuple(size), 'seed': seed}
        try:
            if is_main_process():
                draw_street_scenes(data_root, **scenes)
        finally:
            # Reached after a failure too, or the other processes would wait for ever.
            barrier()
        draw_street_scenes(data_root, **scenes)
        super().__init__(data_root=str(data_root), **kwargs)
