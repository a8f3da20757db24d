"`clae_table` and `clae_figure`, with trials that train: killed, shared, on Ray."
import re

import pandas as pd
import pytest
from experiments_worker import events, fake, trials, worker

from clae_fastai.cli import clae_figure, clae_table
from clae_fastai.paper.experiments import sweep

@pytest.mark.slow
def test_killed_and_shared(smoke):
    "No trial is done twice, and none that was done before is touched"
    before,after = smoke.killed,smoke.finished
    assert before.starts - len(before.done) in (0,1)
    assert len(after.done) == 9 and before.done.items() <= after.done.items()
    assert after.starts - before.starts == len(after.done) - len(before.done)
    by_process = [re.findall(r'^(\S+): done in', o, re.M) for o in smoke.texts]
    assert all(by_process) and sorted(sum(by_process, [])) == sorted({*after.done} - {*before.done})

@pytest.mark.slow
def test_what_is_there_is_not_done_again(smoke, capsys):
    clae_table('1', scale='smoke', out=str(smoke.out))
    text = capsys.readouterr().out
    assert smoke.state(smoke.out) == smoke.finished and 'not run' not in text
    assert re.search(r'^\| simclr \| 0.03 \| \d+\.\d \| \d+\.\d \|$', text, re.M)
    assert len(pd.read_csv(smoke.out/'table1-smoke.csv')) == 9

@pytest.mark.slow
@pytest.mark.parametrize('which', ['2','3a','3b','4'])
def test_figures_of_an_encoder(smoke, which, capsys):
    "Of a trial that Table 1 has, too"
    clae_figure(which, scale='smoke', out=str(smoke.out))
    assert f'# Figure {which}' in capsys.readouterr().out and smoke.state(smoke.out) == smoke.finished
    file = smoke.out/f'fig{which}-smoke.png'
    assert file.stat().st_size > 5000 and len(pd.read_csv(file.with_suffix('.csv'))) >= 8

@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_figure(smoke, tmp_path, monkeypatch):
    pytest.importorskip('ray', reason='Ray, an optional package, is not installed')
    from ray.cluster_utils import Cluster
    monkeypatch.setenv('PYTHONPATH', str(worker.parent), prepend=':') # the nodes must find `fake`
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
    try:
        clae_figure('6b', scale='smoke', out=str(tmp_path), ray=cluster.address)
        ill = [*trials(1, does='die'), *trials(1, does='fail'), *trials(1)]
        with pytest.raises(ValueError, match='Of 3 trials 1 failed'):
            sweep(ill, fake, tmp_path/'ill', ray=cluster.address)
    finally: cluster.shutdown()
    by_trial = pd.DataFrame(events(tmp_path/'ill'), columns=['pid','trial','what']).groupby('trial')['what'].agg(list)
    assert sorted(by_trial) == [['start'],['start','end'],['start','resume','end']] # Ray starts what died again
    clae_figure('6b', scale='smoke', out=str(smoke.out)) # trials of Table 1
    assert smoke.state(smoke.out) == smoke.finished and smoke.state(tmp_path).starts == 2
    here,there = (o/'fig6b-smoke.md' for o in (smoke.out, tmp_path))
    assert here.read_text() == there.read_text() and there.with_suffix('.png').exists()
    a,b = (pd.read_csv(f.with_suffix('.csv')).drop(columns='train_seconds') for f in (here, there))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert len(a) == 2

@pytest.mark.parametrize('args,word', [
    ((clae_table,'3'), 'strong'),
    ((clae_figure,'8'), '3a'),
    ((clae_table,'1','--data','nowhere'), 'NAME=FOLDER'),
    ((clae_table,'1','--workers','0','--scale','smoke'), 'workers'),
    ((clae_table,'1','--seeds','0'), 'seeds')])
def test_wrong_arguments(command, args, word): assert word in command(*args)
