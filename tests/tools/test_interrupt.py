"""Ctrl-C ends every tool with status 130 and no traceback, also while the packages are imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT

from mmseg_volo.cli import run_tool

TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('*.py'))
assert TOOLS


@pytest.mark.parametrize('name', [*TOOLS, 'dist_train.sh'])
def test_during_the_imports(name):
    program = sys.executable if name.endswith('.py') else 'bash'
    command = [program, ROOT / 'tools' / name, *(['--help'] if name.endswith('.py') else ['config.py', '2'])]
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    # Python then tells each module that it has imported.
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PATH': path, 'PYTHONPROFILEIMPORTTIME': '1'}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as tool:
        for line in tool.stderr:
            if '| ' in line and line.rpartition('|')[2].strip().split('.')[0] in ('numpy', 'torch', 'mmengine'):
                break
        tool.send_signal(signal.SIGINT)
        out, error = tool.communicate(timeout=60)
    assert tool.returncode == 130
    assert 'usage' not in out and 'Traceback' not in error and 'KeyboardInterrupt' not in error


def test_while_the_tool_works(capsys):
    before = signal.getsignal(signal.SIGINT)

    def main():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    try:
        signal.signal(signal.SIGINT, lambda *_: pytest.fail('the handler of the imports'))
        with pytest.raises(SystemExit) as ended:
            run_tool(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr() == ('', '')
