"""Errors that a user can fix: tools print them as one line and exit with status 1."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, what was expected and what was found."""


class ConfigError(ValueError):
    """The config, the options and the machine do not fit each other."""


class DataError(Exception):
    """Data cannot be used for training or evaluation; the message names the file and the fix."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error again with the traceback as its message.
        if message.startswith('Caught DataError in'):
            message = message.rsplit('DataError: ', 1)[-1].rstrip()
        super().__init__(message)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names the file, the reason and the files left intact."""


class ExportError(RuntimeError):
    """An exported file is invalid or differs from the model; it was deleted."""


class HubError(RuntimeError):
    """The Hugging Face hub cannot be reached, refuses a request or lacks a file; the message says what to do."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite and has not recovered."""


class TrainingStopped(RuntimeError):
    """Training was stopped early by request; its state is saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: run again with --resume


class ProcessLost(RuntimeError):
    """Another process that this one needs has died: a data loader worker or a rank."""


USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    SaveError,
    ExportError,
    HubError,
    TrainingDiverged,
    ProcessLost,
    OSError,  # the system's message names the file and the reason
)
# Environment variable with the path of a file that a process writes for its launcher when a signal stops it.
STOPPED_NOTE = 'MMSEG_VOLO_STOPPED_NOTE'
