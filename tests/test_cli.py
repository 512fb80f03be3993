"""Arguments that the command-line tools share."""

import argparse

import pytest

from mmseg_volo.cli import add_common_arguments


def parse(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    return parser.parse_args(['--cfg-options', *words]).cfg_options


def test_options_of_a_config_are_parsed_as_mmengine_does():
    assert parse('train_cfg.max_iters=4', 'a=(1,2)', 'b=x=y') == {'train_cfg.max_iters': 4, 'a': (1, 2), 'b': 'x=y'}


@pytest.mark.parametrize('words', [['train_cfg.max_iters', '4'], ['=4'], ['a=(1,2'], ['a=[(1,2]']])
def test_options_of_another_form_are_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and f'--cfg-options {words[0]}' in error
