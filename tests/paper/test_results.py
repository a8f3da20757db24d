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

@pytest.fixture
def page(monkeypatch):
    "The results page's helpers by name, and `(last line, outputs)` of each of its code cells"
    monkeypatch.chdir(root/'nbs')
    cells = [o for o in json.loads(Path('results.ipynb').read_text())['cells'] if o['cell_type'] == 'code']
    sources,names = [''.join(o['source']) for o in cells],{}
    for o in sources:
        if '#| hide' in o: exec(o, names)
    return names,[(s.splitlines()[-1], o['outputs']) for s,o in zip(sources, cells)]

def test_the_page_shows_them(page):
    "The notebook's outputs are the files' text"
    names,cells = page
    calls = [o for o in cells if o[0].startswith(('show(','verdicts('))]
    assert len(calls) > 15
    for call,outs in calls:
        shown, = [''.join(o['data']['text/markdown']) for o in outs if 'text/markdown' in o.get('data', {})]
        assert shown == eval(call, names).data, call

def test_the_page_draws_them(page):
    "What the figures say is what the files give: it stands in the pictures' descriptions"
    names,cells = page
    calls = [o for o in cells if o[0].startswith('panels(')]
    assert len(calls) == 7
    for call,outs in calls:
        shown, = [''.join(o['data']['text/html']) for o in outs if 'text/html' in o.get('data', {})]
        alts = [re.findall('alt="(.*?)"', o) for o in (shown, eval(call, names).data)]
        assert alts[0] == alts[1] and len(alts[0]) == 2 and all('the baseline' in o for o in alts[0]), call

def test_no_verdict_is_lost(page):
    "Each claim's verdict is in the page's first table, or said not to be tested"
    names,_ = page
    text = names['verdicts']().data.partition('<details')[0]
    rows = [o for o in (results/'claims.md').read_text().splitlines() if o.startswith('| ')][1:]
    for o in rows:
        claim,*_,verdict = (c.strip() for c in o.strip('|').split(' | '))
        assert f'| {claim}' in text or f'{claim} (' in text.split('Not tested: ')[1]
        if verdict != 'not tested':
            line, = [l for l in text.splitlines() if l.startswith(f'| {claim}')]
            said = line.split(' | ')[1].replace('**', '')
            assert all(v in said for v in verdict.split('<br>'))
    counts = dict((k,int(n)) for n,k in re.findall(r'(\d+) (reproduced|within noise|not reproduced)', text.splitlines()[0]))
    each = [v.split(': ')[-1] for o in rows for v in o.strip('|').split(' | ')[-1].strip().split('<br>')]
    assert counts == {k: each.count(k) for k in counts} and len(counts) == 3

def test_the_home_page_shows_table_1():
    "Its outputs are what its code makes of the files"
    def lines(file, start): return [o for o in (root/file).read_text().splitlines() if re.match(start, o)]
    cifar10 = lines('results/table1-small.md', r'\| cifar10.* \| 0\.03 \|')
    rows = [[o.strip() for o in l.split('|')[1:-1]] for l in cifar10]
    shown = lines('README.md', r'\| (Plain|UEL|SimCLR) \|')
    assert len(rows) == len(shown) == 6
    for _,metric,method,_,mean,values,difference in rows:
        line, = [l for l in shown if l.lower().startswith(f'| {method} | {metric.lower()} |')]
        assert line.endswith(f'| {mean} ({values}) | {difference} |')
