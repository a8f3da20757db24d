"""`benchmarks/gpu.py` on a processor: every part makes its table, without a row that failed,
and the committed results stay."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).parent.parent
parts = ['environment','golden','waits','step','throughput','evaluation','processes']

@pytest.mark.slow
def test_all_parts_make_their_tables(tmp_path):
    before = {f: f.stat().st_mtime_ns for f in (root/'results').iterdir()}
    command = [sys.executable, root/'benchmarks'/'gpu.py', '--tiny', '--out', tmp_path]
    r = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr
    assert sorted(f.stem for f in tmp_path.iterdir()) == sorted(f'gpu_{p}' for p in parts)
    for part in parts:
        lines = (tmp_path/f'gpu_{part}.md').read_text().splitlines()
        rows = [line for line in lines if line.startswith('|')]
        assert len(rows) > 3 and len({row.count('|') for row in rows}) == 1, part
        assert not [row for row in rows
                    if 'Error' in row or 'not reached' in row or 'memory |' in row and row != rows[0]], rows
        assert 'There was no GPU' in '\n'.join(lines) and not [line for line in lines if line.startswith('This part')]
    assert ('| 2 |' in (tmp_path/'gpu_processes.md').read_text() and
            '| equal |' in (tmp_path/'gpu_processes.md').read_text())
    assert {f: f.stat().st_mtime_ns for f in (root/'results').iterdir()} == before

@pytest.mark.slow
def test_a_row_that_fails_says_why(tmp_path, monkeypatch):
    "And those after it are there; one that comes too late says so"
    monkeypatch.syspath_prepend(root/'benchmarks')
    import gpu
    args = gpu.argparse.Namespace(out=tmp_path, tiny=True, until=gpu.time.time() + 1000)
    table = gpu.Table('step', ['what','result'], 'A note.', args)
    def _fail(e): raise e
    table.measure(['one'], lambda: _fail(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')))
    table.measure(['two'], lambda: _fail(RuntimeError('no compiler\nwas | found')))
    table.measure(['three'], lambda: ['3'])
    args.until = gpu.time.time() + 1
    table.measure(['four'], lambda: ['4'])
    rows = ['| one | out of memory |', '| two | RuntimeError: no compiler was / found |', '| three | 3 |',
            '| four | not reached in time |']
    assert (tmp_path/'gpu_step.md').read_text().splitlines()[2:6] == rows
