"""The command-line tools as users run them, with a small model and drawn scenes."""

import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import CONFIG, ROOT, iou_table, miou, run, tool
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.apis import MMSegInferencer, inference_model, init_model, show_result_pyplot

from mmseg_volo.checkpoints.reading import load_from_local
from mmseg_volo.engine import optim as optim_module
from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Return (config, work dir, checkpoint, output) of one short training run."""
    work = tmp_path_factory.mktemp('tools')
    config = work / 'tiny.py'
    config.write_text(CONFIG.replace('DATA', str(work / 'scenes')))
    output = tool('train.py', config, '--work-dir', work / 'run')
    return config, work, work / 'run/iter_4.pth', output


def test_train_logs_an_eta_and_saves_checkpoints_that_load_safely(trained):
    _, work, checkpoint, output = trained
    assert 'eta:' in output and 'Iter(train) [4/4]' in output and 'VOLO starts from random weights' in output
    assert (work / 'run/best_mIoU_iter_4.pth').is_file()
    for path in (checkpoint, work / 'run/best_mIoU_iter_4.pth'):
        assert 'best_score' in str(torch.load(path, weights_only=False)['message_hub'])
        init_model(str(trained[0]), str(path), device='cpu')  # through the safe reader


def test_train_resumes_from_the_checkpoint_without_the_pretrained_file(trained):
    config, work, _, _ = trained
    shutil.copytree(work / 'run', work / 'resumed')
    (work / 'resumed/iter_4.pth').unlink()
    (work / 'resumed/last_checkpoint').unlink()
    missing = 'model.backbone.init_cfg.checkpoint=gone.pth', 'model.backbone.init_cfg.type=Pretrained'
    output = tool('train.py', config, '--work-dir', work / 'resumed', '--resume', '--cfg-options', *missing)
    assert 'resumed epoch: 0, iter: 2' in output and 'Iter(train) [3/4]' in output
    assert 'Iter(train) [2/4]' not in output
    output = tool('train.py', config, '--work-dir', work / 'fresh', '--cfg-options', *missing, fails=True)
    assert output.strip().endswith(
        'error: checkpoint gone.pth does not exist; expected a .pth, .pth.tar or .safetensors file'
    )


@pytest.mark.parametrize(
    ('device', 'has_bfloat16', 'given', 'expected'),
    [
        ('cpu', False, {}, dict(type='BFloat16OptimWrapper')),
        ('cuda', True, {}, dict(type='BFloat16OptimWrapper')),
        ('cuda', False, {}, dict(type='AmpOptimWrapper', loss_scale='dynamic')),
        ('cuda', True, dict(loss_scale=512.0), dict(type='AmpOptimWrapper', loss_scale=512.0)),
        ('cuda', True, dict(type='AmpOptimWrapper'), dict(type='AmpOptimWrapper')),
        ('cuda', False, dict(type='BFloat16OptimWrapper'), dict(type='BFloat16OptimWrapper')),
    ],
    ids=str,
)
def test_precision_of_amp(device, has_bfloat16, given, expected, monkeypatch):
    monkeypatch.setattr(optim_module, 'get_device', lambda: device)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: has_bfloat16)
    optim = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    config = Config(dict(optim_wrapper={**optim, **given}))
    optim_module.use_amp(config)
    assert config.optim_wrapper == {**optim, **given, **expected}


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_bfloat16_wrapper_computes_in_bfloat16(device, request, monkeypatch):
    if device == 'cuda':
        request.getfixturevalue('gpu')
    monkeypatch.setattr('mmengine.runner.amp.get_device', lambda: device)
    model = torch.nn.Linear(4, 4).to(device)
    wrapper = build_optim_wrapper(model, dict(type='BFloat16OptimWrapper', optimizer=dict(type='SGD', lr=0.1)))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4, device=device))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    torch.testing.assert_close(model.weight.detach(), before - 0.2)


def test_amp_trains_in_bfloat16(trained):
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip('this GPU has no bfloat16: --amp is float16')
    config, work, _, _ = trained
    output = tool('train.py', config, '--work-dir', work / 'amp', '--amp')
    assert "type='BFloat16OptimWrapper'" in output and 'Iter(train) [4/4]' in output
    losses = [float(x) for x in re.findall(r'  loss: ([\d.]+)', output)]
    plain = [float(x) for x in re.findall(r'  loss: ([\d.]+)', trained[3])]
    assert len(losses) == 4 and losses == pytest.approx(plain, rel=0.02)
    # Four small steps hardly change the loss; the weights show whether the products were rounded.
    low, full = (load_from_local(str(path))['state_dict'] for path in (work / 'amp/iter_4.pth', trained[2]))
    differences = [(low[k] - full[k]).abs().max().item() for k in full if k.endswith('qkv.weight')]
    assert 1e-6 < max(differences) < 0.01 and all(v.dtype != torch.bfloat16 for v in low.values())


def test_test_prints_the_table_and_saves_predictions(trained):
    config, work, checkpoint, output = trained
    out, show = work / 'out', work / 'show'
    tested = tool('test.py', config, checkpoint, '--work-dir', work / 't', '--out', out, '--show-dir', show)
    assert miou(tested) == miou(output) and 'traffic light' in tested
    assert len(list(out.glob('*.png'))) == 3
    assert cv2.imread(str(next(out.glob('*.png'))), -1).shape == (64, 128)
    assert len(list(show.rglob('*.png'))) == 3


@pytest.mark.parametrize('flag', ['--aug-test', '--tta'])
def test_aug_test(trained, flag):
    config, work, checkpoint, _ = trained
    assert 'mIoU' in tool('test.py', config, checkpoint, '--work-dir', work / 't', flag)


def test_wrong_arguments_end_in_one_line(trained):
    config, work, _, _ = trained
    (work / 'broken.pth').write_bytes(b'PK broken')
    output = tool('test.py', config, work / 'broken.pth', '--work-dir', work / 't', fails=True)
    assert re.search(r'error: .*broken\.pth: the file is cut off or is no checkpoint', output)
    output = tool('train.py', 'configs/volo_d9.py', fails=True)
    assert 'error: config configs/volo_d9.py does not exist' in output and 'Traceback' not in output


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_training_from_a_file_that_runs_code_is_refused(trained, tmp_path):
    config, *_ = trained
    torch.save({'state_dict': {}, 'meta': Evil(tmp_path / 'code-ran')}, tmp_path / 'iter_2.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    for arguments in (['--resume'], ['--cfg-options', f'load_from={tmp_path}/iter_2.pth']):
        output = tool('train.py', config, '--work-dir', tmp_path, *arguments, fails=True)
        assert re.search(r'error: .*iter_2\.pth: refused, because it holds more than tensors', output)
    assert not (tmp_path / 'code-ran').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='tests machines without a GPU')
def test_two_processes_without_a_gpu(trained):
    config, work, checkpoint, output = trained
    env = dict(PORT='29611', OMP_NUM_THREADS='1')
    run('bash', 'tools/dist_train.sh', config, '2', '--work-dir', work / 'dist', **env)
    assert (work / 'dist/iter_4.pth').is_file()
    # Three images, two and one per process (padded to two and two), give the table of a single process.
    tested = run('bash', 'tools/dist_test.sh', config, checkpoint, '2', '--work-dir', work / 'dt', **env)
    assert miou(tested) == miou(output) and iou_table(tested) == iou_table(output)
    assert 'usage:' in run('bash', 'tools/dist_train.sh', config, fails=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='tests machines without a GPU')
def test_slurm_without_a_gpu(trained, tmp_path):
    """A fake srun starts two processes with Slurm's variables; the launcher reads nothing else."""
    config, work, checkpoint, _ = trained
    srun = tmp_path / 'srun'
    srun.write_text(
        '#!/usr/bin/env bash\nwhile [ "$1" != python ]; do echo "srun argument $1"; shift; done\n'
        'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 SLURM_NODELIST=node "$@" & done; wait\n'
    )
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/usr/bin/env bash\necho 127.0.0.1\n')
    for script in (srun, scontrol):
        script.chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{Path(sys.executable).parent}:{os.environ["PATH"]}', MASTER_PORT='29612')
    env.update(GPUS='2', GPUS_PER_NODE='0', OMP_NUM_THREADS='1')
    arguments = 'part', 'job', config, '--work-dir', work / 'slurm'
    output = run('bash', 'tools/slurm_train.sh', *arguments, **env)
    assert 'srun argument --ntasks=2' in output and 'Iter(train) [4/4]' in output
    assert (work / 'slurm/iter_4.pth').is_file()
    tested = run('bash', 'tools/slurm_test.sh', 'part', 'job', config, checkpoint, **env)
    assert miou(tested) == miou(trained[3])


def test_predict_reports_bad_files_and_continues(trained):
    config, work, checkpoint, _ = trained
    images = work / 'images'
    (images / 'sub').mkdir(parents=True)
    image = cv2.imread(str(next((work / 'scenes').rglob('*leftImg8bit.png'))))
    cv2.imwrite(str(images / 'a.png'), image)
    cv2.imwrite(str(images / 'sub/b.jpg'), image[:50, :90])
    (images / 'broken.png').write_bytes((images / 'a.png').read_bytes()[:20])
    cv2.imwrite(str(images / 'line.png'), np.zeros((1, 3000, 3), np.uint8))  # Resize shrinks it to nothing
    out = work / 'predicted'
    output = tool('predict.py', config, checkpoint, images, '--out', out, '--overlay', '--device', 'cpu', fails=True)
    assert f'skipped {images}/broken.png: it is no image, or broken' in output and '2 of the images failed' in output
    assert f'skipped {images}/line.png: ' in output
    assert sorted(str(p.relative_to(out)) for p in out.rglob('*.png')) == [
        'a.png',
        'a_overlay.png',
        'sub/b.png',
        'sub/b_overlay.png',
    ]
    index = cv2.imread(str(out / 'a.png'), -1)
    assert index.dtype == np.uint8 and index.shape == (64, 128) and index.max() < 19
    # mmseg's own API predicts the same.
    model = init_model(str(config), str(checkpoint), device='cpu')
    expected = inference_model(model, str(images / 'a.png')).pred_sem_seg.data[0].numpy()
    assert (index == expected).all()
    colours = np.array(model.dataset_meta['palette'], np.uint8)[expected][..., ::-1]
    overlay = cv2.imread(str(out / 'a_overlay.png')).astype(int)[: image.shape[0]]  # without the legend
    assert np.abs(overlay - (image.astype(int) + colours) / 2).max() <= 1


def test_options_of_prediction(trained, tmp_path):
    config, work, checkpoint, _ = trained
    path = next((work / 'scenes/leftImg8bit/val').rglob('*.png'))
    image = cv2.imread(str(path))
    for aug_test in (False, True):
        plain = Predictor(str(config), str(checkpoint), 'cpu', aug_test)
        found = plain.predict(plain.prepare(image))
        assert found.confidence is None and (found.classes == plain(image)).all()
        options = dict(precision='bf16', channels_last=True, window_batch=1, confidence=True)
        low = Predictor(str(config), str(checkpoint), 'cpu', aug_test, **options)
        rounded = low.predict(low.prepare(image))
        assert (rounded.classes == found.classes).mean() > 0.9
        assert rounded.confidence.shape == image.shape[:2] and rounded.confidence.min() > 1 / 19
        segmentor = low.model.module if aug_test else low.model
        assert {key: segmentor.test_cfg[key] for key in options} == options
    flags = '--precision', 'bf16', '--window-batch', '4', '--channels-last', '--device', 'cpu'
    tool('predict.py', config, checkpoint, path, '--out', tmp_path, '--confidence', '--aug-test', *flags)
    grey = cv2.imread(str(tmp_path / f'{path.stem}_confidence.png'), -1)
    assert grey.dtype == np.uint8 and (np.abs(grey - rounded.confidence * 255) <= 1).mean() > 0.99
    tested = tool('test.py', config, checkpoint, '--work-dir', work / 't', *flags[:-2])
    assert abs(float(miou(tested)) - float(miou(trained[3]))) < 1


def test_options_on_a_model_that_has_none(trained):
    config, work, checkpoint, _ = trained
    stock = work / 'stock.py'
    stock.write_text(
        f"_base_ = '{config}'\nmodel = dict(type='EncoderDecoder')\ntta_model = dict(type='SegTTAModel')\n"
    )
    load = partial(Predictor, str(stock), str(checkpoint), 'cpu')
    assert load()(np.zeros((64, 128, 3), np.uint8)).shape == (64, 128)  # the same checkpoint
    with pytest.raises(ConfigError, match=r"precision: EncoderDecoder has no such options; set model\.type to 'Stream"):
        load(precision='bf16')
    with pytest.raises(ConfigError, match=r"compile: SegTTAModel has no such options; set tta_model\.type to 'Stream"):
        load(aug_test=True, compile=True)
    with pytest.raises(ConfigError, match='window_batch must be 1 or more, got 0'):
        Predictor(str(config), str(checkpoint), 'cpu', window_batch=0)
    path = next((work / 'scenes').rglob('*leftImg8bit.png'))
    output = tool('predict.py', stock, checkpoint, path, '--out', work / 'x', '--precision', 'bf16', fails=True)
    assert 'error: precision: EncoderDecoder has no such options' in output and 'Traceback' not in output


def test_compile_without_a_compiler_is_one_error(trained, monkeypatch):
    monkeypatch.setattr('shutil.which', lambda _: None)
    with pytest.raises(ConfigError, match=r'compile needs a C\+\+ compiler'):
        Predictor(str(trained[0]), str(trained[2]), 'cpu', compile=True)


def test_logits_are_returned_on_request(trained):
    """mmseg's own API returns no logits by default, and with ``test_cfg.return_logits`` it does."""
    config, work, checkpoint, _ = trained
    path = str(next((work / 'scenes/leftImg8bit/val').rglob('*.png')))
    model = init_model(str(config), str(checkpoint), device='cpu')
    assert 'seg_logits' not in inference_model(model, path)
    options = dict(model=dict(test_cfg=dict(return_logits=True)))
    result = inference_model(init_model(str(config), str(checkpoint), 'cpu', cfg_options=options), path)
    assert result.seg_logits.data.shape == (19, 64, 128)
    assert torch.equal(result.seg_logits.data.argmax(0, keepdim=True), result.pred_sem_seg.data)


def test_predict_aug_test_equals_test_aug_test(trained):
    config, work, checkpoint, _ = trained
    tool('test.py', config, checkpoint, '--work-dir', work / 't', '--aug-test', '--out', work / 'tested_tta')
    val = work / 'scenes/leftImg8bit/val'
    tool('predict.py', config, checkpoint, f'{val}/*/*.png', '--out', work / 'predicted_tta', '--aug-test')
    names = sorted(p.name for p in (work / 'tested_tta').iterdir())
    assert names == sorted(p.name for p in (work / 'predicted_tta').glob('*.png')) and len(names) == 3
    for name in names:
        a, b = (cv2.imread(str(work / folder / name), -1) for folder in ('tested_tta', 'predicted_tta'))
        assert (a == b).all()


def test_predict_names_what_is_missing(trained):
    config, work, checkpoint, _ = trained
    (work / 'empty').mkdir()
    for source in (work / 'empty', work / 'nothing*.png'):
        output = tool('predict.py', config, checkpoint, source, '--out', work / 'x', fails=True)
        assert f'error: {source}: no image found' in output and 'Traceback' not in output


def test_mmsegs_inference_api(trained, tmp_path):
    config, work, checkpoint, _ = trained
    path = next((work / 'scenes/leftImg8bit/val').rglob('*.png'))
    image = cv2.imread(str(path))
    model = init_model(str(config), str(checkpoint), device='cpu')
    by_path = inference_model(model, str(path))
    by_array = inference_model(model, image)
    assert torch.equal(by_path.pred_sem_seg.data, by_array.pred_sem_seg.data)
    assert len(inference_model(model, [image, image])) == 2
    shown = show_result_pyplot(model, str(path), by_path, show=False, out_file=str(tmp_path / 'shown.png'))
    assert shown.shape == image.shape and (tmp_path / 'shown.png').is_file()
    inferencer = MMSegInferencer(model=str(config), weights=str(checkpoint), device='cpu', show_progress=False)
    for source in (str(path), image):
        assert (inferencer(source)['predictions'] == by_path.pred_sem_seg.data[0].numpy()).all()


def test_quickstart_draws_trains_tests_and_shows(trained):
    config, work, _, _ = trained
    output = tool('quickstart.py', '--config', config, '--work-dir', work / 'quick')
    assert 'train.py' in output and 'test.py' in output and 'traffic light' in output and 'mIoU' in output
    figure = cv2.imread(str(work / 'quick/quickstart.png'))
    assert figure.shape[1] == 3 * 128 + 2 * 4 and figure.shape[0] > 2 * 64


def test_the_readme_is_correct(trained, tmp_path):
    """The files that it names exist, and its first Python block runs on the results of its first command."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    named = {name for name in re.findall(r'(?:configs|tools|docs|mmseg_volo)/[\w/]+\.(?:py|sh|md|png)', text)}
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).is_file()]
    config, work, checkpoint, _ = trained
    block = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
    replaced = block.replace("f'{work_dir}/volo_d1_quickstart.py'", f"'{config}'")
    replaced = replaced.replace("f'{work_dir}/iter_240.pth'", f"'{checkpoint}'")
    replaced = replaced.replace('data/street_scenes', f'{work}/scenes').replace('prediction.png', f'{tmp_path}/p.png')
    assert replaced.count(str(work)) == 3
    exec(replaced, {})
    assert (tmp_path / 'p.png').is_file()


@pytest.mark.slow
def test_the_real_quickstart_learns(tmp_path):
    """Train for minutes. The README says 22 mIoU; predicting road everywhere gives 1.8."""
    options = [f'{part}_dataloader.dataset.data_root={tmp_path}/scenes' for part in ('train', 'val', 'test')]
    output = tool('quickstart.py', '--work-dir', tmp_path / 'quick', '--cfg-options', *options, limit=1800)
    assert float(miou(output)) > 18


def test_complexity_prints_the_papers_numbers():
    output = tool('complexity.py')
    assert '26.6' in output and 'VOLO-D5' in output
    assert 'multiple of 16' in tool('complexity.py', '--size', '100', fails=True)
