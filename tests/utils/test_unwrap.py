"""The data sets inside wrappers, against the ones that mmengine builds."""

import pytest
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS

from mmseg_volo.utils.unwrap import bare_dataset, bare_datasets


@DATASETS.register_module()
class Named(BaseDataset):
    def __init__(self, name: str, **kwargs):
        self.name = name
        super().__init__(lazy_init=True, **kwargs)


def named(name: str) -> dict:
    return dict(type='Named', name=name)


def wrapped(kind: str, *inner: dict) -> dict:
    if kind == 'ConcatDataset':
        return dict(type=kind, datasets=list(inner), lazy_init=True)
    return dict(type=kind, dataset=inner[0], times=2, lazy_init=True)


CONFIGS = [
    named('a'),
    wrapped('RepeatDataset', named('a')),
    wrapped('ConcatDataset', named('a'), named('b')),
    wrapped('RepeatDataset', wrapped('ConcatDataset', named('a'), wrapped('RepeatDataset', named('b')), named('c'))),
]


@pytest.mark.parametrize('config', CONFIGS, ids=lambda config: config['type'])
def test_all_inner_data_sets_are_found(config):
    def names(built):
        if isinstance(built, Named):
            return [built.name]
        return [name for one in getattr(built, 'datasets', None) or [built.dataset] for name in names(one)]

    found = bare_datasets(config)
    assert [one['name'] for one in found] == names(DATASETS.build(config))
    assert bare_dataset(config) is found[0] is bare_datasets(config)[0]  # the configs themselves, to be changed


def test_what_is_no_wrapper_stays():
    for config in ({}, None, dict(type='Own', dataset='name'), dict(type='Own', datasets=[])):
        assert bare_dataset(config) == (config or {})
