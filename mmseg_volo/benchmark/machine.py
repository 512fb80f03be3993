"""The device that a measurement runs on, and what its results depend on besides the configuration."""

import multiprocessing
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]  # of a clone
# Columns of the environment, and the packages whose versions they hold.
_PACKAGES = dict(mmseg='onedl-mmsegmentation', timm='timm', triton='triton', numba='numba', mmseg_volo='mmseg_volo')


def check_device(device: str) -> None:
    """Raise ValueError if PyTorch cannot use the device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA raises AssertionError
        raise ValueError(f'device {device} cannot be used: {str(error).splitlines()[0]}') from error


def on_gpu(device: str) -> bool:
    return torch.device(device).type == 'cuda'


def use(device: str, threads: int | None) -> None:
    """Prepare this process: make a GPU the current one, and set PyTorch's number of threads (None leaves it).

    PyTorch's timer waits for the current GPU, so the one that is measured has to be it.

    Raises:
        ValueError: no such device.
    """
    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if on_gpu(device):
        torch.cuda.set_device(torch.device(device).index or 0)


def environment(device: str, threads: int | None) -> dict:
    """Columns that describe machine and versions; also prepares the process as :func:`use` does."""
    use(device, threads)
    gpu = on_gpu(device)
    return dict(
        device=device,
        device_name=_device_name(device),
        memory_gb=round(torch.cuda.get_device_properties(device).total_memory / 1e9) if gpu else None,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        driver=_output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader') if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        cudnn=torch.backends.cudnn.version() if gpu else None,
        python=platform.python_version(),
        torch=torch.__version__,
        **{name: _version(package) for name, package in _PACKAGES.items()},
        commit=_output('git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD'),
        date=datetime.now().astimezone().isoformat(timespec='seconds'),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if on_gpu(device):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return next(models, '') or platform.processor() or platform.machine()


def title(environment: dict) -> str:
    kind = 'GPU' if on_gpu(environment['device']) else environment['device'].upper()
    return f'{kind}: {environment["device_name"]}'


def describe(environment: dict) -> str:
    """What figures depend on, in two lines."""
    machine = [f'{environment["memory_gb"]} GB'] * (environment['memory_gb'] is not None)
    machine += [f'{environment["cores"]} CPU cores', f'threads: {environment["threads"]}']
    if environment['load'] is not None:  # other work on the machine can slow either side down many times
        machine.append(f'load average {environment["load"]} before the start')
    names = 'driver', 'cuda', 'cudnn', 'python', 'torch', *_PACKAGES, 'commit'
    versions = [f'{name} {environment[name]}' for name in names if environment[name] is not None]
    return f'{title(environment)}, {", ".join(machine)}\n{", ".join(versions)}; {environment["date"]}'


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def process_context(device: str) -> BaseContext:
    """How processes of a measurement are started: forked from a server that has imported everything, if possible.

    CUDA does not survive a fork, so for a GPU, and on systems without fork, they are new ones.
    """
    if on_gpu(device) or 'forkserver' not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmseg_volo.benchmark.parts'])
    return context
