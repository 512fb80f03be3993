"""Threads, and a small VOLO in the place of D1."""

from collections.abc import Iterator

import pytest
import timm
import torch
from timm.models.volo import VOLO
from torch import nn

from mmseg_volo.models.volo import ARCHS

_SMALL = dict(depths=(1, 1, 1, 1), dims=(64, 128, 128, 128), heads=(2, 4, 4, 4), mlp_ratios=2, stem_width=8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small kernels: on a busy machine threads that wait for each other take a multiple of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_d1(monkeypatch) -> None:
    """Four blocks under the name of D1, on both sides; in this process only."""

    real = timm.create_model

    def create_model(model_name: str, **options) -> nn.Module:
        if model_name != 'volo_d1_224':
            return real(model_name, **options)
        return VOLO(
            layers=_SMALL['depths'],
            embed_dims=_SMALL['dims'],
            num_heads=_SMALL['heads'],
            mlp_ratio=_SMALL['mlp_ratios'],
            stem_hidden_dim=_SMALL['stem_width'],
            **options,
        )

    monkeypatch.setitem(ARCHS, 'd1', _SMALL)
    monkeypatch.setattr(timm, 'create_model', create_model)
