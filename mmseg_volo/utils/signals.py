"""Turn SIGINT and SIGTERM into a flag that long-running work polls at safe points."""

import os
import signal
import threading


class Stopped(RuntimeError):
    """A signal ended the work early; everything done until then is complete."""

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells expect of a process ended by this signal."""
        return 128 + self.number


class StopSignals:
    """Inside the ``with`` block, signals only set a flag; a second SIGINT raises KeyboardInterrupt at once.

    Outside the main thread this does nothing, because only the main thread can handle signals.

    Args:
        numbers: the signals; by default SIGINT and SIGTERM.
        notice: what the process says on stderr when the first signal arrives.

    Attributes:
        received: number of the last signal that arrived in the block, else None.
    """

    def __init__(self, *numbers: int, notice: str = 'stopping'):
        self.received: int | None = None
        self._numbers = numbers or (signal.SIGINT, signal.SIGTERM)
        self._notice = notice
        self._handlers: dict = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in self._numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.received = None

    def check(self, *_) -> None:
        """Raise :class:`Stopped` if a signal arrived. Arguments are ignored, so this can be a progress callback."""
        if self.received is not None:
            raise Stopped(self.received)

    def _on_signal(self, number: int, frame) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        if self.received is None:
            os.write(2, f'\n{signal.Signals(number).name}: {self._notice}\n'.encode())
        self.received = number
