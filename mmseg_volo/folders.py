"""Prediction of files and folders: what ``tools/predict.py`` does."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from .inference import Predictor, read_image
from .visualize import overlay

_PREPARED_AHEAD = 2**22  # pixels
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def find_images(sources: Iterable[str]) -> dict[Path, Path]:
    """The images that files, folders (with all below them) and glob patterns stand for.

    Returns:
        Path of each image, to the path below the output folder, without a suffix, that its results get: its name, or
        for a folder its place in it. Where two images would meet there, their suffix becomes part of the name.

    Raises:
        FileNotFoundError: a source that is not there, or has no image.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_file():
            images = {path: Path(path.name)}
        elif source and path.is_dir():  # an empty name, as an unset variable leaves it, is not the current folder
            inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            images = {p: p.relative_to(path) for p in inside}
        else:
            matches = sorted(Path(p) for p in glob.glob(source, recursive=True))
            images = {p: Path(p.name) for p in matches if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()}
        if not images:
            kinds = ', '.join(IMAGE_SUFFIXES)
            raise FileNotFoundError(
                f'{source or "an empty name"}: no image found; expected a file, a folder or a pattern with {kinds}'
            )
        found.update(images)
    plain = [place.with_suffix('') for place in found.values()]
    targets = {
        image: place.with_suffix('') if plain.count(place.with_suffix('')) == 1 else place
        for image, place in found.items()
    }
    taken: dict[Path, Path] = {}
    for image, target in targets.items():
        if target in taken:
            raise FileExistsError(
                f'{taken[target]} and {image} have one name in the output folder ({target}); predict them apart'
            )
        taken[target] = image
    return targets


def predict_files(
    predictor: Predictor, sources: Iterable[str], out_dir: str, with_overlay: bool = False
) -> dict[Path, str]:
    """Predict each image and save what was found; one that cannot be read or predicted is reported and skipped.

    The next image is read and prepared while the model works on one.

    Args:
        predictor: the model.
        sources: files, folders or glob patterns.
        out_dir: gets ``NAME.png`` with class ids (8 bit, or 16 bit above 256 classes), with ``with_overlay``
            ``NAME_overlay.png``, the picture with the classes' colours over it, and where the predictor was asked for
            the confidence ``NAME_confidence.png``, from 0 to 255 for certain.

    Returns:
        The images that failed, each with the reason.
    """
    targets = find_images(sources)
    dtype = np.uint8 if len(predictor.classes) <= 256 else np.uint16
    failed: dict[Path, str] = {}
    # The bar goes to stderr as logs do, so that stdout can be piped.
    bar = tqdm(total=len(targets), unit='image', file=sys.stderr)
    for path, loaded in _loaded(predictor, list(targets)):
        try:
            image, data = loaded.result()
            found = predictor.predict(predictor.prepare(image) if data is None else data)
            target = Path(out_dir) / targets[path].parent / f'{targets[path].name}.png'
            _write(target, found.classes.astype(dtype))
            if found.confidence is not None:
                grey = np.rint(found.confidence * 255).astype(np.uint8)
                _write(target.with_name(f'{target.stem}_confidence.png'), grey)
            if with_overlay:
                _write(target.with_name(f'{target.stem}_overlay.png'), overlay(image, found.classes, predictor.palette))
        except torch.cuda.OutOfMemoryError:
            failed[path] = 'the GPU has not enough memory for it; try --device cpu'
            torch.cuda.empty_cache()
        except Exception as error:  # whatever is wrong with one picture, the others are still wanted
            failed[path] = str(error) or type(error).__name__
        if path in failed:
            bar.write(f'skipped {path}: {failed[path]}', file=sys.stderr)
        bar.update()
    bar.close()
    return failed


def _loaded(predictor: Predictor, paths: list[Path]) -> Iterator[tuple[Path, Future]]:
    """Each path with its picture and what the pipeline made of it, one ahead of the caller.

    A large picture's views would take too much memory beside those of the one at work: it is only read.
    """

    def load(path: Path) -> tuple[np.ndarray, dict | None]:
        image = read_image(path)
        return image, predictor.prepare(image) if image.shape[0] * image.shape[1] <= _PREPARED_AHEAD else None

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(load, paths[0])
        for path, after in zip(paths, [*paths[1:], None], strict=True):
            current, following = following, after and pool.submit(load, after)
            yield path, current


def _write(path: Path, picture: np.ndarray) -> None:
    """Write a PNG under a temporary name and rename it: a run that is stopped leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        part.write_bytes(cv2.imencode('.png', picture)[1].tobytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
