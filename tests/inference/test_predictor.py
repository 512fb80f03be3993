"""Predictors that share weights, the progress of a prediction, and predictions on a GPU."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from small_runs import write_config

from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.model import init_model
from mmseg_volo.inference.options import use_tta

OPTIONS = [dict(), dict(aug_test=True), dict(precision='bf16', confidence=True), dict(aug_test=True, precision='bf16')]


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Return (config, checkpoint) of an untrained model that predicts in windows."""
    folder = tmp_path_factory.mktemp('inference')
    config = Config.fromfile(write_config(folder))
    config.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(43, 43))
    model = init_model(config, device='cpu')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)), folder / 'small.pth')
    return config, str(folder / 'small.pth')


def test_predictors_that_share_weights_keep_their_options(small):
    image = np.random.default_rng(0).integers(0, 256, (80, 150, 3), np.uint8)
    first = Predictor(*small, 'cpu')
    shared = [first.with_options(**options) for options in OPTIONS]
    for options, predictor in [*zip(OPTIONS, shared, strict=True)] * 2:  # in turns, so that they could mix
        own = Predictor(*small, 'cpu', **options)
        found, expected = (p.predict(p.prepare(image)) for p in (predictor, own))
        np.testing.assert_array_equal(found.classes, expected.classes)
        assert (found.confidence is None) == ('confidence' not in options)
    weights = {p.data_ptr() for p in first.model.parameters()}
    assert all({p.data_ptr() for p in predictor.model.parameters()} == weights for predictor in shared)
    with pytest.raises(ConfigError, match='window_batch must be 1 or more'):
        first.with_options(window_batch=0)


@pytest.mark.parametrize('aug_test', [False, True])
def test_progress_counts_windows_and_can_end_the_prediction(small, aug_test):
    predictor = Predictor(*small, 'cpu', aug_test, window_batch=2)
    data = predictor.prepare(np.zeros((80, 150, 3), np.uint8))
    seen = []
    predictor.predict(data, lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    assert (
        len(totals) == 1
        and seen[-1][0] == totals.pop() > 4
        and [done for done, _ in seen] == sorted({done for done, _ in seen})
    )

    def stop(done, total):
        raise InterruptedError('stop')

    with pytest.raises(InterruptedError):
        predictor.predict(data, stop)
    predictor.predict(data)  # without progress


def test_gpu_predictions_equal_those_of_a_cpu(small, gpu):
    """A GPU adds pinned memory, CUDA graphs and class ids in 8 bits."""
    image = np.random.default_rng(0).integers(0, 256, (80, 150, 3), np.uint8)
    for aug_test in (False, True):
        expected = Predictor(*small, 'cpu', aug_test)(image)
        predictor = Predictor(*small, gpu, aug_test)
        for _ in range(4):
            found = predictor(image)
            assert found.dtype == np.int64 and (found == expected).mean() > 0.99


def test_cuda_graphs_can_be_switched_on_and_off(small):
    for value in (True, False, None):
        predictor = Predictor(*small, 'cpu', cuda_graph=value)
        predictor(np.zeros((80, 150, 3), np.uint8))  # no effect on a CPU
        assert predictor.model.test_cfg.get('cuda_graph') is value


def test_cudnn_does_not_benchmark_kernels_for_each_view(small):
    config = copy.deepcopy(small[0])
    assert config.env_cfg.cudnn_benchmark  # for training, which has one shape
    use_tta(config)
    assert not config.env_cfg.cudnn_benchmark


def test_paths_and_options_that_do_not_exist(small, tmp_path):
    small[0].dump(tmp_path / 'config.py')
    predictor = Predictor(tmp_path / 'config.py', Path(small[1]), 'cpu')
    with pytest.raises(TypeError, match="Predictor has no option 'presicion'; did you mean 'precision'"):
        Predictor(*small, 'cpu', presicion='bf16')
    with pytest.raises(TypeError, match="Predictor has no option 'x'; it has "):
        predictor.with_options(x=1)
