"`clae_table` and `clae_figure` as processes: killed, shared, on Ray."
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from clae_fastai.cli import clae_figure, clae_table

def done(out): return {f.parent.name: f.stat().st_mtime_ns for f in out.glob('runs/*/summary.json')}

def starts(out): return sum(f.read_text().count(' training images of ') for f in out.glob('runs/*/log.txt'))

def popen(cwd, *args): return subprocess.Popen([Path(sys.executable).with_name(args[0]), *args[1:]], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

@pytest.mark.slow
def test_killed_and_shared(tmp_path, cli):
    "Killed half-way, then gone on with by two processes at once: no trial is done twice"
    out = tmp_path/'results'
    p = popen(tmp_path, 'clae_table', '1', '--scale', 'smoke')
    while len(done(out)) < 3: assert p.poll() is None; time.sleep(.05)
    p.kill(); p.wait()
    before = done(out)
    n = starts(out)
    assert len(before) <= n <= len(before) + 1
    ps = [popen(tmp_path, 'clae_table', '1', '--scale', 'smoke') for _ in range(2)]
    texts = [p.communicate(timeout=600)[0] for p in ps]
    assert [p.returncode for p in ps] == [0,0], texts
    after = done(out)
    assert len(after) == 9 and all(after[k] == v for k,v in before.items())
    assert starts(out) == n + 9 - len(before)
    r = cli('clae_table', '1', '--scale', 'smoke') # all is there
    assert r.returncode == 0 and starts(out) == n + 9 - len(before) and 'not run' not in r.stdout
    assert re.search(r'^\| simclr \| 0.03 \| \d+\.\d \| \d+\.\d \|$', r.stdout, re.M) and len(pd.read_csv(out/'table1-smoke.csv')) == 9

@pytest.mark.slow
def test_ray_gives_the_same_figure(cli):
    if not find_spec('ray'): pytest.skip('needs ray')
    args = ['clae_figure', '6b', '--scale', 'smoke']
    for extra in (['--out', 'here', '--workers', 2], ['--out', 'there', '--ray', 'local']):
        r = cli(*args, *extra)
        assert r.returncode == 0, r.stdout + r.stderr
    a,b = (pd.read_csv(cli.cwd/o/'fig6b-smoke.csv').drop(columns='train_seconds') for o in ('here','there'))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert len(a) == 2 and (cli.cwd/'there'/'fig6b-smoke.png').exists()

@pytest.mark.slow
@pytest.mark.parametrize('which', ['2','3a','3b','4'])
def test_figures_of_an_encoder(tmp_path_factory, monkeypatch, which, capsys):
    "Of one trial, which all of them share"
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    clae_figure(which, scale='smoke', out='looks')
    out = Path('looks')
    assert starts(out) == 1 and f'# Figure {which}' in capsys.readouterr().out
    assert (out/f'fig{which}-smoke.png').stat().st_size > 5000 and len(pd.read_csv(out/f'fig{which}-smoke.csv')) >= 8

@pytest.mark.parametrize('args,word', [((clae_table,'3'),'1, 2'), ((clae_figure,'8'),'3a'), ((clae_table,'1','--data','nowhere'),'NAME=FOLDER'), ((clae_table,'1','--workers','0','--scale','smoke'),'workers'), ((clae_table,'1','--seeds','0'),'seeds')])
def test_wrong_arguments(command, args, word): assert word in command(*args)
