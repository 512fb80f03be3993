"""What a checkpoint must not be able to do."""

import os
from pathlib import Path


class Evil:
    """Makes the folder ``trace`` when it is unpickled, as any code could be run."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
