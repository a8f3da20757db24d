"Sweeps whose workers die; names, aggregates and rendering."
import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from experiments_worker import events, fake, trials
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from clae_fastai.paper.experiments import aggregate, figure, grids, paired, sweep, table, trial_name

results = Path(__file__).parents[2]/'results'

def summaries(folder): return sorted(o.parent.name for o in folder.glob('*/summary.json'))

# several processes

dies,fails,kills = (trials(1, does=o)[0] for o in ('die','fail','always die'))

def sweep_of_two(folder):
    "By two processes that meet: one dies of a trial, the other of the last one, and a trial fails. The error's text"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # who survives has a second to do before the deadly one, so that the dead one's trial is free by then
        todo = [*trials(2, does='meet'), *trials(6), dies, fails, *trials(1, sleep=1), kills]
        with pytest.raises(ValueError) as e: sweep(todo, fake, folder, workers=2)
    finally: torch.set_num_threads(before)
    return str(e.value)

@pytest.fixture
def swept(once): return once('swept', sweep_of_two)

@pytest.mark.slow
def test_two_workers_share_a_sweep_and_do_no_trial_twice(swept):
    folder,_ = swept
    log = events(folder)
    assert len({o[0] for o in log}) == len({o[0] for o in log if o[2] == 'end'}) == 2
    starts = Counter(o[1] for o in log if o[2] == 'start')
    assert len(starts) == 12 and set(starts.values()) == {1}
    assert Counter(o[1] for o in log if o[2] == 'end') == Counter(summaries(folder))

@pytest.mark.slow
def test_workers_have_their_share_of_the_threads(swept):
    assert {json.loads(f.read_text())['metrics']['threads'] for f in swept[0].glob('*/summary.json')} == {1}

@pytest.mark.slow
def test_what_a_dead_worker_leaves_the_other_takes(swept):
    log = [o for o in events(swept[0]) if o[1] == trial_name(dies)]
    assert [o[2] for o in log] == ['start','resume','end'] and log[0][0] != log[1][0]

@pytest.mark.slow
def test_what_failed_or_was_left_is_named_and_tried_again_next_time(swept, tmp_path):
    folder,error = swept
    bad,left = folder/trial_name(fails),folder/trial_name(kills)
    assert error.startswith(f'Of 12 trials 2 failed: {bad}, {left}. See error.txt')
    assert not (left/'error.txt').exists()
    assert 'KeyError' in (bad/'error.txt').read_text() and len(summaries(folder)) == 10
    assert [o[2] for o in events(folder) if o[1] in (bad.name, left.name)] == ['start']*2
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    sweep([fails], fake, tmp_path)
    assert len(summaries(tmp_path)) == 11 and not (tmp_path/bad.name/'error.txt').exists()

def test_what_somebody_finished_in_the_meantime_is_not_done_again(tmp_path, monkeypatch):
    acquire = filelock.FileLock.acquire
    def late(lock, *args, **kwargs): # between the look at the folder and the lock
        Path(lock.lock_file).with_name('summary.json').write_text('{}')
        return acquire(lock, *args, **kwargs)
    monkeypatch.setattr(filelock.FileLock, 'acquire', late)
    sweep(trials(1), fake, tmp_path)
    assert summaries(tmp_path) and not events(tmp_path)

def test_without_ray_its_name_is_in_the_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ValueError, match=r'clae_fastai\[ray\]'): sweep(trials(1), fake, tmp_path, ray='auto')

# names

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow]) # whatever else the machine does
finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.one_of(st.integers(-2**53, 2**53), finite, st.text(max_size=8), st.booleans())
base = dict(data='digits', method='plain', eps=.03, seed=0)
options = st.dictionaries(st.text('abcdefgh', min_size=1, max_size=6), values, max_size=6).map(lambda o: {**base, **o})

@relaxed
@given(options, st.randoms())
def test_a_name_is_that_of_the_settings_and_of_nothing_else(o, rnd):
    items = list(o.items())
    rnd.shuffle(items)
    as_float = {k: float(v) if type(v) is int and k != 'seed' else v for k,v in items}
    assert trial_name(o) == trial_name(dict(items)) == trial_name({**as_float, 'bs': None})
    assert trial_name(o).isascii() or any(not str(v).isascii() for v in o.values())
    assert len(Path(trial_name(o)).parts) == 1

@relaxed
@given(options, options)
def test_different_settings_have_different_names(a, b):
    def key(o): return {k: (type(v) is bool, v) for k,v in o.items()}
    assert (trial_name(a) == trial_name(b)) == (key(a) == key(b))

def test_names_are_as_they_were_on_the_first_day():
    first = dict(data='digits', method='simclr', eps=.03, alpha=1., epochs=2, seed=0)
    assert trial_name(first) == 'digits-simclr-eps0.03-seed0-9e72275cba'

def test_names_are_the_same_everywhere():
    "Those of the committed trials, which many processes made on several days"
    df = pd.read_csv(results/'trials.csv')
    outcome = '^(trial|knn|linear|train_seconds|device|images|version_.*|transfer_.*)$'
    for name,o in zip(df['trial'], df.drop(columns=df.filter(regex=outcome).columns).to_dict('records')):
        o = {k: v for k,v in o.items() if v == v} # no option is nan
        in_folder = dict(o, data='folder', path=f"/anywhere/{o['data']}")
        assert name in (trial_name(o), trial_name(in_folder))
    assert len(df) > 100

def test_a_committed_name_is_still_that_of_a_grids_trial(tmp_path):
    "So that its row is what a table takes, whatever the defaults of training have become"
    df,known = pd.read_csv(results/'trials.csv'),set()
    for data in set(df['data']) - {'digits'}: (tmp_path/data).mkdir()
    for scale in ('small','fast','smoke'):
        for grid in grids(scale).values():
            cells = grid.cells(scale, [*(str(tmp_path/o) for o in set(df['data']) - {'digits'}), 'digits'])
            known |= {trial_name(dict(o, seed=s)) for s in range(8) for _,o in cells}
    assert set(df['trial']) <= known

# aggregates

accuracies = st.lists(st.tuples(*[st.one_of(st.none(), st.floats(0, 1))]*2), min_size=1, max_size=6)

@relaxed
@given(accuracies, st.sampled_from([.5,.9,.95,.99]), st.randoms())
def test_aggregates_are_numpys_and_scipys(pairs, level, rnd):
    rows = [dict(seed=s, eps=e, data='d', knn=v) for s,p in enumerate(pairs) for e,v in zip((0,.03), p)]
    rnd.shuffle(rows)
    df = pd.DataFrame(rows).astype(dict(knn=float))
    by = ['data','eps']
    for e,got in zip((0,.03), zip(*pairs)):
        got = [v for v in got if v is not None]
        a = aggregate(df, by, 'knn')
        a = a[a.eps == e]
        assert len(a) == bool(got)
        if got:
            assert a['values'].item() == got and a['n'].item() == len(got)
            assert a['mean'].item() == pytest.approx(np.mean(got))
            sd = np.std(got, ddof=1) if len(got) > 1 else math.nan
            assert a['std'].item() == pytest.approx(sd, abs=1e-12, nan_ok=True)
    both,p = [o for o in pairs if None not in o],paired(df, by, 'knn', ('eps',0), level)
    assert len(p) == bool(both)
    if both:
        d = np.array(both)[:,1] - np.array(both)[:,0]
        assert p['values'].item() == pytest.approx(list(d)) and p['mean'].item() == pytest.approx(d.mean(), abs=1e-12)
        if len(d) > 1 and d.std() > 1e-9:
            low,high = scipy.stats.ttest_1samp(d, 0).confidence_interval(level)
            assert (p['low'].item(), p['high'].item()) == pytest.approx((low,high), abs=1e-9)
    assert (paired(df, by, 'knn', ('eps',.03), level)['mean'].to_numpy() == -p['mean'].to_numpy()).all()

def test_by_hand():
    df = pd.DataFrame(dict(seed=[0,1,2,3]*2, eps=[0]*4 + [.03]*4, knn=[.40,.42,.41,.45, .42,.43,.45,.46]))
    a,p = aggregate(df, ['eps'], 'knn'),paired(df, ['eps'], 'knn', ('eps',0))
    assert a['mean'].tolist() == pytest.approx([.42,.44])
    assert a['std'].tolist() == pytest.approx([math.sqrt(.0014/3), math.sqrt(.001/3)])
    sd = math.sqrt((.0**2 + .01**2 + .02**2 + .01**2)/3) # the differences are .02, .01, .04, .01, their mean .02
    half = 3.182446*sd/2 # t(.975, 3) from a table
    assert (p['mean'][0], p['low'][0], p['high'][0]) == pytest.approx((.02, .02 - half, .02 + half), abs=1e-7)

# tables and figures

def test_rows_are_written_as_they_come(tmp_path):
    "So that what is done is kept, whatever happens to the rest"
    seen = []
    def count(options, folder):
        seen.append(len(pd.read_csv(tmp_path/'trials.csv')) if (tmp_path/'trials.csv').exists() else 0)
        fake(options, folder)
    table('random', 'smoke', seeds=2, out=tmp_path, run=count)
    assert seen == [*range(6)]

def test_a_row_is_enough_on_another_machine(tmp_path):
    table('temperature', 'smoke', out=tmp_path/'a', run=fake)
    (tmp_path/'b').mkdir()
    shutil.copy(tmp_path/'a'/'trials.csv', tmp_path/'b')
    md = table('temperature', 'smoke', out=tmp_path/'b', run=fake).read_text()
    assert 'not run' not in md and not (tmp_path/'b'/'runs').exists()

@pytest.mark.parametrize('text', ['', 'a,b\n1,2\n'])
def test_damaged_rows_are_named(tmp_path, text):
    (tmp_path/'trials.csv').write_text(text)
    with pytest.raises(ValueError, match='trials.csv is damaged'): table('temperature', 'smoke', out=tmp_path, run=fake)
    assert (tmp_path/'trials.csv').read_text() == text

def test_a_damaged_summary_is_named(tmp_path):
    table('temperature', 'smoke', out=tmp_path, run=fake)
    file = next(tmp_path.glob('runs/*/summary.json'))
    file.write_text('')
    with pytest.raises(ValueError, match=f'{file.parent.name}.*damaged.*delete it'):
        table('temperature', 'smoke', out=tmp_path, run=fake)
    file.unlink()
    (tmp_path/'trials.csv').unlink()
    assert 'not run' not in table('temperature', 'smoke', out=tmp_path, run=fake).read_text()

def test_a_row_that_is_there_twice(tmp_path):
    a = table('temperature', 'smoke', out=tmp_path, run=fake).read_text()
    rows = (tmp_path/'trials.csv').read_text()
    (tmp_path/'trials.csv').write_text(rows + rows.partition('\n')[2])
    shutil.rmtree(tmp_path/'runs')
    assert table('temperature', 'smoke', out=tmp_path, run=fake).read_text() == a

def test_nothing_is_run_and_all_cells_say_so(tmp_path):
    md = table('1', 'paper', data=['cifar10','tinyimagenet'], out=tmp_path).read_text()
    wide = md.split('| data |')[0]
    assert wide.count('not run') == 9*3 and 'tinyimagenet kNN' not in wide and 'tinyimagenet LR' in wide
    assert pd.read_csv(tmp_path/'table1-paper.csv').empty and not (tmp_path/'runs').exists()

def test_the_papers_numbers_stand_beside_ours(tmp_path):
    md = table('2', 'paper', out=tmp_path).read_text()
    assert 'not run (paper: 61.7)' in md and 'not run (paper: 62.4)' in md

def test_data_that_is_nowhere_is_named_and_the_rest_runs(tmp_path, capsys):
    md = table('1', 'paper', ['cifar10','tinyimagenet'], seeds=1, out=tmp_path, run=fake).read_text()
    assert 'tinyimagenet=FOLDER' in capsys.readouterr().out
    assert md.split('| data |')[0].count('not run') == 9 and len(summaries(tmp_path/'runs')) == 9

def test_table1(tmp_path):
    file = table('1', 'smoke', seeds=3, out=tmp_path, run=fake)
    df = pd.read_csv(file.with_suffix('.csv'))
    assert len(df) == 27 and not df['trial'].duplicated().any() and 'path' not in df
    assert 'not run' not in file.read_text()
    assert df.groupby(['method','eps'])['knn'].count().eq(3).all()
    row = next(o for o in file.read_text().splitlines() if o.startswith('| digits | kNN | uel | 0.03 |'))
    assert row == '| digits | kNN | uel | 0.03 | 31.6 ± 1.0 | 30.60, 31.60, 32.60 | +0.3 [+0.3, +0.3] |'
    first = next(o for o in file.read_text().splitlines() if o.startswith('| uel | 0.03 |'))
    assert first == '| uel | 0.03 | 31.6 ± 1.0 | 51.6 ± 1.0 |'

@pytest.mark.parametrize('which', ['5a','5b','5c','6a','6b','6c','7'])
def test_figures(tmp_path, which):
    file = figure(which, 'smoke', seeds=2, out=tmp_path, run=fake)
    n = len(grids('smoke')[f'fig{which}'].cells('smoke'))
    assert len(pd.read_csv(file.with_suffix('.csv'))) == 2*n and 'not run' not in file.read_text()
    w,h = Image.open(file.with_suffix('.png')).size
    assert w > 700 and h > 300
    for f in tmp_path.glob('.*.tmp'): raise AssertionError(f'{f} was left')

@pytest.mark.parametrize('which', ['2','random','start','compute','strong'])
def test_other_tables(tmp_path, which):
    assert 'not run' not in (text := table(which, 'smoke', out=tmp_path, run=fake).read_text()) and '(one seed)' in text

def test_a_figure_is_drawn_whatever_is_missing(tmp_path):
    for which in ('5a','6b'):
        w,h = Image.open(figure(which, 'small', out=tmp_path).with_suffix('.png')).size
        assert w > 700 and h > 300

def draw(name, accuracies):
    "Axes and legend of a figure of made-up accuracies, {labels: one for each seed}"
    grid = replace(grids()[name], metrics=('knn',))
    rows = [dict(data='cifar10_12k', seed=s, knn=v, **dict(zip(grid.axes, key)))
            for key,vs in accuracies.items() for s,v in enumerate(vs)]
    fig = grid.draw(pd.DataFrame(rows))
    plt.close(fig)
    return fig.axes[0],[o.get_text() for o in fig.legends[0].get_texts()]

def test_a_single_seed_is_hollow_and_no_line_leads_there():
    ax,names = draw('fig6a', {(0,): [.30,.31,.32], (.2,): [.33], (.5,): [.33,.34,.36], (1,): [.34,.36,.35]})
    points = {o.lines[0].get_xdata()[0]: o.lines[0] for o in ax.containers}
    assert ({x: o.get_markerfacecolor() == 'white' for x,o in points.items()} ==
            {0: False, .2: True, .5: False, 1: False})
    line, = [o for o in ax.lines if len(o.get_xdata()) == 4]
    assert np.isnan(line.get_ydata()).tolist() == [False,True,False,False]
    assert len({o.get_color() for x,o in points.items() if x}) == 1 and points[0].get_color() != points[.2].get_color()
    level, = [o for o in ax.lines if o.get_linestyle() == '--']
    assert level.get_ydata() == pytest.approx([31,31]) and level.get_color() == points[0].get_color()
    assert names == ['CLAE','baseline','one seed']

def test_a_figures_title_is_what_was_found():
    base = {(64,0): [.30,.32,.31], (128,0): [.30,.33,.31], (256,0): [.33,.32,.34]}
    ax,names = draw('fig5a', base | {(64,.03): [.34,.36,.35], (128,.03): [.35,.29,.33], (256,.03): [.29,.28,.30]})
    assert ax.get_title(loc='left') == 'above the baseline at 2 of 3, clearly at 1\nclearly below at 1\nCIFAR-10'
    assert names == ['baseline','CLAE, eps 0.03']
    title = draw('fig5a', base | {(64,.03): [.34], (128,.03): [.35]})[0].get_title(loc='left')
    assert title == 'above the baseline at 2 of 2\nCIFAR-10; 2 of one seed'
    title = draw('fig5a', base)[0].get_title(loc='left')
    assert title.startswith('nothing to compare')

def test_rows_outlive_run_folders_and_serve_every_table(tmp_path):
    table('1', 'smoke', out=tmp_path, run=fake)
    shutil.rmtree(tmp_path/'runs')
    before = pd.read_csv(tmp_path/'trials.csv')
    md = table('1', 'smoke', out=tmp_path, run=fake).read_text()
    assert not summaries(tmp_path/'runs') and 'not run' not in md
    figure('6b', 'smoke', out=tmp_path, run=fake) # SimCLR with eps 0 and .03, which Table 1 has
    assert not summaries(tmp_path/'runs')
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'trials.csv'), before)
    table('1', 'smoke', seeds=2, out=tmp_path, run=fake)
    assert len(summaries(tmp_path/'runs')) == 9 and len(pd.read_csv(tmp_path/'trials.csv')) == 18

def test_a_table_stays_the_same_whatever_else_is_run(tmp_path):
    "Another grid's trials have columns that this one's have not"
    def csv(): return table('1', 'smoke', out=tmp_path, run=fake).with_suffix('.csv').read_text()
    before = csv()
    table('2', 'smoke', out=tmp_path, run=fake)
    figure('5b', 'smoke', out=tmp_path, run=fake)
    assert {'transfer','n_out'} <= set(pd.read_csv(tmp_path/'trials.csv')) and csv() == before

def test_results_of_failed_sweeps_are_rendered(tmp_path):
    def run(o, folder): fake({**o, **({'does': 'fail'} if o['method'] == 'uel' else {})}, folder)
    with pytest.raises(ValueError, match='Of 9 trials 3 failed'):
        table('1', 'smoke', out=tmp_path, run=run)
    assert (tmp_path/'table1-smoke.md').read_text().split('| data |')[0].count('not run') == 6

def test_other_files_stay(tmp_path):
    (tmp_path/'mine.csv').write_text('a\n1\n')
    table('1', 'smoke', out=tmp_path, run=fake)
    assert (tmp_path/'mine.csv').read_text() == 'a\n1\n'
    visible = sorted(o.name for o in tmp_path.iterdir() if o.name[0] != '.')
    assert visible == ['mine.csv','runs','table1-smoke.csv','table1-smoke.md','trials.csv']

def test_folders_as_data(tmp_path):
    for o in ('a/cifar10','b/cifar10'): (tmp_path/o).mkdir(parents=True)
    a,b = (tmp_path/o/'cifar10' for o in 'ab')
    cells = grids()['table1'].cells
    (_,of_a),*_ = cells(data=[a])
    (_,of_b),*_ = cells(data=b)
    assert of_a['data'] == 'folder' and of_a['path'] == str(a)
    assert trial_name({**of_a, 'seed': 0}) == trial_name({**of_b, 'seed': 0})
    with pytest.raises(ValueError, match='one name'): cells(data=[a, b])
    file = table('1', 'small', [a], out=tmp_path/'out', run=fake)
    for f in (file, file.with_suffix('.csv'), tmp_path/'out'/'trials.csv'): assert str(tmp_path) not in f.read_text()
    assert grids('paper')['table1'].cells('paper', ['tinyimagenet=here'])[0][1]['path'] == str(Path('here').resolve())

@pytest.mark.parametrize('make,args,word', [
    (table, dict(which='3'), '1, 2, random'),
    (figure, dict(which='8'), '5a, 5b'),
    (table, dict(which='1', scale='huge'), 'paper, small, fast, smoke'),
    (table, dict(which='1', seeds=0), 'seeds'),
    (figure, dict(which='2', workers=0), 'workers'),
    (table, dict(which='1', data=['nowhere']), 'NAME=FOLDER'),
    (table, dict(which='1', scale='paper', data=['digits']), 'plain-digits')])
def test_wrong_arguments(tmp_path, make, args, word):
    with pytest.raises(ValueError, match=word): make(**args, out=tmp_path)
    assert not [*tmp_path.iterdir()]

def test_markdown_of_some_seeds():
    g = grids('smoke')['fig6b']
    cs = g.cells('smoke')
    known = [(0,cs[0],.2), (1,cs[0],.3), (1,cs[1],.35)]
    rows = [dict(trial=trial_name({**o, 'seed': s}), knn=knn, linear=math.nan) for s,(_,o),knn in known]
    md = g.markdown(g.results(cs, pd.DataFrame(rows), 2))
    assert '| 0 | 25.0 ± 7.1 | not run |' in md and '| 0.03 | 35.0 | not run |' in md
    assert '| 35.00 | +5.0 (one seed) |' in md
