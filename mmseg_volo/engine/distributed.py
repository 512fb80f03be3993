"""Start distributed runs on gloo, and detect a lost rank.

A collective on a GPU waits for a dead rank until NCCL's limit of ten minutes, and a rank that fails does not tell the
others why. So a thread of each rank sends a heartbeat to the store of the process group and watches the other ranks. It
ends its own process with a clear message when another rank falls silent or reports an error.
"""

import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ..errors import ProcessLost

_BEAT = 2.0  # seconds between heartbeats
_GRACE = 8.0  # seconds for the main thread to raise its own error
_DONE = 2**40  # added to a rank's count of heartbeats when it ends normally
_SECONDARY = re.compile(r'gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|collective', re.IGNORECASE)


class Watch:
    """Watch the other ranks of a run until :meth:`close`.

    Args:
        patience: seconds of silence after which a rank counts as lost.
    """

    def __init__(self, patience: float = 40.0):
        self.patience = patience
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._closed = threading.Event()
        self._seen = {rank: (0, time.monotonic()) for rank in range(self.world_size) if rank != self.rank}
        store = dist.TCPStore(
            os.environ['MASTER_ADDR'],
            int(os.environ['MASTER_PORT']),
            is_master=False,
            timeout=timedelta(seconds=10),
            wait_for_workers=False,
        )
        self._store = dist.PrefixStore(f'mmseg_volo_watch_{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        self._store.add(f'beat{self.rank}', 1)
        self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
        self._thread.start()

    def report(self, error: BaseException) -> ProcessLost | None:
        """Tell the other ranks that this one ends with ``error``.

        Returns:
            The error to raise instead, if ``error`` is only a consequence of what happened to another rank.
        """
        if isinstance(error, RuntimeError) and _SECONDARY.search(f'{type(error).__name__} {error}'):
            reason = 'the connection to another process is lost'
            with suppress(RuntimeError, ValueError):
                deadline = time.monotonic() + 4 * _BEAT
                while not (reported := self._reported()) and time.monotonic() < deadline:
                    time.sleep(_BEAT / 4)
                reason = reported or self._silent(2 * _BEAT) or reason
            return ProcessLost(reason)
        with suppress(RuntimeError, ValueError):  # the store is gone if the rank that holds it is gone
            if self._store.add('failed', 1) == 1:
                text = (str(error).splitlines() or [''])[0]
                self._store.set('why', f'process {self.rank} ended: {type(error).__name__}: {text}')
        return None

    def close(self) -> None:
        """Stop watching, and tell the others that this rank ended normally."""
        self._closed.set()
        with suppress(RuntimeError, ValueError):
            self._store.add(f'beat{self.rank}', _DONE)

    def _run(self) -> None:
        while not self._closed.wait(_BEAT):
            try:
                self._store.add(f'beat{self.rank}', 1)
                lost = self._reported() or self._silent(self.patience)
            except (RuntimeError, ValueError):
                lost = 'the process that holds the store of the process group is gone'
            if lost and not self._closed.wait(_GRACE):
                sys.stderr.write(f'error (process {self.rank}): {lost}. This process ends too\n')
                sys.stderr.flush()
                os._exit(1)

    def _reported(self) -> str | None:
        """The first error that a rank reported."""
        if self._store.add('failed', 0) == 0:
            return None
        return self._store.get('why').decode()

    def _silent(self, patience: float) -> str | None:
        """A message that names the ranks without a heartbeat for ``patience`` seconds, if there are any."""
        now, silent = time.monotonic(), []
        for rank, (beats, since) in list(self._seen.items()):
            count = self._store.add(f'beat{rank}', 0)
            if count != beats:
                self._seen[rank] = (count, now)
            elif 0 < count < _DONE and now - since > patience:
                silent.append(str(rank))
        if not silent:
            return None
        return f'process {", ".join(silent)} fell silent: it was killed, or its host or network is down'


def watch_over(patience: float) -> Watch | None:
    """Start a :class:`Watch` if there are several ranks that can reach a common store."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or 'MASTER_ADDR' not in os.environ:
        return None
    try:
        return Watch(patience)
    except (RuntimeError, KeyError, ValueError):
        return None


def init_gloo(launcher: str) -> None:
    """Initialise the default process group on gloo; ``launcher`` must be 'pytorch' or 'slurm'."""
    if launcher == 'slurm':
        os.environ.setdefault('MASTER_PORT', '29500')
        if 'MASTER_ADDR' not in os.environ:
            hosts = subprocess.run(
                ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']],
                capture_output=True,
                text=True,
                check=True,
            )
            os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
        os.environ.update(
            RANK=os.environ['SLURM_PROCID'],
            LOCAL_RANK=os.environ.get('SLURM_LOCALID', '0'),
            WORLD_SIZE=os.environ['SLURM_NTASKS'],
        )
    elif launcher != 'pytorch':
        raise ValueError(f"without a GPU the launcher must be 'pytorch' or 'slurm', got {launcher!r}")
    interface = _interface_to(os.environ.get('MASTER_ADDR', '127.0.0.1'))
    if interface:
        os.environ.setdefault('GLOO_SOCKET_IFNAME', interface)
    dist.init_process_group('gloo')


def _interface_to(host: str) -> str | None:
    """Name of the network interface that leads to ``host``, or None if unknown (IPv6, not Linux).

    Gloo itself takes the interface of the machine's host name. That is often loopback, which other hosts cannot reach.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))  # sends nothing
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    answer = fcntl.ioctl(probe, 0x8915, struct.pack('256s', name.encode()))  # SIOCGIFADDR
                    if socket.inet_ntoa(answer[20:24]) == address:
                        return name
    except (ImportError, OSError):
        pass
    return None
