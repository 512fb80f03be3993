"""Predicting a picture with one side, and the memory that it takes."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .cases import COMPILED, Case
from .measuring import Memory, autocast, memory_of
from .peer import build, compiled, ready
from .pictures import prepare


@torch.no_grad()
def predict(model: nn.Module, case: Case, side: str, data: dict) -> Tensor:
    """Class ids (H, W) from what :func:`~mmseg_volo.benchmark.pictures.prepare` gave, which is not changed."""
    data = dict(data, data_samples=copy.deepcopy(data['data_samples']))
    # Ours takes the precision from test_cfg.
    with autocast('fp32' if side == 'ours' else case.precision, case.device):
        return model.test_step(data)[0].pred_sem_seg.data.squeeze(0)


def warm_up(model: nn.Module, case: Case, side: str, picture: np.ndarray) -> None:
    """One window; the whole picture where kernels are compiled or chosen by shape."""
    if case.compile or side == COMPILED or torch.device(case.device).type != 'cpu':
        predict(model, case, side, prepare(picture, case.views))
        return
    data = prepare(picture[: case.window, : case.window], case.views)
    if case.views > 1:  # the picture as it is
        data = {name: values[2:3] for name, values in data.items()}
    predict(model, case, side, data)


def measure_memory(case: Case, side: str, picture: np.ndarray) -> Memory:
    """Peak memory of predicting the picture; see :func:`~mmseg_volo.benchmark.measuring.memory_of`."""
    # Passed as a file, so that neither drawing it nor a copy of it counts.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'picture.npy'
        np.save(path, picture)
        return memory_of(_prediction, case, side, path)


def _prediction(case: Case, side: str, path: Path) -> Iterator[None]:
    model = ready(build(case, 'stock' if side == COMPILED else side), case, side)
    if side == COMPILED:
        model = compiled(model)
    yield
    data = prepare(np.load(path), case.views)
    yield
    predict(model, case, side, data)


def label(row: dict) -> str:
    """Of the network in a row."""
    return f'VOLO-{row["arch"].upper()}, {row["classes"]} classes, {row["precision"]}'


def setting(row: dict) -> str:
    """How the pictures of a row are predicted."""
    views = '1 view' if row['views'] == 1 else f'{row["views"]} views'
    return f'{views}, windows of {row["window"]} at stride {row["stride"]}'
