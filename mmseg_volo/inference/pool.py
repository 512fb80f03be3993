"""Process pool: each task goes to a free worker; a crash loses only that worker's tasks.

:class:`concurrent.futures.ProcessPoolExecutor` does not fit: one crash fails the tasks of all its workers, an error in
an initializer loses its type and message, and a worker runs one call at a time, so that it cannot read the next image
and write the last one while the model works.
"""

import contextlib
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

import cv2
import torch

from ..utils.opencv import quiet_opencv
from ..utils.signals import Stopped, StopSignals

_QUEUE = 3  # tasks that a worker holds: it prepares one, works on one, and writes the results of one
_PATIENCE = 20.0  # seconds that a worker has to finish its current step

Work = Callable[[Iterable, StopSignals], Iterator]


def share_out(
    start: Callable[[int], Work], tasks: Iterable, processes: int, stop: StopSignals, begin: Callable[[], None]
) -> Iterator[tuple]:
    """Do tasks in several processes, which share the threads of PyTorch and OpenCV evenly.

    Args:
        start: called in each worker with its rank; returns the function that turns an iterator of tasks into an
            iterator of results in the same order. ``start``, tasks and results must be picklable.
        tasks: the tasks.
        processes: number of workers.
        stop: polled while waiting.
        begin: called each time a worker is ready, before it gets its first task.

    Yields:
        (task, result, None); or for each task in the queue of a crashed worker (task, None, reason).

    Raises:
        Stopped: by ``stop``.
        Exception: an error from ``start`` or from the work in a worker.
    """
    context = multiprocessing.get_context('spawn')
    threads = max(1, torch.get_num_threads() // processes)
    workers: dict[Connection, tuple] = {}
    remaining = iter(tasks)
    exhausted = False
    why = ''
    stop.check()
    tracker = resource_tracker._resource_tracker
    starts_tracker = hasattr(tracker, '_stop') and getattr(tracker, '_fd', 0) is None
    handler = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError):  # not the main thread
        # Workers inherit this: a terminal sends Ctrl-C to all processes, but only the parent decides when they end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, start, rank, threads), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = (rank, process, [])
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handler)
    alive = dict(workers)
    try:
        while alive:
            for connection in wait(list(alive), timeout=0.2):
                rank, process, queue = alive[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    del alive[connection]
                    process.join(_PATIENCE)
                    if queue or process.exitcode:
                        why = f'process {rank} of {processes} {_describe_exit(process.exitcode)}'
                    yield from ((task, None, f'{why} with this task in its queue') for task in queue)
                    continue
                if kind == 'error':
                    raise value
                if kind == 'ready':
                    begin()
                if kind == 'result':
                    yield queue.pop(0), value, None
                while len(queue) < _QUEUE and not exhausted:
                    task = next(remaining, None)
                    if task is None:
                        exhausted = True
                        for other in alive:
                            _send(other, None)
                    else:
                        queue.append(task)
                        _send(connection, task)
            stop.check()
        yield from ((task, None, f'no process was left for it: {why}') for task in remaining)
    finally:
        for connection in workers:
            connection.close()
        for _, process, _ in workers.values():
            if alive:  # after an error or a signal: each worker stops at its next safe point
                process.terminate()
        for _, process, _ in workers.values():
            process.join(_PATIENCE)
            process.kill()
            process.join()
        # multiprocessing has started a helper with the first worker. It would end after this process, and stay as a
        # zombie where nothing reaps orphans, as in many containers. Another child would keep the helper alive.
        if starts_tracker and not multiprocessing.active_children():
            tracker._stop()


def _send(connection: Connection, message) -> None:
    with contextlib.suppress(OSError):  # the worker crashed; the next wait reports that
        connection.send(message)


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f'was ended by {name}{" (out of memory?)" if name == "SIGKILL" else ""}'
    return f'ended with status {status}'


def _serve(connection: Connection, start: Callable[[int], Work], rank: int, threads: int) -> None:
    """Run a worker: start, then work until the task None arrives or the parent is gone."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    try:
        work = start(rank)
        connection.send(('ready', None))
        with quiet_opencv(), StopSignals(signal.SIGTERM) as stop:
            for result in work(_received(connection), stop):
                connection.send(('result', result))
    except Stopped as stopped:
        sys.exit(stopped.status)
    except (BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f'{type(error).__name__}: {error}')
        _send(connection, ('error', error))


def _received(connection: Connection) -> Iterator:
    with contextlib.suppress(EOFError, OSError):
        while (task := connection.recv()) is not None:
            yield task
