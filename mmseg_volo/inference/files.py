"""Prediction of files and folders, pictures and videos: what ``tools/predict.py`` does."""

import contextlib
import errno
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from tqdm import tqdm

from ..utils.files import atomic_write, part_of
from ..utils.signals import Stopped, StopSignals
from .images import read_image
from .manifest import Journal, identity
from .pool import Work, share_out
from .predictor import Prediction, Predictor
from .video import PREPARED_AHEAD, VIDEO_SUFFIXES, predict_video
from .visualize import add_legend, entries_of, overlay

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
_ALL_FAIL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}


@dataclass(frozen=True)
class Recipe:
    """How to make a :class:`~mmseg_volo.inference.Predictor`, here or in another process: its arguments."""

    config: Config
    checkpoint: str
    device: str | None = None
    aug_test: bool = False
    options: dict = field(default_factory=dict)

    def load(self, rank: int | None = None) -> Predictor:
        """The predictor; of several processes each gets a GPU of its own where there are as many."""
        device = self.device
        if rank is not None and (device or get_device()) == 'cuda' and torch.cuda.device_count():
            device = f'cuda:{rank % torch.cuda.device_count()}'
        return Predictor(self.config, self.checkpoint, device, self.aug_test, **self.options)


@dataclass(frozen=True)
class Outputs:
    """What is written: see :func:`predict_files`."""

    folder: Path
    with_overlay: bool = False
    with_legend: bool = True
    opacity: float = 0.5
    video_format: str = 'mp4'


class OutputError(OSError):
    """A result could not be written, and the next ones could not either; the message names the file and the reason."""


def _expand(source: str, without: Path | None) -> dict[Path, Path]:
    """Files of a source, to their place below it; in a folder pictures, or videos where there are no pictures."""
    path = Path(source)
    if path.is_file():
        return {path: Path(path.name)}
    if source and path.is_dir():  # an empty name, as an unset variable leaves it, is not the current folder
        inside = {p: p.relative_to(path) for p in sorted(path.rglob('*')) if _is_video(p) or _is_image(p)}
        if without is not None and without != path.resolve():  # results of an earlier run
            inside = {p: place for p, place in inside.items() if without not in p.resolve().parents}
        images = {p: place for p, place in inside.items() if not _is_video(p)}
        if images and len(images) < len(inside):
            count = len(inside) - len(images)
            print(f'{source}: {count} video{"s" * (count > 1)} beside the images left out; name them', file=sys.stderr)
        return images or inside
    matches = sorted(Path(p) for p in glob.glob(source, recursive=True))
    return {p: Path(p.name) for p in matches if _is_image(p) or _is_video(p)}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def find_sources(sources: Iterable[str], out_dir: str | None = None) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """The images and the videos that files, folders (with all below them) and glob patterns stand for.

    Of a folder the videos are taken only where it has no images. What lies in ``out_dir`` is not part of a folder.

    Returns:
        Path of each image, to the path below the output folder, without a suffix, that its results get: its name, or
        for a folder its place in it. Where two images would meet there, their suffix becomes part of the name. The
        same for the videos.

    Raises:
        FileNotFoundError: a source that is not there, or has neither.
        FileExistsError: two images have one name even so.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        files = _expand(source, Path(out_dir).resolve() if out_dir is not None else None)
        if not files:
            raise FileNotFoundError(
                f'{source or "an empty name"}: no image found; expected a file, a folder or a pattern with '
                f'{", ".join(IMAGE_SUFFIXES)}, or videos: {", ".join(VIDEO_SUFFIXES)}'
            )
        found.update(files)
    videos = {path: place for path, place in found.items() if _is_video(path)}
    return _targets({path: place for path, place in found.items() if path not in videos}), _targets(videos)


def find_images(sources: Iterable[str]) -> dict[Path, Path]:
    """The images alone of :func:`find_sources`.

    Raises:
        FileNotFoundError: a source that is not there, or has no image.
    """
    sources = list(sources)
    images, videos = find_sources(sources)
    if videos:
        raise FileNotFoundError(f'{next(iter(videos))}: no image found, only videos')
    return images


def _targets(found: dict[Path, Path]) -> dict[Path, Path]:
    plain = [place.with_suffix('') for place in found.values()]
    counts = {place: 0 for place in plain}
    for place in plain:
        counts[place] += 1
    targets = {
        path: place.with_suffix('') if counts[place.with_suffix('')] == 1 else place for path, place in found.items()
    }
    taken: dict[Path, Path] = {}
    for path, target in targets.items():
        if target in taken:
            raise FileExistsError(
                f'{taken[target]} and {path} have one name in the output folder ({target}); predict them apart'
            )
        taken[target] = path
    return targets


def predict_files(
    predictor: Predictor | Recipe,
    sources: Iterable[str],
    out_dir: str,
    with_overlay: bool = False,
    *,
    with_legend: bool = True,
    opacity: float = 0.5,
    video_format: str = 'mp4',
    processes: int = 1,
    resume: bool = False,
) -> dict[Path, str]:
    """Predict images and videos and save what was found; one that cannot be read or predicted is reported and skipped.

    While the model works on an image, the next one is read and prepared and the results of the one before are written.
    A result appears under its name when it is whole.

    Args:
        predictor: the model, or how to make it. Only with a :class:`Recipe` is what was done noted in the output
            folder (``predict.jsonl``), as ``resume`` needs it.
        sources: files, folders or glob patterns; see :func:`find_sources`.
        out_dir: gets for each image ``NAME.png`` with class ids (8 bit, or 16 bit above 256 classes), with
            ``with_overlay`` ``NAME_overlay.png``, the picture with the classes' colours over it, and where the
            predictor was asked for the confidence ``NAME_confidence.png``, from 0 to 255 for certain; for each video
            ``NAME_overlay.mp4`` alone, with its sound.
        with_legend: put the names and colours of the classes that occur below overlays.
        opacity: weight of an overlay's colours, from 0 to 1.
        video_format: a key of :data:`~mmseg_volo.inference.video.VIDEO_FORMATS`.
        processes: among which the images are shared out; needs a :class:`Recipe`. Videos are predicted one by one.
        resume: leave out what was done before, by a run with the same recipe and options; needs a :class:`Recipe`.

    Returns:
        The files that failed, each with the reason.

    Raises:
        FileNotFoundError, FileExistsError: as :func:`find_sources`; a result would replace a source.
        ConfigError: results of another recipe or other options are to be resumed.
        OutputError: the disk is full, or the like.
        Stopped: by SIGINT or SIGTERM; what was done until then is whole.
    """
    outputs = Outputs(Path(out_dir), with_overlay, with_legend, opacity, video_format)
    images, videos = find_sources(sources, out_dir)
    _check_folder(outputs.folder, {**images, **videos})
    journal = None
    if isinstance(predictor, Recipe):
        same = 'window_batch', 'cuda_graph'  # options with the same results
        decisive = {name: value or None for name, value in predictor.options.items() if name not in same}
        shown = dict(overlay=with_overlay, legend=with_legend, opacity=opacity, video_format=video_format)
        made_with = identity(predictor.config, predictor.checkpoint, predictor.aug_test, **decisive, **shown)
        journal = Journal(outputs.folder, made_with, resume)
    elif processes > 1 or resume:
        raise TypeError('several processes and resume need a Recipe: a Predictor cannot be made again')
    if resume:
        everything = len(images) + len(videos)
        images = {path: target for path, target in images.items() if not journal.has(path)}
        videos = {path: target for path, target in videos.items() if not journal.has(path)}
        todo = len(images) + len(videos)
        print(f'{everything - todo} done before, {todo} to do', file=sys.stderr)
        if not todo:
            return {}
    return _Run(predictor, outputs, journal, processes).do(images, videos)


def _check_folder(folder: Path, targets: dict[Path, Path]) -> None:
    """Make the output folder, and see that it can be written and that no result would replace a source."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f'{folder} is a file; the results need a folder')
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{folder} cannot be written to: no permission, or a read-only disk')
    place, sources = folder.resolve(), {path.resolve() for path in targets}
    for path, target in targets.items():
        for ending in ('.png', '_overlay.png', '_confidence.png'):
            if _result(place / target, ending) in sources:
                raise FileExistsError(
                    f'the results of {path} would replace a source in {folder}; choose another folder'
                )


def _result(target: Path, ending: str) -> Path:
    return target.with_name(f'{target.name}{ending}')


class _Run:
    """One run over images, then videos, with its bar, its journal and what failed."""

    def __init__(self, predictor: Predictor | Recipe, outputs: Outputs, journal: Journal | None, processes: int):
        self._predictor, self._outputs, self._journal, self._processes = predictor, outputs, journal, processes
        self._failed: dict[Path, str] = {}
        self._done, self._begun = 0, False

    def do(self, images: dict[Path, Path], videos: dict[Path, Path]) -> dict[Path, str]:
        total = len(images) + len(videos)
        try:
            with StopSignals() as stop:
                if images:
                    self._images(images, stop)
                for path, target in videos.items():
                    self._video(path, target, stop)
        except Stopped as stopped:
            further = '; the same command with --resume goes on' if self._journal else ''
            print(f'{stopped}: {self._done} of {total} are done{further}', file=sys.stderr)
            raise
        except OutputError as error:
            further = ', then go on with --resume' if self._journal else ''
            raise OutputError(f'{error}; {self._done} of {total} are done: make room{further}') from error
        return self._failed

    def _load(self) -> Predictor:
        if isinstance(self._predictor, Recipe):
            self._predictor = self._predictor.load()
        return self._predictor

    def _begin(self) -> None:
        if self._journal is not None and not self._begun:
            self._journal.begin()
        self._begun = True

    def _images(self, images: dict[Path, Path], stop: StopSignals) -> None:
        # The bar goes to stderr as logs do, so that stdout can be piped.
        results = self._results(images, stop)
        with contextlib.closing(results), tqdm(total=len(images), unit='image', file=sys.stderr) as bar:
            for (path, _), files, reason in results:
                self._note(path, files, reason)
                bar.update()

    def _results(self, images: dict[Path, Path], stop: StopSignals) -> Iterator[tuple]:
        """Each image and target with the files written, or with why not."""
        processes = min(self._processes, len(images))
        if processes > 1:
            start = partial(_start, self._predictor, self._outputs)
            with contextlib.closing(share_out(start, images.items(), processes, stop, self._begin)) as results:
                for task, result, died in results:
                    if died:
                        _remove_parts(self._outputs.folder / task[1])
                    yield task, *(([], died) if died else result)
        else:
            predictor = self._load()
            self._begin()
            with contextlib.closing(_work(predictor, self._outputs, images.items(), stop)) as results:
                for task, result in zip(images.items(), results, strict=True):
                    yield task, *result
            stop.check()

    def _video(self, path: Path, target: Path, stop: StopSignals) -> None:
        outputs = self._outputs
        file = _result(target, f'_overlay.{outputs.video_format}')
        reason = None
        predictor = self._load()
        self._begin()
        try:
            told = predict_video(predictor, path, outputs.folder / file, outputs.with_legend, outputs.opacity, stop)
            if told:
                tqdm.write(f'{path}: {told}', file=sys.stderr)
        except Exception as error:
            reason = _reason(error)
        self._note(path, [str(file)], reason)

    def _note(self, path: Path, files: list[str], reason: str | None) -> None:
        if reason is not None:
            self._failed[path] = reason
            tqdm.write(f'skipped {path}: {reason}', file=sys.stderr)
            return
        self._done += 1
        if self._journal is not None:
            self._journal.add(path, files)


def _start(recipe: Recipe, outputs: Outputs, rank: int) -> Work:
    """What one of several processes does."""
    return partial(_work, recipe.load(rank), outputs)


def _work(
    predictor: Predictor, outputs: Outputs, tasks: Iterable[tuple[Path, Path]], stop: StopSignals
) -> Iterator[tuple[list[str], str | None]]:
    """For each image and target the files that were written, and None; or none, and why.

    One image's files are written while the next one is predicted: what is yielded is on the disk.
    """
    with contextlib.closing(_loaded(predictor, tasks)) as loaded_ones, ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        try:
            for target, loaded in loaded_ones:
                stop.check()
                try:
                    image, data = loaded.result()
                    found = predictor.predict(predictor.prepare(image) if data is None else data, stop.check)
                    job = partial(_written, predictor, outputs, target, image, found)
                except (Stopped, OutputError):
                    raise
                except Exception as error:  # whatever is wrong with one picture, the others are still wanted
                    job = partial(_failed, _reason(error))
                if writing is not None:
                    yield writing.result()
                writing = writer.submit(job)
        except Stopped:
            if writing is not None:
                yield writing.result()
            raise
        if writing is not None:
            yield writing.result()


def _failed(reason: str) -> tuple[list[str], str]:
    return [], reason


def _written(*arguments) -> tuple[list[str], str | None]:
    try:
        return _save(*arguments), None
    except Exception as error:
        return _failed(_reason(error))


def _reason(error: Exception) -> str:
    """Why one file failed, for users; errors that end the run are raised."""
    if isinstance(error, (Stopped, OutputError)):
        raise error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return 'the GPU has not enough memory for it; try --device cpu'
    return str(error) or type(error).__name__


def _loaded(predictor: Predictor, tasks: Iterable[tuple[Path, Path]]) -> Iterator[tuple[Path, Future]]:
    """Each target with its picture and what the pipeline made of it, one ahead of the caller.

    A large picture's views would take too much memory beside those of the one at work: it is only read.
    """

    def load(path: Path) -> tuple[np.ndarray, dict | None]:
        image = read_image(path)
        return image, predictor.prepare(image) if image.shape[0] * image.shape[1] <= PREPARED_AHEAD else None

    with ThreadPoolExecutor(1) as pool:
        current = None
        for path, target in tasks:
            following = target, pool.submit(load, path)
            if current is not None:
                yield current
            current = following
        if current is not None:
            yield current


def _save(predictor: Predictor, outputs: Outputs, target: Path, image: np.ndarray, found: Prediction) -> list[str]:
    """Write what is wanted of one picture; the files, by their place in the output folder."""
    dtype = np.uint8 if len(predictor.classes) <= 256 else np.uint16
    pictures = {'.png': found.classes.astype(dtype)}
    if found.confidence is not None:
        pictures['_confidence.png'] = np.rint(found.confidence * 255).astype(np.uint8)
    if outputs.with_overlay:
        painted = overlay(image, found.classes, predictor.palette, outputs.opacity)
        if outputs.with_legend:
            painted = add_legend(painted, entries_of(predictor.classes, predictor.palette, found.classes))
        pictures['_overlay.png'] = painted
    for ending, picture in pictures.items():
        _write(_result(outputs.folder / target, ending), picture)
    return [str(_result(target, ending)) for ending in pictures]


def _write(path: Path, image: np.ndarray) -> None:
    """Write a PNG."""
    data = cv2.imencode('.png', image)[1].tobytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_bytes(data)
    except OSError as error:
        if error.errno in _ALL_FAIL:
            raise OutputError(f'{path} cannot be written ({error.strerror})') from error
        raise


def _remove_parts(target: Path) -> None:
    """Remove what a process that was killed left half-written of a target."""
    for ending in ('.png', '_overlay.png', '_confidence.png'):
        part_of(_result(target, ending)).unlink(missing_ok=True)
