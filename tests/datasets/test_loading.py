"""The transforms that load images and labels, and the pipelines of the configs."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from faulty_data import FAULTS, IMAGE, LABEL, dataset_config, random_image, write
from mmcv.image.io import imread_flags
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.apis.mmseg_inferencer import MMSegInferencer
from mmseg.apis.utils import _preprare_data
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image

from mmseg_volo.datasets.checks.check import build_checked, check_not_empty
from mmseg_volo.datasets.loading import check_loaders
from mmseg_volo.engine.loop import SeededDataset
from mmseg_volo.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
LOADING = [
    name
    for name, fault in FAULTS.items()
    if fault.path in (IMAGE, LABEL)
    and fault.kind.split()[0] in ('unreadable', 'channels', 'depth', 'lossy', 'size')
    and 'permissions' not in name
    # Whether a damaged PNG image is an error depends on the release of libpng.
    and 'PNG image' not in name
]


@pytest.mark.parametrize('name', LOADING)
def test_loading_names_the_file(data, name, capfd):
    FAULTS[name].spoil(data)
    dataset = DATASETS.build(dataset_config(data))
    with pytest.raises(DataError) as caught:
        dataset[3]
    message = str(caught.value)
    assert str(data / FAULTS[name].path) in message and '\n' not in message and '; ' in message


def test_error_in_a_worker_of_the_loader_is_one_sentence(data):
    write(data / LABEL, random_image(3))
    dataset = DATASETS.build(dataset_config(data))
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, collate_fn=pseudo_collate)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f'{data / LABEL}: the label has 3 channels') and '\n' not in str(caught.value)


def test_reduce_zero_label_of_transform_and_data_set_must_agree(data):
    pipeline = [dict(type='LoadCheckedImage'), dict(type='LoadCheckedAnnotations', reduce_zero_label=True)]
    with pytest.raises(DataError, match='set it in the data set only'):
        DATASETS.build(dataset_config(data, pipeline=pipeline))[0]


@pytest.mark.parametrize('name', ['volo_d1_camvid', 'volo_d1_ade20k', 'volo_d1_cityscapes', 'volo_d1_quickstart'])
def test_pipelines_run_without_labels(data, name):
    """``inference_model`` gives them a file or an array, ``MMSegInferencer`` a file."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    path = str(data / IMAGE)
    for source in (path, cv2.imread(path)):
        prepared, _ = _preprare_data(source, SimpleNamespace(cfg=cfg.copy()))
        assert 'gt_sem_seg' not in prepared['data_samples'][0]
    inferencer = SimpleNamespace(_get_transform_idx=lambda *args: MMSegInferencer._get_transform_idx(None, *args))
    pipeline = MMSegInferencer._init_pipeline(inferencer, cfg.copy())
    assert pipeline(path)['inputs'].shape == prepared['inputs'][0].shape
    tta = TRANSFORMS.build(cfg.tta_pipeline[1]) if cfg.tta_pipeline[1]['type'] == 'TestTimeAug' else None
    views = tta(TRANSFORMS.build(cfg.tta_pipeline[0])(dict(img_path=path)))
    assert len(views['inputs']) >= 2
    assert "type='LoadImageFromFile'" in cfg.pretty_text.split('test_pipeline')[1]


def test_every_config_has_the_transforms_and_the_hook():
    paths = sorted((ROOT / 'configs').glob('*.py'))
    assert len(paths) > 5
    for path in paths:
        cfg = Config.fromfile(path)
        assert dict(type='LabelGuardHook') in cfg.custom_hooks
        for split, image in (('train', 'LoadCheckedImage'), ('val', 'LoadImageFromFile')):
            steps = [step['type'] for step in cfg[f'{split}_dataloader'].dataset.pipeline]
            assert steps[0] == image and 'LoadCheckedAnnotations' in steps
        assert 'LoadCheckedAnnotations' in str(cfg.tta_pipeline)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(color_type='color_ignore_orientaton'), "did you mean 'color_ignore_orientation'"),
        (dict(color_type='colour', imdecode_backend='pillow'), "did you mean 'color'"),
        (dict(imdecode_backend='pil'), "did you mean 'pillow'"),
        (dict(imdecode_backend='turbojpeg', color_type='unchanged'), 'turbojpeg'),
        (dict(backend_args=dict(backend='petrol')), "backend_args={'backend': 'petrol'}"),
    ],
)
@pytest.mark.parametrize('wrapped', [False, True])
def test_arguments_of_a_loader_that_read_no_file_are_named(data, arguments, message, wrapped):
    cfg = dataset_config(data)
    kind = 'LoadImageFromFile' if 'color_type' in arguments else 'LoadCheckedAnnotations'
    cfg['pipeline'] = [dict(type=kind, **arguments), *cfg['pipeline'][1:]]
    if wrapped:
        cfg = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[cfg, cfg]))
    with pytest.raises(ValueError, match=message) as caught:
        build_checked(cfg, check_not_empty)
    assert str(caught.value).startswith(f'{kind}: ') and '\n' not in str(caught.value)


def test_an_image_that_the_pipeline_shrinks_to_nothing_is_named(data):
    Image.fromarray(random_image(0)).resize((2, 3000)).save(data / 'images/train/0.png')
    cfg = dataset_config(data)
    cfg['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(128, 96), keep_ratio=True)]
    with pytest.raises(DataError, match=r'images/train/0\.png: the pipeline cannot process .* cut the image'):
        SeededDataset(DATASETS.build(cfg))[0]


@pytest.mark.parametrize('flag', [*imread_flags, 1])
@pytest.mark.parametrize('backend', [None, 'cv2', 'pillow'])
def test_arguments_of_a_loader_that_read_files_pass(flag, backend):
    if (flag, backend) == (1, 'pillow'):
        pytest.skip('numbers are for OpenCV')
    check_loaders([LoadImageFromFile(color_type=flag, imdecode_backend=backend, backend_args=dict(backend='local'))])
