"""One model for many visitors: options, turns, and predictions that are stopped."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from demo_server import random_image

from mmseg_volo.demo.shared_model import SharedModel, Stopped
from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor

pytest_plugins = ['demo_server']


def test_one_prediction_at_a_time(model):
    steps, image = [], random_image(0, 64, 128)

    def visit(name: str) -> None:
        model.predict(image, True, 'fp32', lambda done, total: steps.append((name, done, total)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(visit, 'abc'))
    names = [name for name, _, _ in steps]
    assert set(names) == set('abc') and len(names) >= 9
    assert sum(a != b for a, b in itertools.pairwise(names)) == 2, names
    assert steps[-1][1] == steps[-1][2] > 1


def test_a_prediction_can_be_stopped_and_the_next_is_right(model, predictor):
    image = random_image()

    def stop(done: int, total: int) -> None:
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        model.predict(image, True, 'fp32', stop)
    assert np.array_equal(model.predict(image).classes, predictor(image))


def test_only_options_that_the_model_has(predictor, model):
    class Plain(Predictor):
        """A predictor without options, as of a model of mmseg's own."""

        def __init__(self, inner: Predictor):
            self.classes, self.palette, self._inner = inner.classes, inner.palette, inner

        def with_options(self, aug_test: bool = False, **options):
            if aug_test or options:
                raise ConfigError('no such options')
            return self._inner

    assert model.precisions == ['fp32', 'bf16', 'fp16'] and model.multi_scale and model.confidence
    plain = SharedModel(Plain(predictor))
    assert plain.precisions == [] and not plain.multi_scale and not plain.confidence
    image = random_image(0, 64, 128)
    prediction = plain.predict(image)
    assert prediction.confidence is None and np.array_equal(prediction.classes, predictor(image))
    for options in (dict(multi_scale=True), dict(precision='fp32')):
        with pytest.raises(ConfigError, match='does not offer'):
            plain.predict(image, **options)
    with pytest.raises(ConfigError, match='does not offer'):
        model.predict(image, precision='fp8')


def test_a_precision_that_the_device_lacks_is_not_offered(predictor, monkeypatch):
    with_options = Predictor.with_options

    def lacking(self, aug_test=False, **options):
        other = with_options(self, aug_test, **options)
        if options.get('precision') == 'fp16':

            def fail(*_):
                raise RuntimeError('"conv" not implemented for Half')

            other.predict = fail
        return other

    monkeypatch.setattr(Predictor, 'with_options', lacking)
    assert SharedModel(predictor).precisions == ['fp32', 'bf16']
