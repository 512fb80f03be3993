"""Running ``tools/benchmark.py`` in this process, and the columns of its tables."""

import csv
import importlib.util
from pathlib import Path

import cv2

from mmseg_volo.benchmark import SIDES

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = ['--device', 'cpu', '--threads', 1]
SMALL = ['--size', 64, 64, '--rounds', 1, *ON_CPU]
MACHINE = {'device', 'device_name', 'memory_gb', 'threads', 'cores', 'load', 'driver', 'cuda', 'cudnn', 'python'}
MACHINE |= {'torch', 'mmseg', 'timm', 'triton', 'numba', 'mmseg_volo', 'commit', 'date'}
BATCH = {'height', 'width', 'batch', 'precision', 'rounds'}


def run(*arguments) -> int | None:
    """The tool, in this process, and its status: importing PyTorch and mmseg takes longer than the measurements."""
    spec = importlib.util.spec_from_file_location('benchmark_tool', ROOT / 'tools/benchmark.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main([str(argument) for argument in arguments])


def rows_of(path: Path) -> list[dict]:
    """The rows of a table, which has a figure."""
    assert cv2.imread(str(path.with_suffix('.png'))).shape[1] > 500
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def spread(name: str) -> set[str]:
    return {name, f'{name}_min', f'{name}_max'}


TIMES = {name for part in ('stock_s', 'ours_s', 'compiled_s') for name in spread(part)} | {'compiled_missing'}
TIMES |= {*spread('times_faster'), *spread('times_faster_than_compiled')}
MEMORY = {f'{side}_{kind}_mb' for side in (*SIDES, 'compiled') for kind in ('growth', 'peak')}
