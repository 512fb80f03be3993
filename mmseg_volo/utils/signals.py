"""Ctrl-C and SIGTERM as a wish that long work looks at where it can end well."""

import os
import signal
import threading


class Stopped(RuntimeError):
    """Work ended early because a signal asked for it; what was done until then is whole."""

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells expect of a process that was ended by this signal."""
        return 128 + self.number


class StopSignals:
    """While it is entered, signals do nothing but make :meth:`check` raise; a second Ctrl-C interrupts at once.

    In another thread than the main one it does nothing: signals are the main thread's.

    Args:
        numbers: the signals.
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
        """Raise :class:`Stopped` if a signal came; takes what progress reports give, so that it can be one."""
        if self._came is not None:
            raise Stopped(self._came)

    def _on_signal(self, number: int, frame) -> None:
        if self._came == signal.SIGINT == number:
            raise KeyboardInterrupt
        if self._came is None:
            os.write(2, f'\n{signal.Signals(number).name}: stopping\n'.encode())
        self._came = number
