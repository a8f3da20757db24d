"The committed results are what the committed trials give."
import json, re, runpy, shutil
from pathlib import Path

import pandas as pd
import pytest

from clae_fastai.paper.experiments import figure, grids, table

root = Path(__file__).parents[2]
results = root/'results'
names = {k: g for k,g in grids('small').items() if (results/f'{k}-small.md').exists()}

@pytest.mark.parametrize('name', names)
def test_tables_of_the_trials(name, tmp_path, monkeypatch):
    "Rendered again, a table or figure has the committed text"
    monkeypatch.chdir(tmp_path)
    shutil.copy(results/'trials.csv', tmp_path)
    sets = pd.read_csv(results/f'{name}-small.csv')['data'].unique()
    for o in sets: Path(o).mkdir() # a folder's name is what counts
    seeds = int(re.search(r', (\d+) seeds?\.', (results/f'{name}-small.md').read_text())[1])
    make = figure if names[name].x else table
    data = [o if o == 'digits' else str(tmp_path/o) for o in sets]
    file = make(re.sub('^(fig|table)', '', name), 'small', data, seeds, out=tmp_path)
    assert file.read_text() == (results/f'{name}-small.md').read_text()
    assert file.with_suffix('.csv').read_text() == (results/f'{name}-small.csv').read_text()

def test_claims(monkeypatch):
    monkeypatch.syspath_prepend(str(root/'benchmarks'))
    assert runpy.run_path(str(root/'benchmarks'/'claims.py'))['text']() == (results/'claims.md').read_text()

def test_the_page_shows_them(monkeypatch):
    "The notebook's outputs are the files' text"
    monkeypatch.chdir(root/'nbs')
    cells = json.loads(Path('results.ipynb').read_text())['cells']
    cells = [(''.join(c['source']), c['outputs']) for c in cells if c['cell_type'] == 'code']
    helper, = [s for s,_ in cells if 'def show' in s]
    exec(helper, names := {})
    calls = [(s.splitlines()[-1], outs) for s,outs in cells if s.splitlines()[-1].startswith('show(')]
    assert len(calls) > 10
    for call,outs in calls:
        shown, = [''.join(o['data']['text/markdown']) for o in outs if 'text/markdown' in o.get('data', {})]
        assert shown == eval(call, names).data, call

def test_the_page_of_the_demonstration_shows_it():
    cells = json.loads((root/'nbs'/'digits.ipynb').read_text())['cells']
    shown, = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', [])]
    assert shown == (results/'digits.md').read_text()
