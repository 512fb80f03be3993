"""The tests of a device fail if an operation is wrong."""

import pytest
import test_device_networks
import test_device_operation
from test_device_operation import fused  # noqa: F401  (a fixture)

OPERATION = ['dtypes', 'odd_sizes', 'strides', 'not_finite', 'auto']


def ignore(text: str) -> None:
    pass


@pytest.mark.parametrize('name', OPERATION)
def test_a_wrong_operation(name, fused, monkeypatch):  # noqa: F811
    """sensitivity: the tests notice an operation that is off by 1 %"""
    real = test_device_operation.outlook_attention

    def wrong(v, logits, impl='auto', **options):
        return real(v, logits, impl=impl, **options) * (1.01 if impl == 'fused' else 1)

    monkeypatch.setattr(test_device_operation, 'outlook_attention', wrong)
    arguments = dict(dtypes=(False, None, ignore), auto=(None,)).get(name, (None, ignore))
    with pytest.raises(AssertionError):
        getattr(test_device_operation, f'test_{name}')('cpu', *arguments)


def test_a_wrong_head(monkeypatch):
    """sensitivity: the tests notice a head without its pyramid"""
    head = test_device_networks.LeanUPerHead
    monkeypatch.setattr(head, 'forward', lambda self, maps: self.conv_seg(self.bottleneck(maps)))
    with pytest.raises((AssertionError, TypeError, RuntimeError)):
        test_device_networks.test_head('cpu', False, ignore)
