"""Figures of all measurements."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np

# Of each panel, by its axis label: values of each series, one for each row of the figure.
Panels = dict[str, dict[str, Sequence[float | None]]]


def bars(
    path: Path, rows: Sequence[dict], labels: Sequence[str], panels: Panels, limit: tuple[str, float] | None = None
) -> None:
    """Horizontal bars, a group for each label and a bar for each series; panels without values are left out.

    Args:
        path: of the figure.
        rows: of the table, for the machine in the title.
        labels: of the groups.
        panels: what they show.
        limit: label and value of a line in the last panel.
    """
    panels = {title: {name: values for name, values in series.items() if any(map(_known, values))}
              for title, series in panels.items()}  # fmt: skip
    panels = {title: series for title, series in panels.items() if series}
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    figure, axes = _figure(len(panels), rows, 1.6 + 0.3 * max(len(names), 2) * len(labels))
    places, height = np.arange(len(labels)), 0.8 / len(names)
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        for name, values in series.items():
            i = names.index(name)
            lengths = [value if _known(value) else 0 for value in values]
            axis.barh(places + height * (i - (len(names) - 1) / 2), lengths, height, label=name, color=f'C{i}')
        axis.set(xlabel=title, yticks=places, yticklabels=labels if axis is axes[0] else [''] * len(labels))
        axis.invert_yaxis()
    if limit:
        axes[-1].axvline(limit[1], color='k', linestyle='--', label=limit[0])
    axes[-1].legend()
    figure.savefig(path, dpi=120)


def growth(
    path: Path, rows: Sequence[dict], groups: dict[str, Sequence[dict]], slopes: dict[str, float], memory: str
) -> None:
    """Seconds and memory against megapixels: a series for each group, and the line of seconds through 0."""
    figure, (left, right) = _figure(2, rows, 4)
    for i, (name, group) in enumerate(groups.items()):
        x = [row['megapixels'] for row in group]
        left.plot(x, [row['seconds'] for row in group], 'o', color=f'C{i}', label=name)
        line = f'{slopes[name]:.3g} s per megapixel'
        left.plot([0, max(x)], [0, slopes[name] * max(x)], color=f'C{i}', label=line)
        known = [row for row in group if _known(row[memory])]
        right.plot(
            [row['megapixels'] for row in known], [row[memory] for row in known], 'o-', color=f'C{i}', label=name
        )
    right.plot(x, [row['data_mb'] for row in group], 'k--', label='the image and its classes')
    left.set(xlabel='megapixels', ylabel='seconds', xlim=(0, None), ylim=(0, None))
    right.set(xlabel='megapixels', ylabel='peak memory (MB)', xlim=(0, None), ylim=(0, None))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


def accuracy(path: Path, rows: Sequence[dict], groups: dict[str, Sequence[dict]]) -> None:
    """Published mIoU against images a second, a panel for each group; a line if the mIoU is not known."""
    figure, axes = _figure(len(groups), rows, 4)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        for i, row in enumerate(group):
            if row['ade20k_miou'] is None:
                axis.axvline(row['images_per_s'], color=f'C{i}', linestyle='--', label=row['model'])
            else:
                axis.plot(row['images_per_s'], row['ade20k_miou'], 'o', color=f'C{i}', label=row['model'])
        axis.set(title=title, xlabel='images / s', xlim=(0, None), ylabel='published ADE20K mIoU, one scale')
        axis.legend()
    figure.savefig(path, dpi=120)


def _known(value: float | None) -> bool:
    return value is not None and isfinite(value)


def _figure(panels: int, rows: Sequence[dict], height: float):
    """A figure and its axes, side by side."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure((5 * panels + 1, height), layout='constrained')
    figure.suptitle(f'{rows[0]["device_name"]}, PyTorch {rows[0]["torch"]}', fontsize=9)
    return figure, figure.subplots(1, panels, squeeze=False)[0]
