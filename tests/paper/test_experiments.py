"Sweeps by several processes, killed ones among them, and on a Ray cluster; names, aggregates and rendering."
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from experiments_worker import fake, trials
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from clae_fastai import experiments
from clae_fastai.paper.experiments import aggregate, figure, grids, paired, sweep, table, trial_name

worker = Path(__file__).with_name('experiments_worker.py')

def start(folder, n, seconds): return subprocess.Popen([sys.executable, '-W', 'ignore', worker, folder, str(n), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(.01)

def events(folder): return [o.split() for o in (folder/'log').read_text().splitlines()] if (folder/'log').exists() else []
def summaries(folder): return sorted(o.parent.name for o in folder.glob('*/summary.json'))

def finish(*processes):
    for p in processes:
        out,err = p.communicate(timeout=120)
        assert p.returncode == 0, err
    return out

# several processes

@pytest.mark.slow
def test_two_workers_share_a_sweep_and_do_no_trial_twice(tmp_path):
    ps = [start(tmp_path, 12, .15) for _ in range(2)]
    wait_for(lambda: len([*tmp_path.glob('ready-*')]) == 2)
    (tmp_path/'go').touch()
    finish(*ps)
    log = events(tmp_path)
    assert Counter(o[2] for o in log) == {'start': 12, 'end': 12} and len({o[1] for o in log}) == 12
    assert {int(o[0]) for o in log} == {p.pid for p in ps}
    assert len(summaries(tmp_path)) == 12

@pytest.mark.slow
def test_a_killed_worker_loses_one_trial_and_the_next_goes_on_with_it(tmp_path):
    (tmp_path/'go').touch()
    p = start(tmp_path, 6, .5)
    wait_for(lambda: [o[2] for o in events(tmp_path)].count('start') == 3)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    done = summaries(tmp_path)
    assert len(done) == 2
    finish(start(tmp_path, 6, .5))
    log = events(tmp_path)
    assert len(summaries(tmp_path)) == 6
    assert Counter(o[2] for o in log) == {'start': 6, 'end': 6, 'resume': 1} # the third went on where it was
    assert not {o[1] for o in log if int(o[0]) != p.pid} & set(done) # and nobody touched the two that were done

@pytest.fixture(scope='module')
def swept(tmp_path_factory):
    "A sweep by two processes, one of which dies, with a trial that fails: its folder and the error"
    folder = tmp_path_factory.mktemp('swept')
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError) as e: sweep([*trials(1, does='die'), *trials(6, sleep=1), *trials(1, does='fail'), *trials(1)], fake, folder, workers=2)
    finally: torch.set_num_threads(before)
    return folder,str(e.value)

@pytest.mark.slow
def test_workers_are_processes_with_their_share_of_the_threads(swept):
    assert len({o[0] for o in events(swept[0])}) == 2
    assert {json.loads(f.read_text())['metrics']['threads'] for f in swept[0].glob('*/summary.json')} == {1}

@pytest.mark.slow
def test_what_a_dead_worker_leaves_the_others_take(swept):
    died = trial_name(trials(1, does='die')[0])
    log = [o for o in events(swept[0]) if o[1] == died]
    assert [o[2] for o in log] == ['start','resume','end'] and log[0][0] != log[1][0]

@pytest.mark.slow
def test_a_failing_trial_is_tried_once_named_and_tried_again_next_time(swept):
    (folder,error),bad = swept,trials(1, does='fail')[0]
    assert error.startswith('Of 9 trials 1 failed') and str(folder/trial_name(bad)) in error and 'KeyError' in (folder/trial_name(bad)/'error.txt').read_text()
    assert len(summaries(folder)) == 8 and [o[2] for o in events(folder) if o[1] == trial_name(bad)] == ['start']
    sweep([bad], fake, folder)
    assert len(summaries(folder)) == 9 and not (folder/trial_name(bad)/'error.txt').exists()

@pytest.mark.slow
def test_a_sweep_whose_workers_all_died_says_so(tmp_path):
    with pytest.raises(ValueError, match='Of 1 trials 1 were left undone'): sweep(trials(1, does='always die'), fake, tmp_path, workers=2)

def test_what_somebody_finished_in_the_meantime_is_not_done_again(tmp_path, monkeypatch):
    locked = experiments._locked
    @contextmanager
    def late(d): # between the look at the folder and the lock
        d.mkdir(parents=True)
        (d/'summary.json').write_text('{}')
        with locked(d) as ours: yield ours
    monkeypatch.setattr(experiments, '_locked', late)
    sweep(trials(1), fake, tmp_path)
    assert not events(tmp_path)

@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_table(tmp_path, monkeypatch):
    pytest.importorskip('ray', reason='Ray, an optional package, is not installed')
    from ray.cluster_utils import Cluster
    monkeypatch.setenv('PYTHONPATH', str(worker.parent)) # the nodes must find `fake`
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
    try:
        sweep(trials(1, does='die'), fake, tmp_path/'dies', ray=cluster.address) # its process dies once; Ray starts it again
        assert [o[2] for o in events(tmp_path/'dies')] == ['start','resume','end']
        with pytest.raises(ValueError, match='Of 2 trials 1 failed'): sweep([*trials(1, does='fail'), *trials(1)], fake, tmp_path/'fails', ray=cluster.address)
        far = table('1', 'smoke', seeds=2, ray=cluster.address, out=tmp_path/'ray', run=fake)
    finally: cluster.shutdown()
    near = table('1', 'smoke', seeds=2, out=tmp_path/'here', run=fake)
    assert far.read_text() == near.read_text() and far.with_suffix('.csv').read_text() == near.with_suffix('.csv').read_text()

def test_without_ray_its_name_is_in_the_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ValueError, match=r'clae_fastai\[ray\]'): sweep(trials(1), fake, tmp_path, ray='auto')

# names

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow]) # whatever else the machine does
values = st.one_of(st.integers(-2**53, 2**53), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8), st.booleans())
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

def test_names_are_the_same_in_every_process():
    code = "from clae_fastai.paper.experiments import *; print(*[trial_name({**o, 'seed': 7}) for s in ('small','smoke','paper') for g in ('table1','fig7','strong') for _,o in grids(s)[g].cells(s)])"
    here = [trial_name({**o, 'seed': 7}) for s in ('small','smoke','paper') for g in ('table1','fig7','strong') for _,o in grids(s)[g].cells(s)]
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={'PYTHONHASHSEED': '5', 'LC_ALL': 'C', 'HOME': str(Path.home())}, check=True).stdout
    assert out.split() == here
    assert trial_name(dict(data='digits', method='simclr', eps=.03, alpha=1., epochs=2, seed=0)) == 'digits-simclr-eps0.03-seed0-9e72275cba' # as it was on the first day

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
        got,a = [v for v in got if v is not None],aggregate(df, by, 'knn')
        a = a[a.eps == e]
        assert len(a) == bool(got)
        if got:
            assert a['values'].item() == got and a['n'].item() == len(got) and a['mean'].item() == pytest.approx(np.mean(got))
            assert a['std'].item() == pytest.approx(np.std(got, ddof=1) if len(got) > 1 else math.nan, abs=1e-12, nan_ok=True)
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
    assert a['mean'].tolist() == pytest.approx([.42,.44]) and a['std'].tolist() == pytest.approx([math.sqrt(.0014/3), math.sqrt(.001/3)])
    sd = math.sqrt((.0**2 + .01**2 + .02**2 + .01**2)/3) # the differences are .02, .01, .04, .01, their mean .02
    half = 3.182446*sd/2 # t(.975, 3) from a table
    assert (p['mean'][0], p['low'][0], p['high'][0]) == pytest.approx((.02, .02 - half, .02 + half), abs=1e-7)

# tables and figures

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
    assert len(df) == 27 and not df['trial'].duplicated().any() and 'not run' not in file.read_text() and 'path' not in df
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
    for which in ('5a','6b'): assert Image.open(figure(which, 'small', out=tmp_path).with_suffix('.png')).size > (700,300)

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
    table('2', 'smoke', out=tmp_path, run=fake); figure('5b', 'smoke', out=tmp_path, run=fake)
    assert {'transfer','n_out'} <= set(pd.read_csv(tmp_path/'trials.csv')) and csv() == before

def test_results_of_failed_sweeps_are_rendered(tmp_path):
    def run(o, folder): fake({**o, **({'does': 'fail'} if o['method'] == 'uel' else {})}, folder)
    with pytest.raises(ValueError, match='Of 9 trials 3 failed'): table('1', 'smoke', out=tmp_path, run=run)
    assert (tmp_path/'table1-smoke.md').read_text().split('| data |')[0].count('not run') == 6

def test_other_files_stay(tmp_path):
    (tmp_path/'mine.csv').write_text('a\n1\n')
    table('1', 'smoke', out=tmp_path, run=fake)
    assert (tmp_path/'mine.csv').read_text() == 'a\n1\n' and sorted(o.name for o in tmp_path.iterdir() if o.name[0] != '.') == ['mine.csv','runs','table1-smoke.csv','table1-smoke.md','trials.csv']

def test_folders_as_data(tmp_path):
    for o in ('a/cifar10','b/cifar10'): (tmp_path/o).mkdir(parents=True)
    (_,o),*_ = grids()['table1'].cells(data=[tmp_path/'a'/'cifar10'])
    assert o['data'] == 'folder' and o['path'] == str(tmp_path/'a'/'cifar10')
    assert trial_name({**o, 'seed': 0}) == trial_name({**grids()['table1'].cells(data=tmp_path/'b'/'cifar10')[0][1], 'seed': 0})
    with pytest.raises(ValueError, match='one name'): grids()['table1'].cells(data=[tmp_path/'a'/'cifar10', tmp_path/'b'/'cifar10'])
    file = table('1', 'small', [tmp_path/'a'/'cifar10'], out=tmp_path/'out', run=fake)
    for f in (file, file.with_suffix('.csv'), tmp_path/'out'/'trials.csv'): assert str(tmp_path) not in f.read_text()
    assert grids('paper')['table1'].cells('paper', ['tinyimagenet=here'])[0][1]['path'] == str(Path('here').resolve())

def test_wrong_arguments(tmp_path):
    for f,word in ((lambda: table('3', out=tmp_path), '1, 2, random'), (lambda: figure('8', out=tmp_path), '5a, 5b'), (lambda: table('1', 'huge', out=tmp_path), 'paper, small, smoke'), (lambda: table('1', seeds=0, out=tmp_path), 'seeds'),
                   (lambda: table('1', data=['nowhere'], out=tmp_path), 'NAME=FOLDER'), (lambda: table('1', 'paper', ['digits'], out=tmp_path), 'plain-digits')):
        with pytest.raises(ValueError, match=word): f()
    assert not [*tmp_path.iterdir()]

def test_markdown_of_some_seeds():
    g = grids('smoke')['fig6b']
    cs = g.cells('smoke')
    rows = pd.DataFrame([dict(trial=trial_name({**o, 'seed': s}), knn=.2 + .1*s + .05*(o['eps'] > 0), linear=math.nan) for s,(_,o) in ((0,cs[0]),(1,cs[0]),(1,cs[1]))])
    md = g.markdown(g.results(cs, rows, 2))
    assert '| 0 | 25.0 ± 7.1 | not run |' in md and '| 0.03 | 35.0 | not run |' in md and '| 35.00 | +5.0 (one seed) |' in md
