"""Predict files and folders of images and videos; ``tools/predict.py`` is its command line."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from tqdm import tqdm

from ..config_check.building import source_of
from ..errors import ConfigError
from ..utils.ahead import ahead
from ..utils.signals import Stopped, StopSignals
from ..utils.unwrap import bare_dataset
from .manifest import Manifest, identity
from .outputs import (
    IMAGE_ENDINGS,
    SCENE_ENDINGS,
    OutputError,
    Outputs,
    check_folder,
    check_names,
    remove_parts,
    result_of,
    write_image,
)
from .pipeline import LoadedImage, reads_bands
from .pool import Work, share_out
from .predictor import Prediction, Predictor
from .scenes import predict_scene
from .sources import find_sources
from .video import PREPARED_AHEAD, predict_video
from .visualize import add_legend, entries_of, overlay


@dataclass(frozen=True)
class Recipe:
    """The arguments of a :class:`~mmseg_volo.inference.Predictor`, from which worker processes load their own."""

    config: Config
    checkpoint: str
    device: str | None = None
    aug_test: bool = False
    options: dict = field(default_factory=dict)

    def load(self, rank: int | None = None) -> Predictor:
        """Load the predictor. Worker processes pass their ``rank`` and are spread over the GPUs."""
        device = self.device
        if rank is not None and (device or get_device()) == 'cuda' and torch.cuda.device_count():
            device = f'cuda:{rank % torch.cuda.device_count()}'
        return Predictor(self.config, self.checkpoint, device, self.aug_test, **self.options)


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
    """Predict images and videos and write the results. Report and skip files that cannot be read or predicted.

    While the model predicts an image, the next one is read and prepared, and the results of the last one are written.
    A result gets its name when it is complete.

    Args:
        predictor: the model, or a :class:`Recipe` to load it from. With a recipe, the output folder also gets the file
            ``predict.jsonl``, which lists what is done.
        sources: files, folders or glob patterns; see :func:`find_sources`.
        out_dir: the output folder. Each image gets ``NAME.png`` with class ids (8 bit, or 16 bit for more than 256
            classes); with ``with_overlay`` also ``NAME_overlay.png``, the image with the colours of the classes over
            it; if the predictor has the option ``confidence`` also ``NAME_confidence.png``, where 255 means certain.
            If the loader of the config is ``LoadBands``, the results are GeoTIFFs (:mod:`mmseg_volo.inference.scenes`).
            Each video gets only ``NAME_overlay.mp4``, with its sound.
        with_legend: add a legend with the names and colours of the classes that occur below each overlay.
        opacity: weight of the colours in overlays, from 0 to 1.
        video_format: a key of :data:`~mmseg_volo.inference.video.VIDEO_FORMATS`.
        processes: number of processes that share the images; more than one needs a :class:`Recipe`. Videos are
            predicted one by one.
        resume: skip what an earlier run with the same recipe and options did; needs a :class:`Recipe`.

    Returns:
        The files that failed, each with the reason.

    Raises:
        FileNotFoundError, FileExistsError: see :func:`find_sources`; or a result would replace a source.
        ConfigError: ``resume`` finds results of another recipe or other options; or the config or the options let no
            image be predicted.
        OutputError: the disk is full or broken.
        Stopped: by SIGINT or SIGTERM; all results so far are complete.
    """
    outputs = Outputs(Path(out_dir), with_overlay, with_legend, opacity, video_format)
    dataset = bare_dataset((predictor.config.get('test_dataloader') or {}).get('dataset'))
    own = Path(f'x{dataset.get("img_suffix", "")}').suffix.lower()
    images, videos = find_sources(sources, out_dir, filter(None, [own]))
    confident = isinstance(predictor, Recipe) and bool(predictor.options.get('confidence'))
    recipe = predictor if isinstance(predictor, Recipe) else None
    if reads_bands(recipe.config, recipe.aug_test) if recipe else predictor.pipeline.bands:
        if with_overlay and images:
            raise ConfigError(
                'overlay: LoadBands gives GeoTIFFs, whose colour table has the colours of the classes; leave it out, '
                'and lay NAME.tif over the scene in a GIS'
            )
        known, endings = SCENE_ENDINGS, SCENE_ENDINGS[: 1 + confident]
    else:
        known = IMAGE_ENDINGS
        endings = ['.png', *['_overlay.png'] * with_overlay, *['_confidence.png'] * confident]
    check_folder(outputs.folder, {**images, **videos}, known)
    check_names(images, endings)
    manifest = None
    if isinstance(predictor, Recipe):
        same_results = 'window_batch', 'cuda_graph'
        options = {name: value or None for name, value in predictor.options.items() if name not in same_results}
        options.update(overlay=with_overlay, legend=with_legend, opacity=opacity, video_format=video_format)
        made_with = identity(predictor.config, predictor.checkpoint, predictor.aug_test, **options)
        manifest = Manifest(outputs.folder, made_with, resume)
    elif processes > 1 or resume:
        raise TypeError('resume and more than one process need a Recipe in place of a Predictor')
    if resume:
        everything = len(images) + len(videos)
        images = {path: target for path, target in images.items() if not manifest.has(path)}
        videos = {path: target for path, target in videos.items() if not manifest.has(path)}
        todo = len(images) + len(videos)
        print(f'{everything - todo} done before, {todo} to do', file=sys.stderr)
        if not todo:
            return {}
    return _Run(predictor, outputs, manifest, processes).do(images, videos)


class _Run:
    """One run over images, then videos: progress bar, manifest and failures."""

    def __init__(self, predictor: Predictor | Recipe, outputs: Outputs, manifest: Manifest | None, processes: int):
        self._predictor, self._outputs, self._manifest, self._processes = predictor, outputs, manifest, processes
        self._failed: dict[Path, str] = {}
        self._done = 0

    def do(self, images: dict[Path, Path], videos: dict[Path, Path]) -> dict[Path, str]:
        total = len(images) + len(videos)
        try:
            with StopSignals() as stop:
                if images:
                    self._images(images, stop)
                for path, target in videos.items():
                    self._video(path, target, stop)
        except Stopped as stopped:
            hint = '; run the same command with --resume to continue' if self._manifest else ''
            print(f'{stopped}: {self._done} of {total} are done{hint}', file=sys.stderr)
            raise
        except OutputError as error:
            hint = ', then continue with --resume' if self._manifest else ''
            raise OutputError(
                f'{error}; {self._done} of {total} are done: free disk space or repair the disk{hint}'
            ) from error
        return self._failed

    def _load(self) -> Predictor:
        if isinstance(self._predictor, Recipe):
            self._predictor = self._predictor.load()
        return self._predictor

    def _begin(self) -> None:
        """Start the manifest; called after the model is loaded, so that an error there leaves the old manifest."""
        if self._manifest is not None:
            self._manifest.begin()

    def _images(self, images: dict[Path, Path], stop: StopSignals) -> None:
        # The bar goes to stderr, like logs, so that stdout can be piped.
        results = self._results(images, stop)
        with contextlib.closing(results), tqdm(total=len(images), unit='image', file=sys.stderr) as bar:
            for (path, _), files, reason in results:
                self._note(path, files, reason)
                bar.update()

    def _results(self, images: dict[Path, Path], stop: StopSignals) -> Iterator[tuple]:
        """Yield each (image, target), the files written, and the reason if it failed."""
        processes = min(self._processes, len(images))
        if processes > 1:
            start = partial(_start_worker, self._predictor, self._outputs)
            with contextlib.closing(share_out(start, images.items(), processes, stop, self._begin)) as results:
                for task, result, crash in results:
                    if crash:
                        remove_parts(self._outputs.folder / task[1])
                    yield task, *(([], crash) if crash else result)
        else:
            predictor = self._load()
            self._begin()
            with contextlib.closing(_predict_images(predictor, self._outputs, images.items(), stop)) as results:
                for task, result in zip(images.items(), results, strict=True):
                    yield task, *result
            stop.check()

    def _video(self, path: Path, target: Path, stop: StopSignals) -> None:
        outputs = self._outputs
        file = result_of(target, f'_overlay.{outputs.video_format}')
        reason = None
        predictor = self._load()
        self._begin()
        try:
            note = predict_video(predictor, path, outputs.folder / file, outputs.with_legend, outputs.opacity, stop)
            if note:
                tqdm.write(f'{path}: {note}', file=sys.stderr)
        except Exception as error:
            reason = _reason(error)
            if not self._done:
                _ConfigCheck(predictor)(error)
        self._note(path, [str(file)], reason)

    def _note(self, path: Path, files: list[str], reason: str | None) -> None:
        if reason is not None:
            self._failed[path] = reason
            tqdm.write(f'skipped {path}: {reason}', file=sys.stderr)
            return
        self._done += 1
        if self._manifest is not None:
            self._manifest.add(path, files)


def _start_worker(recipe: Recipe, outputs: Outputs, rank: int) -> Work:
    """Load the model in a worker process; return the function that does its tasks."""
    return partial(_predict_images, recipe.load(rank), outputs)


def _predict_images(
    predictor: Predictor, outputs: Outputs, tasks: Iterable[tuple[Path, Path]], stop: StopSignals
) -> Iterator[tuple[list[str], str | None]]:
    """Yield for each (image, target) the files written and None, or no files and why the image failed.

    A thread writes the files of one image while the model predicts the next one. The files of what is yielded are on
    the disk.
    """
    with contextlib.closing(ahead(_load(predictor, tasks))) as images, ThreadPoolExecutor(1) as writer:
        writing: Future | None = None
        check_config, works = _ConfigCheck(predictor), False
        try:
            for target, loaded in images:
                stop.check()
                try:
                    job = _predict(predictor, outputs, target, loaded, stop)
                    works = True
                except Exception as error:
                    job = partial(_outcome, [], _reason(error))
                    if not works:
                        check_config(error)
                if writing is not None:
                    yield writing.result()
                writing = writer.submit(job)
        except Stopped:
            if writing is not None:
                yield writing.result()
            raise
        if writing is not None:
            yield writing.result()


class _ConfigCheck:
    """Raise ConfigError if a plain image fails as a file did: the config or the options are at fault, not the file."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor

    def __call__(self, error: Exception) -> None:
        if self._plain and self._cause(error) == self._cause(self._plain):
            kind, reason = self._cause(error)
            raise ConfigError(
                f'{source_of(self._predictor.config)}no image can be predicted, not even a plain one of 64 x 64: '
                f'{kind.__name__}: {reason}'
            )

    @cached_property
    def _plain(self) -> Exception | None:
        try:
            self._predictor(np.zeros((64, 64, self._predictor.channels), np.uint8))
        except Exception as error:
            return error.with_traceback(None)
        return None

    @staticmethod
    def _cause(error: BaseException) -> tuple[type, str]:
        while error.__cause__ is not None:
            error = error.__cause__
        return type(error), ' '.join(str(error).split())


def _predict(
    predictor: Predictor, outputs: Outputs, target: Path, loaded: tuple | Path | Exception, stop: StopSignals
) -> Callable[[], tuple[list[str], str | None]]:
    """Predict what :func:`_load` yields. The result writes the files, if they are not written yet, and names them."""
    if isinstance(loaded, Exception):
        raise loaded
    if isinstance(loaded, Path):
        return partial(_outcome, predict_scene(predictor, loaded, outputs.folder, target, stop.check), None)
    image, data = loaded
    prediction = predictor.predict(predictor.prepare(image) if data is None else data, stop.check)
    return partial(_save_or_fail, predictor, outputs, target, image, prediction)


def _outcome(files: list[str], reason: str | None) -> tuple[list[str], str | None]:
    return files, reason


def _save_or_fail(*arguments) -> tuple[list[str], str | None]:
    try:
        return _save(*arguments), None
    except Exception as error:
        return [], _reason(error)


def _reason(error: Exception) -> str:
    """Say why one file failed. Raise the errors that end the whole run."""
    if isinstance(error, (Stopped, OutputError)):
        raise error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return 'not enough GPU memory; try --device cpu'
    return str(error) or type(error).__name__


def _load(predictor: Predictor, tasks: Iterable[tuple[Path, Path]]) -> Iterator[tuple[Path, tuple | Path | Exception]]:
    """Yield each target with its image and the prepared data, or with the error; of scenes only with their path.

    Large images are only read: their views would take too much memory beside those of the image being predicted.
    """
    for path, target in tasks:
        if predictor.pipeline.bands:
            yield target, path
            continue
        try:
            image = predictor.read(path)
            loaded = image, predictor.prepare(image) if image.pixels <= PREPARED_AHEAD else None
        except Exception as error:
            loaded = error
        yield target, loaded


def _save(
    predictor: Predictor, outputs: Outputs, target: Path, image: LoadedImage, prediction: Prediction
) -> list[str]:
    """Write the results of one image; return their paths below the output folder."""
    dtype = np.uint8 if len(predictor.classes) <= 256 else np.uint16
    results = {'.png': prediction.classes.astype(dtype)}
    if prediction.confidence is not None:
        results['_confidence.png'] = np.rint(prediction.confidence * 255).astype(np.uint8)
    if outputs.with_overlay:
        painted = overlay(image.shown(), prediction.classes, predictor.palette, outputs.opacity)
        if outputs.with_legend:
            painted = add_legend(painted, entries_of(predictor.classes, predictor.palette, prediction.classes))
        results['_overlay.png'] = painted
    for ending, result in results.items():
        write_image(result_of(outputs.folder / target, ending), result)
    return [str(result_of(target, ending)) for ending in results]
