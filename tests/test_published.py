"""The tests that mmengine and mmseg publish, with this package's classes in the place of theirs (published_swap.py).

Their source packages come from the folder that ``PUBLISHED_TESTS`` names, or are downloaded, into that folder if set.
"""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mmseg
import pytest

TESTS = Path(__file__).parent


class Published(NamedTuple):
    files: str  # those of the package's tests that reach the replaced classes
    built: set[str]  # this package's classes that they must reach
    differences: dict[str, str]  # tests that fail on purpose, each with the reason, which is in docs/reliability.md too
    left_out: str = ''  # a test that fails with the package's own classes too


MMENGINE = Published(
    'test_hooks/test_checkpoint_hook.py test_hooks/test_early_stopping_hook.py test_hooks/test_ema_hook.py '
    'test_hooks/test_iter_timer_hook.py test_hooks/test_logger_hook.py test_hooks/test_param_scheduler_hook.py '
    'test_hooks/test_prepare_tta_hook.py test_hooks/test_runtime_info_hook.py test_hooks/test_sampler_seed_hook.py '
    'test_dataset/test_sampler.py test_model/test_base_module.py test_model/test_test_aug_time.py '
    'test_runner/test_checkpoint.py test_runner/test_log_processor.py test_runner/test_runner.py',
    {'AtomicCheckpointHook', 'ResumableSampler', 'ResumableTrainLoop', 'StreamingTTAModel', 'VOLORunner'},
    {
        'test_hooks/test_checkpoint_hook.py::TestCheckpointHook::test_before_train': (
            'the path of the best checkpoint follows a work dir that was moved'
        ),
        'test_hooks/test_ema_hook.py::TestEMAHook::test_with_runner': 'a test rejects a checkpoint of another model',
        'test_runner/test_runner.py::TestRunner::test_build_dataloader': (
            'dataloader.dataset is a wrapper, which sets the seeds of each image'
        ),
        'test_runner/test_runner.py::TestRunner::test_get_hooks_info': 'the hook has another name in the log',
    },
    left_out='test_runner/test_checkpoint.py::test_save_checkpoint',  # it needs petrel_client
)
MMSEG = Published(
    'test_models/test_forward.py test_models/test_heads/test_decode_head.py test_models/test_heads/test_fcn_head.py '
    'test_models/test_heads/test_uper_head.py test_models/test_segmentors/test_encoder_decoder.py '
    'test_models/test_segmentors/test_seg_tta_model.py',
    {'BandedHead', 'LeanFCNHead', 'LeanUPerHead', 'Segmentor', 'StreamingTTAModel'},
    {},
)


def extract(package: str, number: str, target: Path) -> Path:
    """Extract the tests of a source package; return the folder that has ``tests/``."""
    folder = f'{package.replace("-", "_")}-{number}'
    archive = Path(os.environ.get('PUBLISHED_TESTS') or target) / f'{folder}.tar.gz'
    if not archive.is_file():
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary=:all:']
        done = subprocess.run(
            [*pip, '--dest', archive.parent, f'{package}=={number}'], capture_output=True, text=True, check=False
        )
        if not archive.is_file():
            why = (done.stderr.strip().splitlines() or ['pip downloaded no .tar.gz'])[-1]
            pytest.skip(f'needs {archive.name}, in the folder PUBLISHED_TESTS or from the package index: {why}')
    with tarfile.open(archive) as file:
        tests = [member for member in file if member.name.startswith(f'{folder}/tests/')]
        file.extractall(target, tests, filter='data')
    return target / folder


def run(published: Published, root: Path) -> None:
    """Run the tests in ``root`` and compare what fails with the list of differences."""
    (root / 'tmp').mkdir()
    pytest_here = [sys.executable, '-m', 'pytest', '-c', os.devnull, '--rootdir=.', '-p', 'published_swap']
    options = ['-p', 'no:cacheprovider', '-p', 'no:xdist', '-q', '-rfE', '--tb=short', '--show-capture=no']
    left_out = [f'--deselect=tests/{published.left_out}'] if published.left_out else []
    paths = [str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [*pytest_here, *options, *left_out, *(f'tests/{file}' for file in published.files.split())],
        cwd=root,
        # Without a GPU, so that the same tests run everywhere.
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'TMPDIR': f'{root}/tmp', 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    print(*done.stdout.splitlines()[-1:])  # the counts, with -rP
    assert done.returncode in (0, 1), output
    failed = set(re.findall(r'^(?:FAILED|ERROR) tests/(\S+)', done.stdout, re.MULTILINE))
    assert not failed - set(published.differences), output
    passes = {test: why for test, why in published.differences.items() if test not in failed}
    assert not passes, f'these pass now; correct the list and docs/reliability.md: {passes}'
    assert published.built <= set(re.search(r'^built: (.*)', done.stdout, re.MULTILINE)[1].split()), output


@pytest.mark.slow
def test_mmengine(tmp_path):
    pytest.importorskip('parameterized')
    run(MMENGINE, extract('onedl-mmengine', version('onedl-mmengine'), tmp_path))


@pytest.mark.slow
def test_mmseg(tmp_path):
    """Of mmsegmentation 1.2.2, since the source package of onedl-mmsegmentation leaves these tests out."""
    configs = Path(mmseg.__file__).parent / '.mim/configs'
    if not configs.is_dir():
        pytest.skip('needs the configs in the wheel of mmseg')
    root = extract('mmsegmentation', '1.2.2', tmp_path)
    (root / 'configs').symlink_to(configs)
    run(MMSEG, root)
