"""Plots as inline SVG: drawn by matplotlib, coloured by CSS variables of the page, with a description and a table."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Placeholders that _svg replaces by CSS variables of the page, so that one drawing fits light and dark mode.
_FG, _GRID = '#010203', '#040506'
_SERIES = [f'#07080{i}' for i in range(8)]
_VARIABLES = {_FG: 'var(--fg)', _GRID: 'var(--grid)', **{one: f'var(--s{i})' for i, one in enumerate(_SERIES)}}
_DASHES = ['-', '--', ':', '-.', (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)), (0, (4, 1))]
_MARKERS = ['o', 's', '^', 'D', 'v', 'P', 'X', '*']
_STYLE = {
    'svg.fonttype': 'none',
    'text.parse_math': False,  # names may have $ in them
    'font.family': 'DejaVu Sans',
    'font.size': 9,
    'text.color': _FG,
    'axes.edgecolor': _FG,
    'axes.labelcolor': _FG,
    'xtick.color': _FG,
    'ytick.color': _FG,
    'grid.color': _GRID,
    'grid.linewidth': 0.6,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.frameon': False,
    'legend.fontsize': 8,
}
_SIZE = 3.6, 2.5  # inches at 100 px, which fit on a phone
_POINTS = 300  # points of a curve, at most
_ROWS = 25  # rows of its table, at most
_NUMBERS = count()  # make the ids of all figures on a page different


@dataclass
class Figure:
    """A drawing with its description (``label``) and its table (``header``, ``rows``)."""

    title: str
    svg: Markup
    label: str
    header: list[str]
    rows: list[list[str]]
    note: str = ''


class Series:
    """One curve: (iteration, value) pairs, NaN included."""

    def __init__(self, name: str, points: Sequence[tuple[float, float]]):
        self.name = name
        self.x, self.y = np.array(points, float).reshape(-1, 2).T


def curves(title: str, unit: str, series: Sequence[Series], best: str, log: bool = False) -> Figure | None:
    """Draw values over iterations, one line per series.

    Args:
        title, unit: of the figure.
        series: empty ones are left out.
        best: 'least' or 'greatest', the value that the description names.
        log: use a logarithmic scale if the values differ by a factor of more than 100.

    Returns:
        None without any point. Single points are described but not drawn.
    """
    series = [one for one in series if len(one.x)]
    if not series:
        return None
    words = [_in_words(one, best, len(series) > 1) for one in series]
    header, rows = _table(unit, series)
    note = ' '.join(filter(None, map(_gaps, series)))
    if not any(np.isfinite(one.y).any() for one in series):
        return Figure(title, Markup(), f'{title}: no value is finite.', header, rows, f'No value is finite. {note}')
    if all(len(one.x) == 1 for one in series):
        return Figure(title, Markup(), '', header, [] if len(series) == 1 else rows, ' '.join(words))
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(_SIZE, layout='constrained')
        axes = canvas.subplots()
        for i, one in enumerate(series):
            x, y = _thinned(one.x, one.y)
            # Markers and dashes distinguish runs without colours.
            axes.plot(
                x,
                y,
                color=_SERIES[i % 8],
                linestyle=_DASHES[i % 8],
                linewidth=max(2.2 - 0.6 * i, 1.2),  # keep equal curves visible
                marker=_MARKERS[i % 8],
                markersize=max(6 - 1.5 * i, 3) if len(series) > 1 else 4,
                markevery=max(len(x) // 8, 1) if len(x) > 12 else 1,
                label=_short(one.name, 28),
            )
        values = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
        if log and values.min() > 0 and values.max() / values.min() > 100:
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel='iteration', ylabel=unit, xlim=(0, 1.03 * max(max(one.x) for one in series)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        if len(series) > 1:
            canvas.legend(loc='outside upper left', ncols=1)
            canvas.set_figheight(_SIZE[1] + 0.18 * len(series))
        return Figure(title, _svg(canvas), f'{title}. {" ".join(words)}', header, rows, note)


def reliability(name: str, calibration: dict) -> Figure:
    """Draw accuracy over confidence, with the diagonal of a calibrated model, above bars of the share of pixels."""
    bins = [one for one in calibration['bins'] if one['pixels']]
    total = sum(one['pixels'] for one in bins)
    ece, step = calibration['ece'], calibration.get('step', 1)
    of = 'all labelled pixels' if step == 1 else f'one labelled pixel in {step**2}, on a regular grid'
    gap = sum((one['confidence'] - one['accuracy']) * one['pixels'] for one in bins) / max(total, 1)
    verdict = 'overconfident' if gap > 0 else 'underconfident'
    if abs(gap) < 0.005:
        verdict = 'neither overconfident nor underconfident on average'
    label = (
        f'Reliability diagram of {name}: expected calibration error {ece:.3f} on {total:,} pixels; mean confidence '
        f'minus accuracy {gap:+.3f}, so the model is {verdict}.'
    )
    cells = '{low:.2f} to {high:.2f}', '{pixels:,}', '{confidence:.3f}', '{accuracy:.3f}'
    rows = [[cell.format(**one) for cell in cells] for one in bins]
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas((3.6, 3.6), layout='constrained')
        top, bottom = canvas.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        top.plot([0, 1], [0, 1], color=_FG, linestyle='--', linewidth=1, label='calibrated')
        confidence, accuracy = ([one[key] for one in bins] for key in ('confidence', 'accuracy'))
        top.vlines(confidence, confidence, accuracy, color=_SERIES[1], linewidth=3, alpha=0.5)
        top.plot(confidence, accuracy, color=_SERIES[0], marker='o', markersize=4, linewidth=1.6, label='model')
        top.set(ylabel='accuracy', xlim=(0, 1), ylim=(0, 1.02))
        top.legend(loc='upper left')
        middles = [(one['low'] + one['high']) / 2 for one in bins]
        width = bins[0]['high'] - bins[0]['low'] if bins else 0.05
        bottom.bar(
            middles, [100 * one['pixels'] / max(total, 1) for one in bins], 0.9 * width, color=_SERIES[0], alpha=0.8
        )
        bottom.set(xlabel='confidence', ylabel='% of pixels')
        return Figure(
            f'Reliability of {name}',
            _svg(canvas),
            label,
            ['Confidence', 'Pixels', 'Mean confidence', 'Accuracy'],
            rows,
            f'Expected calibration error {ece:.3f}, measured on {of}. The model is {verdict}.',
        )


class Confusion(NamedTuple):
    """Pixels of one class that were predicted as another, and their share of the class."""

    truth: str
    predicted: str
    pixels: int
    share: float

    def __str__(self) -> str:
        return f'{self.truth} taken for {self.predicted}: {self.pixels:,} pixels, {self.share:.1%} of {self.truth}.'


def confusions(classes: Sequence[str], confusion: np.ndarray, most: int) -> list[Confusion]:
    """Return the ``most`` largest confusions of a confusion matrix (C, C), by pixels."""
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind='stable')[:most]
    return [
        Confusion(classes[row], classes[column], int(wrong[row, column]), wrong[row, column] / confusion[row].sum())
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]


def heat_map(name: str, classes: Sequence[str], confusion: np.ndarray, confused: Sequence[Confusion]) -> Figure:
    """Draw a confusion matrix (C, C), each row as shares of its true class."""
    total = confusion.sum(1, keepdims=True)
    shares = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    few = len(classes) <= 25
    cell, font = (0.27, 7.5) if few else (0.13, 7)
    with matplotlib.rc_context({**_STYLE, 'font.size': font, 'axes.grid': False}):
        margin = 0.085 * min(max(map(len, classes)), 22) * font / 9 + 0.32
        side, after = cell * len(classes), 0.1 if few else margin
        whole = margin + side + after
        canvas = Canvas((whole, whole))
        axes = canvas.add_axes((margin / whole, after / whole, side / whole, side / whole))
        colours = np.zeros((*shares.shape, 4))
        colours[..., :3] = to_rgb('#2563c4')
        colours[..., 3] = shares**0.6  # transparent in place of white, for light and dark mode
        axes.imshow(colours, interpolation='none', aspect='equal')  # 'none' leaves the scaling to the browser
        ticks, names = range(len(classes)), [_short(one, 22) for one in classes]
        axes.set_xticks(ticks, names, rotation=90)
        axes.set_yticks(ticks, names)
        # Large matrices are scrolled and have names on all sides.
        axes.tick_params(length=0, labeltop=True, labelbottom=not few, labelright=not few)
        axes.set_xlabel('predicted', fontweight='bold')
        axes.xaxis.set_label_position('top')
        axes.set_ylabel('ground truth', fontweight='bold')
        if few:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    colour = '#ffffff' if share > 0.45 else _FG
                    axes.text(column, row, f'{100 * share:.0f}', ha='center', va='center', color=colour, fontsize=7)
        else:
            edges, end = np.arange(1, len(classes)) - 0.5, len(classes) - 0.5
            axes.vlines(edges, -0.5, end, color=_GRID, linewidth=0.3)
            axes.hlines(edges, -0.5, end, color=_GRID, linewidth=0.3)
        svg = _svg(canvas)
    label = f'Confusion matrix of {name}, rows ground truth, columns prediction, in percent of the true class. '
    label += f'Largest confusions: {" ".join(map(str, confused[:5]))}' if confused else 'No pixel is confused.'
    title = f'Confusion matrix of {name}'
    if few:
        rows = [
            [one, *(f'{100 * share:.1f}' if pixels else '–' for share in row)]
            for one, row, pixels in zip(classes, shares, total[:, 0], strict=True)
        ]
        return Figure(title, svg, label, ['Ground truth \\ predicted', *classes], rows)
    rows = [[one.truth, one.predicted, f'{one.pixels:,}', f'{100 * one.share:.1f}'] for one in confused]
    note = f'The table has the {len(rows)} largest confusions.'
    return Figure(title, svg, label, ['Ground truth', 'Predicted', 'Pixels', '% of the true class'], rows, note)


def _svg(canvas: Canvas) -> Markup:
    """Return the drawing as an element of the page, without header, metadata and namespaces, and with unique ids."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # about characters that matplotlib's font lacks; the browser has other fonts
        warnings.simplefilter('ignore')
        canvas.savefig(buffer, format='svg', transparent=True, metadata=dict(Date=None, Creator=None))
    text = buffer.getvalue()
    text = text[text.index('<svg') :]
    text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', '', text)
    prefix = f'f{next(_NUMBERS)}-'
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(href="#|url\(#)', rf'\g<1>{prefix}', text)
    text = re.sub(r'font-family: [^;"]*', 'font-family: system-ui, sans-serif', text)
    text = re.sub(r'(font: [^;"]*px) [^;"]*', r'\1 system-ui, sans-serif', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    width, height = (round(100 * inches) for inches in canvas.get_size_inches())
    text = re.sub(
        r'<svg[^>]*>', f'<svg viewBox="0 0 {0.72 * width:g} {0.72 * height:g}" width="{width}">', text, count=1
    )
    return Markup(text)  # matplotlib has escaped it


def _in_words(one: Series, best: str, named: bool) -> str:
    finite = np.isfinite(one.y)
    start = f'{one.name}: ' if named else ''
    if not finite.any():
        return f'{start}no value is finite.'
    x, y = one.x[finite], one.y[finite]
    text = f'{start}{number(y[0])} at iteration {x[0]:,.0f}'
    if len(x) > 1:
        at = int(np.argmin(y) if best == 'least' else np.argmax(y))
        text += f', {number(y[-1])} at iteration {x[-1]:,.0f}, {best} {number(y[at])} at iteration {x[at]:,.0f}'
    return f'{text}.'


def _gaps(one: Series) -> str:
    missing = one.x[~np.isfinite(one.y)]
    if not len(missing):
        return ''
    shown = ', '.join(f'{x:,.0f}' for x in missing[:5]) + (', …' if len(missing) > 5 else '')
    return f'{one.name}: not finite at {len(missing)} of {len(one.x)} logged iterations ({shown}).'


def _table(unit: str, series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    steps = np.unique(np.concatenate([one.x for one in series]))
    if len(steps) > _ROWS:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, _ROWS).round().astype(int))]
    found = [dict(zip(one.x, one.y, strict=True)) for one in series]
    names = [unit] if len(series) == 1 else [one.name for one in series]
    rows = [[f'{x:,.0f}', *(number(values[x]) if x in values else '' for values in found)] for x in steps]
    return ['Iteration', *names], rows


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbouring points if there are more than can be distinguished; an average with NaN stays a gap."""
    if len(x) <= _POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def number(value: float) -> str:
    """Format a measured value with a few digits."""
    if not math.isfinite(value):
        return 'not finite'
    if value and abs(value) < 0.01:
        return f'{value:.2e}'
    return f'{value:.4g}'


def _thousands(value: float, _) -> str:
    return f'{value / 1000:g}k' if abs(value) >= 10_000 else f'{value:g}'


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f'{name[: length - 1]}…'
