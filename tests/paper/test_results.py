"The committed results are what the committed trials give."
import json, re, runpy, shutil
from pathlib import Path

import pandas as pd
import pytest

from clae_fastai.paper.experiments import figure, grids, table

root = Path(__file__).parents[2]
results = root/'results'
names = {f'{k}-{scale}': g for scale in ('small','fast') for k,g in grids(scale).items()
         if (results/f'{k}-{scale}.md').exists()}

@pytest.mark.parametrize('name', names)
def test_tables_of_the_trials(name, tmp_path, monkeypatch):
    "Rendered again, a table or figure has the committed text"
    monkeypatch.chdir(tmp_path)
    shutil.copy(results/'trials.csv', tmp_path)
    sets = pd.read_csv(results/f'{name}.csv')['data'].unique()
    for o in sets: Path(o).mkdir() # a folder's name is what counts
    seeds = int(re.search(r', (\d+) seeds?\.', (results/f'{name}.md').read_text())[1])
    which,scale = name.rsplit('-', 1)
    make = figure if names[name].x else table
    data = [o if o == 'digits' else str(tmp_path/o) for o in sets]
    file = make(re.sub('^(fig|table)', '', which), scale, data, seeds, out=tmp_path)
    assert file.read_text() == (results/f'{name}.md').read_text()
    assert file.with_suffix('.csv').read_text() == (results/f'{name}.csv').read_text()

def test_claims(monkeypatch):
    monkeypatch.syspath_prepend(str(root/'benchmarks'))
    assert runpy.run_path(str(root/'benchmarks'/'claims.py'))['text']() == (results/'claims.md').read_text()

@pytest.fixture
def page(monkeypatch):
    "The results page's helpers by name, and `(expression, outputs by type)` of each cell that shows something"
    monkeypatch.chdir(root/'nbs')
    cells = [o for o in json.loads(Path('results.ipynb').read_text())['cells'] if o['cell_type'] == 'code']
    names,shown = {},[]
    for cell in cells:
        first,_,code = ''.join(cell['source']).partition('\n')
        if first == '#| hide': exec(code, names)
        else: shown.append((code, {k: ''.join(v) for o in cell['outputs'] for k,v in o.get('data', {}).items()}))
    return names,shown

def test_the_page_shows_them(page):
    "The notebook's outputs are the files' text; of pictures, what is said of them"
    names,shown = page
    assert len(shown) > 8
    pictures = 0
    for code,out in shown:
        now = eval(code, names).data
        if 'text/markdown' in out: assert out['text/markdown'] == now, code
        else:
            alts = [re.findall('alt="(.*?)"', o) for o in (out['text/html'], now)]
            assert alts[0] == alts[1] and alts[0], code
            pictures += sum('the baseline' in o for o in alts[0])
    assert pictures >= 16

def test_no_verdict_is_lost(page):
    "Each claim's verdict is in the page's first table, or said not to be tested"
    names,_ = page
    text = names['verdicts']().data.partition('<details')[0]
    rows = [o for o in (results/'claims.md').read_text().splitlines() if o.startswith('| ')][1:]
    for o in rows:
        claim,*_,verdict = (c.strip() for c in o.strip('|').split(' | '))
        assert f'| {claim}' in text or re.search(re.escape(claim) + r'( \(|;|\.)', text.split('Not tested: ')[1])
        if verdict != 'not tested':
            start = re.escape(f'| {claim}') + r'( \(.*?\))?(, on digits)? \| '
            line, = [l for l in text.splitlines() if re.match(start, l)]
            said = line.split(' | ')[1].replace('**', '')
            assert all(v in said for v in verdict.split('<br>'))
    counts = dict((k,int(n)) for n,k in
                  re.findall(r'(\d+) (reproduced|within noise|not reproduced)', text.splitlines()[0]))
    each = [v.split(': ')[-1] for o in rows for v in o.strip('|').split(' | ')[-1].strip().split('<br>')]
    assert counts == {k: each.count(k) for k in counts} and len(counts) == 3

def test_the_page_of_the_demonstration_shows_it():
    cells = json.loads((root/'nbs'/'digits.ipynb').read_text())['cells']
    shown, = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', [])]
    assert shown == (results/'digits.md').read_text()
