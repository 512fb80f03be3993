"""The errors that a user can put right: the tools print them as one line and end with status 1."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file, what was expected and what was found."""


class ConfigError(ValueError):
    """A config, an option and the machine that do not go together."""


class DataError(Exception):
    """Data that cannot be trained on or measured with; the message names the file and the remedy."""

    def __init__(self, message: str):
        # A DataLoader worker's error arrives wrapped in the text of its traceback.
        if message.startswith('Caught DataError in'):
            message = message.rsplit('DataError: ', 1)[-1].rstrip()
        super().__init__(message)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names the file, the reason and what is left intact."""


class ExportError(RuntimeError):
    """An exported file is not valid, or gives other results than the model; it was not kept."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite, and does not become so again."""


class TrainingStopped(RuntimeError):
    """Training ended early because it was told to; everything is saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: run it again, with --resume


class ProcessLost(RuntimeError):
    """Another process that this one needs has ended: a data loader's worker, or one of a distributed run."""


USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    SaveError,
    ExportError,
    TrainingDiverged,
    ProcessLost,
    OSError,  # the system's own words name the file and the reason
)
# Names a file that a process which was stopped by a signal leaves for who launched it.
STOPPED_NOTE = 'MMSEG_VOLO_STOPPED_NOTE'
