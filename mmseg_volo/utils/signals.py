"""Turn SIGINT and SIGTERM into a flag that long-running work polls at safe points."""

import os
import signal
import threading


class Stopped(RuntimeError):
    """A signal stopped the work early; everything done so far is complete."""

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.number = number

    @property
    def status(self) -> int:
        """The exit status of a process that this signal ended, by the convention of shells."""
        return 128 + self.number


class StopSignals:
    """Context in which signals only make :meth:`check` raise; a second Ctrl-C interrupts at once.

    It has no effect outside the main thread, the only one that may handle signals.

    Args:
        numbers: the signals; by default SIGINT and SIGTERM.
    """

    def __init__(self, *numbers: int):
        self._numbers = numbers or (signal.SIGINT, signal.SIGTERM)
        self._came: int | None = None
        self._handlers: dict = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in self._numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def check(self, *_) -> None:
        """Raise :class:`Stopped` if a signal came; ignores arguments, so that it can be a progress callback."""
        if self._came is not None:
            raise Stopped(self._came)

    def _on_signal(self, number: int, frame) -> None:
        if self._came == signal.SIGINT == number:
            raise KeyboardInterrupt
        if self._came is None:
            os.write(2, f'\n{signal.Signals(number).name}: stopping\n'.encode())
        self._came = number
