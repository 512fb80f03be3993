"""Read a config file and apply command-line options to it."""

from pathlib import Path

from mmengine.config import Config


def load_config(path: str, options: dict | None = None, work_dir: str | None = None, launcher: str = 'none') -> Config:
    """Read a config and apply command-line options to it.

    Args:
        path: the config file.
        options: overrides by dotted key.
        work_dir: folder for logs and checkpoints; by default the config's, or ``work_dirs/<name of the config>``.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        FileNotFoundError: the config does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'config {path} does not exist; the configs of this package are in configs/')
    config = Config.fromfile(path)
    if options:
        config.merge_from_dict(options)
    config.launcher = launcher
    config.work_dir = work_dir or config.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return config
