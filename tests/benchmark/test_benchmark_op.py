"""``tools/benchmark.py op`` on small grids, with the implementations that run on this machine."""

from functools import partial

import pytest
import torch
from benchmarking import MACHINE, ON_CPU, rows_of, run, spread

from mmseg_volo.benchmark import IMPLEMENTATIONS, MODES, OpCase, op

TINY = ['--shape', 'd1@72', '--batch', 2, '--rounds', 1, *ON_CPU]
COLUMNS = {'arch', 'image', 'grid', 'channels', 'heads', 'batch', 'precision', 'mode', 'impl', 'rounds', 'calls'}
COLUMNS |= {*spread('seconds'), *spread('times_faster'), *spread('times_faster_than_compiled'), 'call_mb'}
COLUMNS |= {'memory_ratio', 'moved_mb', 'gb_per_s', 'copy_gb_per_s', 'share_of_copy'}
COLUMNS |= {'max_error', 'max_error_v_grad', 'max_error_logits_grad'}


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch) -> None:
    """The copy whose bandwidth is measured."""
    monkeypatch.setattr(op, '_COPIED', dict(cpu=2**24, cuda=2**30))
    op.copy_gb_per_s.cache_clear()


def runs_here(case: OpCase, impl: str) -> bool:
    try:
        case.results(case.build_alone(impl), case.draw(0))
    except ValueError:
        return False
    return True


def test_op(tmp_path, capsys):
    run('op', *TINY, '--precision', 'fp32', 'bf16', '--impl', *IMPLEMENTATIONS, '--no-compiled', '--out', tmp_path)
    rows = rows_of(tmp_path / 'op.csv')
    assert set(rows[0]) == COLUMNS | MACHINE
    reference = {(row['precision'], row['mode']): row for row in rows if row['impl'] == 'reference'}
    assert len(reference) == 4
    for precision in ('fp32', 'bf16'):
        for mode in MODES:
            case = OpCase(image=72, batch=2, precision=precision, mode=mode)
            found = [row['impl'] for row in rows if (row['precision'], row['mode']) == (precision, mode)]
            assert found == ['reference', *(impl for impl in IMPLEMENTATIONS if runs_here(case, impl))]
    for row in rows:
        assert row['grid'] == '9' and row['channels'] == '192' and float(row['times_faster']) > 0
        names = ['max_error', *(['max_error_v_grad', 'max_error_logits_grad'] if row['mode'] == 'full' else [])]
        assert (row['max_error_v_grad'] == '') == (row['mode'] == 'forward')
        for name in names:
            error, allowed = float(row[name]), 2 * float(reference[row['precision'], row['mode']][name])
            assert 0 < error < (1e-5 if row['precision'] == 'fp32' else 0.1)
            assert error <= allowed + (1e-6 if row['precision'] == 'fp32' else 1e-2)
    printed = capsys.readouterr().out
    assert '$ python tools/benchmark.py op --shape d1@72' in printed and 'of a copy' in printed


def test_what_cannot_run_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    real = op.outlook_attention

    def refusing(*args, impl, **options):
        if impl == 'fused':
            raise ValueError('needs what is not here\nand more')
        return real(*args, impl=impl, **options)

    monkeypatch.setattr(op, 'outlook_attention', refusing)
    run('op', *TINY, '--mode', 'forward', '--no-compiled', '--out', tmp_path)
    assert [row['impl'] for row in rows_of(tmp_path / 'op.csv')] == ['reference']
    said = 'd1@72, batch 2, fp32, forward: fused does not run here: needs what is not here\n'
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_definition_compiled(tmp_path, capsys):
    run('op', *TINY, '--mode', 'forward', '--out', tmp_path)
    rows = {row['impl']: row for row in rows_of(tmp_path / 'op.csv')}
    if op.COMPILED not in rows:  # then it has to be said
        assert f'{op.COMPILED} does not run here: needs a C++ compiler' in capsys.readouterr().err
        pytest.skip('needs a C++ compiler')
    assert list(rows) == ['reference', op.COMPILED, 'fused']
    assert float(rows[op.COMPILED]['max_error']) < 1e-5 and float(rows[op.COMPILED]['times_faster_than_compiled']) == 1


def test_bytes_that_must_move():
    sizes = dict.fromkeys(MODES)
    for mode in MODES:
        case = OpCase(image=64, batch=3, precision='bf16', mode=mode)
        inputs = case.draw(0)
        sizes[mode] = case.moved_bytes(inputs)
        assert inputs.v.shape == (3, 8, 8, 192) and inputs.logits.shape == (3, 4, 4, 6, 9, 9)
    v, logits = 2 * 3 * 64 * 192, 2 * 3 * 16 * 6 * 81
    assert sizes == dict(forward=2 * v + logits, full=5 * v + 3 * logits)


def test_a_wrong_result_has_a_large_error():
    case = OpCase(image=64, batch=2, mode='full')
    inputs = case.draw(0)
    reference = partial(op.outlook_attention, impl='reference')

    def wrong_in_the_last_image(v, logits, **options):
        out = reference(v, logits, **options)
        return torch.cat([out[:-1], 1.1 * out[-1:]])

    assert max(case.errors(reference, inputs).values()) < 1e-5
    assert min(case.errors(wrong_in_the_last_image, inputs).values()) > 1e-3


@pytest.mark.gpu
def test_op_on_a_gpu(gpu, tmp_path):
    run('op', '--shape', 'd1@256', '--precision', 'fp32', 'fp16', '--rounds', 2, '--device', gpu, '--out', tmp_path)
    rows = rows_of(tmp_path / 'op.csv')
    assert {row['impl'] for row in rows} == {'reference', op.COMPILED, 'fused'} and len(rows) == 12
    for row in rows:
        assert float(row['call_mb']) > 0
        assert float(row['max_error']) < (1e-4 if row['precision'] == 'fp32' else 0.1)
