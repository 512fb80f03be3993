"""Save the predictions of a test as PNG files: class ids, or overlays."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path, PurePosixPath

from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.registry import HOOKS, METRICS

from ..config_check.lookup import accepted
from ..datasets.loading import without_labels
from ..errors import ConfigError, DataError
from ..utils.unwrap import bare_datasets, class_of
from .metric import ConfusionIoUMetric, write_ids


@HOOKS.register_module()
class PredictionFilesHook(Hook):
    """Saves the predictions of a test as PNG files of class ids: 8 bits, or 16 bits if an id can be above 255.

    :func:`file_names` gives the names. As in mmseg, the ids start at 1 if the data set has ``reduce_zero_label``. Each
    rank saves its own predictions.

    Args:
        out_dir: the folder; it is created where it is missing.

    Raises:
        DataError: two images would get the same name, which is noticed before the test begins; or the model predicts
            no class ids.
    """

    def __init__(self, out_dir: str):
        self.out_dir = Path(out_dir)

    def before_test_epoch(self, runner: Runner) -> None:
        """Choose the names of all files, and create the folder."""
        dataset = runner.test_loop.dataloader.dataset
        infos = map(dataset.get_data_info, range(len(dataset))) if hasattr(dataset, 'get_data_info') else ()
        self._names = file_names(info['img_path'] for info in infos if 'img_path' in info)
        self._classes = len(getattr(dataset, 'metainfo', {}).get('classes') or ())
        self.out_dir.mkdir(parents=True, exist_ok=True)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save the predictions of a batch."""
        for sample in outputs:
            if 'pred_sem_seg' not in sample:
                raise DataError(f'--out: {type(runner.model).__name__} predicts no class ids (pred_sem_seg)')
            name = self._names.get(sample.img_path) or f'{Path(sample.img_path).stem}.png'
            reduced = sample.get('reduce_zero_label', False)
            write_ids(self.out_dir / name, sample.pred_sem_seg.data, self._classes, reduced)


def file_names(images: Iterable[str]) -> dict[str, str]:
    """Map the path of each image to the path of its PNG below the output folder.

    If no two images have the same name, these are the names, as in mmseg. Otherwise the files lie in folders, as the
    images do below their common folder, and images that differ only in their suffix keep it: ``a.jpg.png``.

    Raises:
        DataError: two images would get the same name all the same.
    """
    images = list(dict.fromkeys(images))
    paths = [PurePosixPath(image if '://' in image else os.path.abspath(image)) for image in images]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        levels = zip(*(path.parent.parts for path in paths), strict=False)
        common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
        paths = [PurePosixPath(*path.parts[common:]) for path in paths]
        counts = Counter(path.with_suffix('') for path in paths)
        names = [str(path if counts[path.with_suffix('')] > 1 else path.with_suffix('')) for path in paths]
    taken: dict[str, str] = {}
    for image, name in zip(images, names, strict=True):
        if (other := taken.setdefault(name, image)) != image:
            raise DataError(f'{other} and {image} would both be saved as {name}.png; rename one of them')
    return {image: f'{name}.png' for name, image in taken.items()}


def save_predictions(config: Config, out_dir: str | None = None) -> None:
    """Make a test save its predictions in ``out_dir``, whatever metrics it has.

    :class:`PredictionFilesHook` saves class ids. IoUMetric would write 8 bits, and one file for all images of the same
    name. Without an IoUMetric, a metric with a format of its own, such as CityscapesMetric, saves the predictions.

    Args:
        config: changed in place.
        out_dir: by default the ``output_dir`` of the first IoUMetric; if that is not set either, nothing is saved.

    Raises:
        ConfigError: an IoUMetric has ``format_only``, and there is no folder.
    """
    metrics = _metrics(config)
    kinds = [class_of(metric, METRICS) for metric in metrics]
    plain = IoUMetric.process, ConfusionIoUMetric.process
    counting = [m for m, kind in zip(metrics, kinds, strict=True) if getattr(kind, 'process', None) in plain]
    if out_dir is not None and not counting:
        for metric, kind in zip(metrics, kinds, strict=True):
            if 'output_dir' in (takes := accepted(kind)[0]):
                metric.update(output_dir=out_dir, **dict(keep_results=True) if 'keep_results' in takes else {})
                return
    folders = [metric.pop('output_dir', None) for metric in counting]
    folder = out_dir or next(filter(None, folders), None)
    unused = [metric for metric in counting if metric.get('format_only')]  # the hook does all that they do
    if folder is None and unused:
        raise ConfigError(
            'test_evaluator has format_only, which saves predictions without an evaluation, but no folder for them; '
            'give --out DIR, or set output_dir beside format_only'
        )
    if folder is not None:
        kept = [metric for metric in metrics if not any(metric is one for one in unused)]
        whole = config.get('test_evaluator')
        if isinstance(whole, Mapping) and 'metrics' in whole:
            whole['metrics'] = kept
        else:
            config.test_evaluator = kept
        hook = dict(type='PredictionFilesHook', out_dir=str(folder))
        config.custom_hooks = [*(config.get('custom_hooks') or []), hook]


def leave_out_labels(config: Config) -> None:
    """Make a test read no labels if all its metrics have ``format_only``, so that the data needs none.

    Call it before :func:`save_predictions` and after ``use_tta``.
    """
    metrics = [m for m in _metrics(config) if class_of(m, METRICS) is not DumpResults]
    if metrics and all(metric.get('format_only') for metric in metrics):
        for dataset in bare_datasets((config.get('test_dataloader') or {}).get('dataset')):
            dataset['pipeline'] = without_labels(dataset.get('pipeline') or [])


def save_overlays(config: Config, folder: str) -> None:
    """Make a test save each image with the colours of ground truth and prediction in ``folder``.

    The first hook that draws does it, whatever its name, or a new SegVisualizationHook.

    Args:
        config: changed in place.
        folder: created where it is missing.
    """
    defaults = config.get('default_hooks') or {}
    hooks = [hook for hook in [*defaults.values(), *(config.get('custom_hooks') or [])] if isinstance(hook, Mapping)]
    drawing = next((hook for hook in hooks if 'draw' in accepted(class_of(hook, HOOKS))[0]), None)
    if drawing is None:
        hook = dict(type='SegVisualizationHook', draw=True, interval=1)
        config.default_hooks = {**defaults, 'visualization': hook}
    else:
        drawing.update(draw=True, interval=1)
    visualizer = config.get('visualizer') or dict(type='SegLocalVisualizer')
    backends = list(visualizer.get('vis_backends') or [])
    if not any(str(one.get('type')).rpartition('.')[2] == 'LocalVisBackend' for one in backends):
        backends.append(dict(type='LocalVisBackend'))
    config.visualizer = {**visualizer, 'vis_backends': backends, 'save_dir': folder}


def _metrics(config: Config) -> list[Mapping]:
    """The configs of the metrics in ``test_evaluator``: one, a list, or an Evaluator's ``metrics``."""
    found = config.get('test_evaluator') or []
    if isinstance(found, Mapping):
        found = found.get('metrics', found)
    return [found] if isinstance(found, Mapping) else [one for one in found if isinstance(one, Mapping)]
