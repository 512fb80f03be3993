"""Start the workers of a process pool."""

import multiprocessing
import os
import signal
import threading


def init_worker() -> None:
    """Leave Ctrl-C to the parent, which ends the pool, and end when the parent is killed.

    A killed parent cannot end its pool, and the workers would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
