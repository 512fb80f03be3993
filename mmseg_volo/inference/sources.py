"""Find the images and videos of files, folders and glob patterns, and the names of their results."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def find_sources(
    sources: Iterable[str], out_dir: str | None = None, suffixes: Iterable[str] = ()
) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Find the images and the videos of files, folders (with their subfolders) and glob patterns.

    A folder gives its videos only if it has no image. Files below ``out_dir`` are results and no part of a folder.
    Suffixes count in upper and lower case. Files and folders whose names begin with a dot, such as ``._a.jpg`` of
    macOS, are no part of a folder. Links to folders are followed, but no folder is read twice. A name with ``[``, ``*``
    or ``?`` is a pattern only if no such file or folder exists.

    Args:
        sources: files, folders or patterns.
        out_dir: the folder of the results.
        suffixes: of images, in addition to :data:`IMAGE_SUFFIXES`.

    Returns:
        A dict that maps each image to the path of its results, below the output folder and without a suffix: the file
        name, or for a folder the path in it. If two images would get the same path, both keep their own suffix in it.
        A second dict does the same for the videos.

    Raises:
        FileNotFoundError: a source does not exist, or has neither images nor videos.
        FileExistsError: two images would get the same path all the same.
    """
    kinds = {*IMAGE_SUFFIXES, *suffixes}
    results = Path(out_dir).resolve() if out_dir is not None else None
    found: dict[Path, Path] = {}
    for source in sources:
        files = _expand(source, results, kinds)
        if not files:
            raise FileNotFoundError(
                f'{source or "an empty name"}: no image found; expected a file, a folder or a pattern with '
                f'{", ".join(sorted(kinds))}, or videos: {", ".join(VIDEO_SUFFIXES)}'
            )
        found.update(files)
    by_target: dict[tuple, Path] = {}
    for path, target in found.items():  # a file that is reached in two ways is predicted once under each name
        by_target.setdefault((os.path.realpath(path), target), path)
    found = {path: target for (_, target), path in by_target.items()}
    videos = {path: target for path, target in found.items() if _is(path, VIDEO_SUFFIXES)}
    images = {path: target for path, target in found.items() if path not in videos}
    return _targets(images), _targets(videos)


def find_images(sources: Iterable[str]) -> dict[Path, Path]:
    """Find only images; see :func:`find_sources`.

    Raises:
        FileNotFoundError: a source does not exist, or has no image.
    """
    images, videos = find_sources(sources)
    if videos:
        raise FileNotFoundError(f'{next(iter(videos))}: no image found, only videos')
    return images


def _is(path: Path, suffixes: Iterable[str]) -> bool:
    # A link that leads nowhere counts: it is then reported as a file that cannot be read.
    return path.suffix.lower() in suffixes and (path.is_file() or (path.is_symlink() and not path.exists()))


def _expand(source: str, results: Path | None, suffixes: set[str]) -> dict[Path, Path]:
    """Map the files of a source to their paths in the results. A folder gives its images, else its videos."""
    path = Path(source)
    if path.is_file():
        return {path: Path(path.name)}
    if not source:  # such as an unset shell variable
        return {}
    if not path.is_dir():
        matches = sorted(map(Path, _matches(source)))
        return {p: Path(p.name) for p in matches if _is(p, suffixes) or _is(p, VIDEO_SUFFIXES)}
    inside = sorted(_walk(path, None if results == path.resolve() else results))
    videos = {p: p.relative_to(path) for p in inside if _is(p, VIDEO_SUFFIXES)}
    images = {p: p.relative_to(path) for p in inside if _is(p, suffixes)}
    if images and videos:
        number = f'{len(videos)} video{"s" * (len(videos) > 1)}'
        print(f'{source}: skipped {number} beside the images; name videos to predict them', file=sys.stderr)
    return images or videos


def _walk(folder: Path, without: Path | None) -> Iterator[Path]:
    """Yield the files below a folder, also through links, but without a second way to the same folder.

    A folder comes before links to it, so that its files have its own name.
    """
    seen: set[Path] = set()
    waiting = [folder]
    while waiting:
        start = waiting.pop(0)
        for name, folders, files in os.walk(start, onerror=_tell):
            real = Path(os.path.realpath(name))
            if real in seen or (without is not None and without in (real, *real.parents)):
                if real in seen:
                    print(f'{name}: skipped, the folder that it links to was read before', file=sys.stderr)
                folders.clear()
                continue
            seen.add(real)
            visible = [Path(name, one) for one in sorted(folders) if not one.startswith('.')]
            waiting += [one for one in visible if one.is_symlink()]
            folders[:] = [one.name for one in visible if not one.is_symlink()]
            yield from (Path(name, one) for one in files if not one.startswith('.'))


def _tell(error: OSError) -> None:
    print(f'{error.filename}: skipped, the folder cannot be read ({error.strerror})', file=sys.stderr)


def _matches(pattern: str) -> list[str]:
    """The paths that match a glob pattern. Its first folders are taken literally as far as they exist."""
    parts, known = Path(pattern).parts, Path()
    for number, part in enumerate(parts):
        if not os.path.lexists(known / part):
            return glob.glob(os.path.join(glob.escape(str(known)), *parts[number:]), recursive=True)
        known /= part
    return []


def _targets(found: dict[Path, Path]) -> dict[Path, Path]:
    """Take the suffixes off the relative paths where the paths stay different without them."""
    counts = Counter(relative.with_suffix('') for relative in found.values())
    taken: dict[Path, Path] = {}
    for path, relative in found.items():
        target = relative.with_suffix('') if counts[relative.with_suffix('')] == 1 else relative
        if target in taken:
            raise FileExistsError(
                f'{taken[target]} and {path} would have the same name in the output folder ({target}); '
                'predict them into different folders'
            )
        taken[target] = path
    return {path: target for target, path in taken.items()}
