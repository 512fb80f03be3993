"""Find files that mmseg leaves out of a data set, or reads twice, without a word."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from .listing import Finding, Source, is_image, missing_reason, names_below

_SAME = ({'jpg', 'jpeg', 'jpe', 'jfif'}, {'tif', 'tiff'})  # extensions of one format


def left_out_images(source: Source, sources: Iterable[Source] = ()) -> list[Finding]:
    """Warn of images whose names end in another way than ``img_suffix``, such as ``.JPG``.

    Args:
        source: the data set.
        sources: all data sets of the split; files that one of them uses are not left out.
    """
    used = _used(sources)
    return [
        Finding(
            source.rules.split,
            'left-out image',
            path,
            f'the image is not used, because its name does not end in img_suffix={source.image_suffix!r}',
            f'rename it, or add a second data set with img_suffix={ending!r} (see ConcatDataset)',
            fault=False,
        )
        for path, _, ending in _left_out(source)
        if os.path.normpath(path) not in used
    ]


def _used(sources: Iterable[Source]) -> set[str]:
    return {os.path.normpath(path) for source in sources for pair in source.pairs for path in pair if path}


def _left_out(source: Source) -> Iterator[tuple[str, str, str]]:
    """Yield (path, path without its suffix, suffix) of each image that is left out because of its suffix.

    Its name must end as ``img_suffix`` does, but for upper and lower case and the extension. If the extension is that
    of another format, it must have a label too: folders may hold more than the images of the data set.
    """
    if source.listed or not source.image_suffix:
        return
    name, dot, extension = source.image_suffix.rpartition('.')
    pattern = re.compile(re.escape(name) + r'\.(\w+)$', re.IGNORECASE)
    used = {_stem(image) for image, _ in source.pairs}
    for path in names_below(source.image_dir, folders=False):
        match = pattern.search(path)
        if not match or path.endswith(source.image_suffix) or _stem(path) in used:
            continue
        stem = path[: match.start() + (not dot)]
        kinds = {match[1].lower(), extension.lower()}
        if (
            len(kinds) == 1
            or any(kinds <= same for same in _SAME)
            or (is_image(path) and _has_label(source, path, stem))
        ):
            yield path, stem, path[len(stem) :]


def _has_label(source: Source, image: str, stem: str) -> bool:
    if not source.label_dir or not source.label_suffix:
        return False
    label = os.path.join(source.label_dir, os.path.relpath(stem, source.image_dir) + source.label_suffix)
    return os.path.isfile(label) and not os.path.samefile(label, image)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.normpath(path))[0].lower()


def odd_folders(source: Source) -> list[Finding]:
    """Warn of images in hidden folders, such as ``.ipynb_checkpoints``, and in folders that a link adds again."""
    if source.listed or not source.image_dir:
        return []
    findings, seen = [], {}
    for folder, count in sorted(Counter(os.path.dirname(image) for image, _ in source.pairs).items()):
        first = seen.setdefault(os.path.realpath(folder), folder)
        parts = os.path.relpath(folder, source.image_dir).split(os.sep)
        if first != folder:
            kind, problem = 'folder read twice', f'a link makes it the same folder as {first}'
            remedy = f'remove the link, if its {count} images should not count twice'
        elif parts[0] != '..' and any(part.startswith('.') and part != '.' for part in parts):
            kind, problem = 'hidden folder', f'the images in this hidden folder ({count}) are used'
            remedy = 'move it out of the data set, if that is not intended'
        else:
            continue
        findings.append(Finding(source.rules.split, kind, folder, problem, remedy, fault=False))
    return findings


def left_over_files(source: Source, sources: Iterable[Source] = ()) -> list[Finding]:
    """Find image names that are not files, and warn of labels without an image; arguments as left_out_images."""
    if source.listed or not source.image_suffix:
        return []
    split, known = source.rules.split, _used([source, *sources])
    findings = []
    for path in _named(source.image_dir, source.image_suffix):
        if path not in known and not os.path.isfile(path):
            problem = missing_reason(path, 'image')
            findings.append(Finding(split, 'missing image', path, problem, 'restore the image or remove the name'))
    # Other findings name the labels of images that are left out, or whose name differs by upper and lower case.
    images = [image.removesuffix(source.image_suffix) for image, _ in source.pairs]
    images += [stem for _, stem, _ in _left_out(source)]
    stems = {os.path.relpath(stem, source.image_dir).lower() for stem in images}
    for path in _named(source.label_dir, source.label_suffix):
        stem = os.path.relpath(path.removesuffix(source.label_suffix), source.label_dir).lower()
        if path not in known and stem not in stems and os.path.isfile(path):
            problem, remedy = 'the label is not used, because it has no image', 'add the image, if there is one'
            findings.append(Finding(split, 'label without image', path, problem, remedy, fault=False))
    return findings


def _named(folder: str, suffix: str) -> list[str]:
    if not folder or not suffix:
        return []
    return sorted(os.path.normpath(path) for path in names_below(folder) if path.endswith(suffix))
