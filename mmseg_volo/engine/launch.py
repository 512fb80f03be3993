"""``python -m mmseg_volo.engine.launch [OPTIONS] SCRIPT ...``: torchrun that returns the exit status of the script."""

import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import STOPPED_NOTE, TrainingStopped


def main() -> int:
    """Run torchrun.

    Returns:
        0, ``TrainingStopped.exit_code`` if a signal stopped training after a save, or the status of the first failed
        process.
    """
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, 'stopped')
        os.environ[STOPPED_NOTE] = str(note)
        try:
            run.main(sys.argv[1:])
            return 0
        except ChildFailedError as error:
            if note.exists():
                return TrainingStopped.exit_code
            print(error, file=sys.stderr)
            code = error.get_first_failure()[1].exitcode
            return code if code > 0 else 128 - code
        except SignalException as error:  # torchrun forwarded the signal, and its processes have ended
            return TrainingStopped.exit_code if note.exists() else 128 + signal.Signals(error.sigval)


if __name__ == '__main__':
    sys.exit(main())
