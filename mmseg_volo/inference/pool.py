"""Work shared out among processes, as each becomes free; one that dies takes no more with it than it was at."""

import contextlib
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait

import cv2
import torch

from ..utils.signals import Stopped, StopSignals

_AHEAD = 3  # tasks that a process has at a time: it prepares one, works on one and writes one's results
_PATIENCE = 20.0  # seconds for a process to come to the end of what it is at

Work = Callable[[Iterable, StopSignals], Iterator]


def share_out(
    start: Callable[[int], Work], tasks: Iterable, processes: int, stop: StopSignals, begin: Callable[[], None]
) -> Iterator[tuple]:
    """Do tasks in several processes; threads of PyTorch and OpenCV are divided among them.

    Args:
        start: called in each process with its number, gives what does the work: tasks to results, in their order.
            Picklable, as tasks and results are.
        tasks: what is to be done.
        processes: their number.
        stop: looked at while waiting.
        begin: called once, when the first process has started and before it gets a task.

    Yields:
        A task, its result, and None; or for each task that a process had when it died the task, None, and the reason.

    Raises:
        Stopped: by ``stop``.
        Exception: what ``start`` or the work raises in a process.
    """
    context = multiprocessing.get_context('spawn')
    threads = max(1, torch.get_num_threads() // processes)
    workers: dict[Connection, tuple] = {}
    due = iter(tasks)
    begun = ended = False
    why = ''
    handler = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # children inherit it: Ctrl-C goes to all, and this one tells them
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
    open_ones = dict(workers)
    try:
        while open_ones:
            for connection in wait(list(open_ones), timeout=0.2):
                rank, process, held = open_ones[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    del open_ones[connection]
                    process.join(_PATIENCE)
                    if held or process.exitcode:
                        why = f'process {rank} of {processes} {_end_of(process.exitcode)}'
                    yield from ((task, None, f'{why} while it was at this or one of the two before') for task in held)
                    continue
                if kind == 'error':
                    raise value
                if kind == 'ready' and not begun:
                    begin()
                    begun = True
                if kind == 'result':
                    yield held.pop(0), value, None
                while len(held) < _AHEAD and not ended:
                    task = next(due, None)
                    if task is None:
                        ended = True
                        for other in open_ones:
                            _send(other, None)
                    else:
                        held.append(task)
                        _send(connection, task)
            stop.check()
        yield from ((task, None, f'no process was left to do it: {why}') for task in due)
    finally:
        for connection in workers:
            connection.close()
        for _, process, _ in workers.values():
            if open_ones:  # by an error or a signal: each ends at the next place where it can
                process.terminate()
        for _, process, _ in workers.values():
            process.join(_PATIENCE)
            process.kill()
            process.join()


def _send(connection: Connection, message) -> None:
    with contextlib.suppress(OSError):  # it died: its end is what it says next
        connection.send(message)


def _end_of(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f'was ended by {name}{" (out of memory?)" if name == "SIGKILL" else ""}'
    return f'ended with status {status}'


def _serve(connection: Connection, start: Callable[[int], Work], rank: int, threads: int) -> None:
    """What a process does: start, then work until it gets None or the one that it works for is gone."""
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    try:
        work = start(rank)
        connection.send(('ready', None))
        with StopSignals(signal.SIGTERM) as stop:
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
