"""Check that a data set can be used: every file exists, is complete, and is labelled as the config says.

Labels are read as mmseg's ``LoadAnnotations`` reads them. If a data set is read in another way (custom transforms,
files on a server, other keys), the check covers what it knows, and the log says what was skipped.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmseg.registry import DATASETS
from torch.utils.data import Dataset
from tqdm import tqdm

from ...errors import DataError
from ...utils.opencv import quiet_opencv
from ..loading import check_loaders
from .bands import Statistics, misfits, odd_files
from .images import init_checker
from .labels import label_table
from .listing import Finding, Source, find_sources, missing_files, present_files
from .pair import PairResult, check_pair, faults_of_all, shifted_labels
from .unused import left_out_images, left_over_files, odd_folders

_NAMED = 5  # findings that an error message lists
_UNSEEN = 'the model cannot learn it: add images that show it, or remove the class'


@dataclass
class SplitReport:
    """Findings and statistics of one split.

    Attributes:
        classes: class names, empty if the data set has none.
        files, labels: number of images, and of labels that were read.
        pixels, images: (N,) int64, for each class its pixels and the images in which it occurs.
        ignored: number of ignored pixels.
        digests: hash of an image file's bytes to its path.
        left_out: what was not checked, and why.
        statistics: of all channels, if LoadBands reads the images.
        measured: number of images that have them.
    """

    split: str
    classes: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    labels: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    images: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ignored: int = 0
    digests: dict[bytes, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    statistics: Statistics | None = None
    measured: int = 0
    image_dir: str = ''

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.fault]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.fault]


def build_checked(dataset_cfg: Mapping, check: Callable[[Mapping, Dataset], None]) -> Dataset:
    """Build a data set, and check the files that it lists.

    Args:
        dataset_cfg: config of the data set, with wrappers such as ``ConcatDataset``.
        check: :func:`check_not_empty` or :func:`quick_check`.

    Raises:
        DataError: ``check`` raised it, or a folder is missing or empty.
        ValueError: the arguments of a loader of images let it read no file.
    """
    try:
        dataset = DATASETS.build(dataset_cfg)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
    except Exception:
        check_not_empty(dataset_cfg)  # raises a clearer error if a folder is missing or empty
        raise
    check_loaders(dataset)
    check(dataset_cfg, dataset)
    return dataset


def check_not_empty(dataset_cfg: Mapping, dataset: Dataset | None = None) -> None:
    """Raise DataError if a data set has no files. The error names the folder and the expected suffix.

    Args:
        dataset_cfg: config of the data set, with wrappers such as ``ConcatDataset``.
        dataset: the data set, if it is built already.
    """
    _raise(chain.from_iterable(source.findings for source in find_sources(dataset_cfg, '', _log, built=dataset)))


def quick_check(dataset_cfg: Mapping, dataset: Dataset | None = None, num_files: int = 32) -> None:
    """Raise DataError if training or validation on a data set would fail or be silently wrong.

    The check looks for all files, and reads an evenly spaced sample of them. It takes a second or two. The log has its
    warnings.

    Args:
        dataset_cfg: config of the data set, with wrappers such as ``ConcatDataset``. A data set with unknown
            transforms, keys or file server passes, and the log says so.
        dataset: the data set, if it is built already: its files are not listed again.
        num_files: size of the sample.
    """
    sources = find_sources(dataset_cfg, '', _log, built=dataset)
    for source in sources:
        _raise(source.findings + missing_files(source))
        count = min(len(source.pairs), max(1, num_files // len(sources)))
        sample = [source.pairs[i] for i in np.linspace(0, len(source.pairs) - 1, count).astype(int)]
        # Of names with a dot in front, which a list may hold, many are no images.
        hidden = [pair for pair in source.pairs if os.path.basename(pair[0]).startswith('.')]
        sample = list(dict.fromkeys(sample + hidden))
        with quiet_opencv(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
            results = list(pool.map(partial(check_pair, rules=source.rules), sample))
        found = list(chain.from_iterable(result.findings for result in results))
        infos = {result.pair[0]: result.bands for result in results if result.bands}
        found += odd_files(source.rules.split, infos, source.rules.bands and source.rules.bands[0])
        _raise(found)
        _warn(left_out_images(source, sources) + odd_folders(source) + found)
        rest = iter(set(source.pairs) - set(sample))
        # If the sample looks wrong as a whole, read more files until one shows that it is not.
        while found := faults_of_all(source, results):
            if (pair := next(rest, None)) is None:
                _raise(found)
            results = [check_pair(pair, source.rules)]
            _raise(results[0].findings)


def _raise(findings: Iterable[Finding]) -> None:
    faults = [finding for finding in findings if finding.fault]
    if len(faults) == 1:
        raise DataError(str(faults[0]))
    if faults:
        more = f'\n  and {len(faults) - _NAMED} more' if len(faults) > _NAMED else ''
        shown = ''.join(f'\n  {finding}' for finding in faults[:_NAMED])
        raise DataError(
            f'{len(faults)} files are missing or wrong (tools/check_data.py CONFIG checks all files):{shown}{more}'
        )


def _warn(findings: Iterable[Finding]) -> None:
    """Log one line for each kind of warning, with the first file."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    for kind, group in kinds.items():
        more = f' (1 of {len(group)})' if len(group) > 1 else ''
        _log(f'{kind}{more}: {group[0]}', logging.WARNING)


def _log(reason: str, level: int = logging.INFO) -> None:
    print_log(f'Data check: {reason}', logger='current', level=level)


def check_split(split: str, dataset_cfg: Mapping, workers: int | None = None) -> SplitReport:
    """Check all files of a data set.

    Args:
        split: name of the split in the report.
        dataset_cfg: config of the data set, with wrappers such as ``ConcatDataset``.
        workers: number of processes; by default one per CPU.

    Raises:
        DataError: a worker process died.
    """
    report = SplitReport(split)
    sources = find_sources(dataset_cfg, split, report.left_out.append, draw=True)
    for source in sources:
        results = _run(source, workers)
        report.classes = report.classes or source.names
        report.files += len(source.pairs)
        report.digests.update((result.digest, result.pair[0]) for result in results if result.digest)
        _count(report, source, results)
        report.findings += _measure(report, source, results)
        common = faults_of_all(source, results) or shifted_labels(source, results)
        replaced = {finding.kind for finding in common}
        single = [finding for result in results for finding in result.findings if finding.kind not in replaced]
        report.findings += source.findings + missing_files(source) + left_over_files(source, sources) + single
        report.findings += common + left_out_images(source, sources) + odd_folders(source)
        for files, reader in (('images', source.rules.image or source.rules.bands), ('labels', source.rules.label)):
            if reader is None:
                report.left_out.append(f'the content of {files}: an unknown transform reads them')
    return report


def _run(source: Source, workers: int | None) -> list[PairResult]:
    """Check the pairs whose files exist."""
    present = present_files(path for pair in source.pairs for path in pair if path is not None)
    pairs = []
    for image, label in source.pairs:
        if image in present:
            pairs.append((image, label if label in present else None))
    if not pairs:
        return []
    workers = min(workers or os.cpu_count() or 1, len(pairs))
    pool = ProcessPoolExecutor(workers, initializer=init_checker)
    try:
        results = pool.map(partial(check_pair, rules=source.rules), pairs, chunksize=min(16, -(-len(pairs) // workers)))
        return list(tqdm(results, total=len(pairs), unit='file', desc=source.rules.split))
    except BrokenProcessPool as error:
        raise DataError('a worker process was killed (out of memory?); run again with --workers 1') from error
    finally:
        pool.shutdown(cancel_futures=True)


def _count(report: SplitReport, source: Source, results: Sequence[PairResult]) -> None:
    """Add to the report the pixels of each class and the images in which it occurs."""
    if source.rules.classes is None:
        return
    table = label_table(source.rules.reduce_zero_label, source.rules.label_map)
    ignored = table == source.rules.ignore_index
    if not len(report.pixels):
        report.pixels, report.images = np.zeros((2, source.rules.classes), np.int64)
    for result in results:
        if result.values is not None:
            counts = np.zeros(max(256, len(report.pixels)), np.int64)
            np.add.at(counts, table[~ignored], result.values[~ignored])
            report.labels += 1
            report.ignored += int(result.values[ignored].sum())
            report.pixels += counts[: len(report.pixels)]
            report.images += counts[: len(report.pixels)] > 0


def _measure(report: SplitReport, source: Source, results: Sequence[PairResult]) -> list[Finding]:
    """Add the statistics of the channels to the report; return what is odd about the files' bands."""
    infos = {result.pair[0]: result.bands for result in results if result.bands}
    found = odd_files(source.rules.split, infos, source.rules.bands and source.rules.bands[0])
    report.image_dir = report.image_dir or source.image_dir
    counts = Counter(len(info.statistics.count) for info in infos.values())
    for info in infos.values():
        usual = counts.most_common(1)[0][0] if report.statistics is None else len(report.statistics.count)
        if len(info.statistics.count) == usual:
            report.statistics = info.statistics if report.statistics is None else report.statistics + info.statistics
            report.measured += 1
    return found


def check_config(config: Config, splits: Sequence[str] | None = None, workers: int | None = None) -> list[SplitReport]:
    """Check each data set of a config, and look for images that two splits share.

    Args:
        config: a config with ``train_dataloader``, ``val_dataloader`` or ``test_dataloader``.
        splits: some of 'train', 'val', 'test'; by default all in the config, without test if it equals val.
        workers: number of processes; by default one per CPU.

    Raises:
        DataError: the config has no dataloader for a split, or a worker process died.
    """
    cfgs = {}
    for split in splits or ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if loader is not None:
            cfgs[split] = loader['dataset']
        elif splits:
            raise DataError(f'the config has no {split}_dataloader; leave out --split {split}')
    if splits is None and 'test' in cfgs and _same(cfgs['test'], cfgs.get('val')):
        del cfgs['test']
    reports = [check_split(split, cfg, workers) for split, cfg in cfgs.items()]
    for report in reports:
        if report.statistics is not None:
            where, trained = report.image_dir, report.split == 'train'
            report.findings += misfits(report.split, config, where, report.statistics, trained)
    for i, report in enumerate(reports):
        for other in reports[:i]:
            if not _same(cfgs[report.split], cfgs[other.split]):
                report.findings += _shared(report, other)
        if report.split == 'train' and report.labels:
            report.findings += [
                Finding('train', 'absent class', name, 'no training label holds this class', _UNSEEN, fault=False)
                for name, pixels in zip(report.classes, report.pixels, strict=False)
                if not pixels
            ]
    return reports


def _same(cfg: Mapping, other: Mapping | None) -> bool:
    """Whether two configs describe the same files; their pipelines may differ."""
    return other is not None and {**cfg, 'pipeline': None} == {**other, 'pipeline': None}


def _shared(report: SplitReport, other: SplitReport) -> list[Finding]:
    remedy = f'take it out of {report.split} or of {other.split}'
    return [
        Finding(report.split, 'duplicate', path, f'the same image is in {other.split}: {other.digests[digest]}', remedy)
        for digest, path in report.digests.items()
        if digest in other.digests
    ]
