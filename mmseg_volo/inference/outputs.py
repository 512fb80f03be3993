"""The files that predictions are written to: their names, and errors of the disk."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..utils.files import atomic_write, part_of

IMAGE_ENDINGS = '.png', '_overlay.png', '_confidence.png'
SCENE_ENDINGS = '.tif', '_confidence.tif'  # of TIFFs that LoadBands reads
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}  # the next write fails too


@dataclass(frozen=True)
class Outputs:
    """What to write, and where; see :func:`~mmseg_volo.inference.files.predict_files`."""

    folder: Path
    with_overlay: bool = False
    with_legend: bool = True
    opacity: float = 0.5
    video_format: str = 'mp4'


class OutputError(OSError):
    """A result cannot be written, and the next ones could not either; the message names the file and the reason."""


def result_of(target: Path, ending: str) -> Path:
    """The path of a result: the path of all results of an image, and an ending such as ``_overlay.png``."""
    return target.with_name(f'{target.name}{ending}')


def check_folder(folder: Path, targets: dict[Path, Path], endings: Sequence[str]) -> None:
    """Make the output folder. Check that it is writable and that no result would replace a source."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'{folder} is a file; the results need a folder')
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'cannot write to {folder}: no permission, or a read-only disk')
    sources = {path.resolve() for path in targets}
    for path, target in targets.items():
        if any(result_of(folder.resolve() / target, ending) in sources for ending in endings):
            raise FileExistsError(f'the results of {path} would replace a source in {folder}; choose another folder')


def check_names(images: dict[Path, Path], endings: Sequence[str]) -> None:
    """Raise FileExistsError if two images have a result of the same name, as a.png and a_overlay.png may have."""
    taken: dict[Path, Path] = {}
    for path, target in images.items():
        for result in (result_of(target, ending) for ending in endings):
            if (other := taken.setdefault(result, path)) is not path:
                raise FileExistsError(
                    f'{other} and {path} would both be written to {result}; predict them into different folders'
                )


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a PNG.

    Raises:
        OutputError: the disk is full or broken.
        OSError: another reason.
    """
    data = cv2.imencode('.png', image)[1].tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(data)
    except OSError as error:
        if error.errno in _FATAL:
            raise OutputError(f'{path} cannot be written ({error.strerror})') from error
        raise


def remove_parts(target: Path) -> None:
    """Remove the incomplete results that a killed process left."""
    for ending in (*IMAGE_ENDINGS, *SCENE_ENDINGS):
        part_of(result_of(target, ending)).unlink(missing_ok=True)
