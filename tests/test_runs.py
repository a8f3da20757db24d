"""Run folders: of other versions, of several processes, with settings of every kind;
and that commands and library know the same names."""
import inspect
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch

from clae_fastai import __version__, cli as commands
from clae_fastai.cli import clae_eval, clae_export, clae_train
from clae_fastai.data.catalogue import catalogue
from clae_fastai.method.attacks import attacks
from clae_fastai.method.views import view_presets
from clae_fastai.paper.experiments import figure, grids, table
from clae_fastai.paper.recipes import recipes
from clae_fastai.runs import read_options, train_options, trained, trial
from clae_fastai.train.checkpoint import Checkpoint
from clae_fastai.train.learner import methods
from clae_fastai.train.precision import precision_cbs

old_runs = Path(__file__).parent/'fixtures'/'runs-0.1.0'

# What commands and library both know

def annotation(func, name): return inspect.signature(func).parameters[name].annotation
def choices(func, name): return get_args(annotation(func, name))

@pytest.mark.parametrize('func,name,known', [
    (clae_train,'data',catalogue), (clae_eval,'data',catalogue), (clae_train,'method',methods),
    (clae_train,'attack',attacks), (clae_train,'views',view_presets), (clae_train,'recipe',recipes)])
def test_choices_are_the_tables(func, name, known): assert choices(func, name) == tuple(known)

@pytest.mark.parametrize('name,make', [('clae_table',table), ('clae_figure',figure)])
def test_tables_figures_and_scales(name, make, tmp_path):
    "The library's own messages list the same; grids exist at each scale"
    choices = {a.dest: a.choices for a in commands.parser(getattr(commands, name))._actions}
    with pytest.raises(ValueError) as e: make('x', 'smoke', out=tmp_path)
    listed = str(e.value).rstrip('.').rpartition(' are ')[2].split(', ')
    assert sorted(listed) == sorted(choices['which'])
    for scale in choices['scale']: assert grids(scale)
    with pytest.raises(ValueError) as e: grids('x')
    assert all(o in str(e.value) for o in choices['scale'])

def test_precisions():
    for o in choices(clae_train, 'precision'): assert precision_cbs(o, 'cpu')[0] in (o,'bf16','fp32')
    with pytest.raises(ValueError) as e: precision_cbs('x')
    assert all(repr(o) in str(e.value) for o in choices(clae_train, 'precision'))

@pytest.mark.parametrize('func,name,options', [
    (clae_eval,'protocol',dict(data='digits')), (clae_eval,'knn_on',dict(data='digits')),
    (clae_eval,'probe_on',dict(data='digits')), (clae_export,'format',{}),
    (clae_train,'attack_bn',dict(limit=64)), (clae_train,'on_nonfinite',dict(limit=64)),
    (clae_train,'log',dict(limit=64)), (clae_train,'channels',dict(limit=64, data='folder', path='.'))])
def test_library_has_the_same_choices(func, name, options, tmp_path, monkeypatch, capsys):
    "It names them where the command is called from Python, with something else"
    monkeypatch.chdir(shutil.copytree(old_runs, tmp_path/'runs'))
    run = [] if func is clae_train else ['finished']
    wrong = 7 if name == 'channels' else 'x'
    with pytest.raises(SystemExit): func(*run, **options, **{name: wrong})
    err = capsys.readouterr().err
    assert all(str(o) in err for o in choices(func, name)) and name in err, err

def test_options_are_the_commands():
    "Names, types and defaults; what came later than 0.1.0 has what 0.1.0 did"
    own = 'resume','dry_run','extend' # whose run is kept as `extends`
    params = {k: p for k,p in inspect.signature(clae_train).parameters.items() if k not in own}
    def kind(p): return type(get_args(p.annotation)[0]) if get_args(p.annotation) else p.annotation
    assert train_options == {k: (kind(p), p.default) for k,p in params.items()} | dict(extends=(str,None))
    saved = json.loads((old_runs/'finished'/'settings.json').read_text())['options']
    assert saved.keys() <= params.keys()

# Runs of other versions

@pytest.fixture
def old(cli):
    "The runs of version 0.1.0 in the commands' folder"
    shutil.copytree(old_runs, cli.cwd/'runs')
    return cli.cwd/'runs'

def rewrite(run, version=None, drop=(), **options):
    "Settings of another version, with other options"
    content = json.loads((run/'settings.json').read_text())
    content['options'] = {k: v for k,v in {**content['options'], **options}.items() if k not in drop}
    if version: content['versions']['clae_fastai'] = version
    (run/'settings.json').write_text(json.dumps(content))

@pytest.mark.parametrize('change', [{}, dict(version='9.0.0', later=1, drop=['seed','attack_bn','recipe'])], ids=str)
def test_finished_runs_stay_readable(cli, old, change):
    "Of version 0.1.0, and of one with more options and without some"
    run = old/'finished'
    rewrite(run, **change)
    # Adam's: L-BFGS stops early where the penalty is weak
    before = json.loads((run/'eval-digits-authors.json').read_text())
    r = cli('clae_eval', 'finished', '--protocol', 'authors', '--knn-on', 'h')
    assert r.returncode == 0, r.stderr
    now = json.loads((run/'eval-digits-authors-2.json').read_text())
    assert [now[k] for k in ('n_train','n_test','dataset')] == [before[k] for k in ('n_train','n_test','dataset')]
    assert (now['knn'] == pytest.approx(before['knn'], abs=1.5/450) and
            now['result'] == pytest.approx(before['result'], abs=1.5/450))
    assert now['versions']['clae_fastai'] == __version__
    newer = 'version' in change
    assert ('9.0.0' in r.stdout and 'ignored: later' in r.stdout) == newer
    assert cli('clae_export', 'finished', '--out', 'e.safetensors').returncode == 0
    a,b = (safetensors.torch.load_file(f) for f in (cli.cwd/'e.safetensors',run/'encoder.safetensors'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    r = cli('clae_train', '--resume', 'finished')
    assert r.returncode == 0 and 'is finished' in r.stdout

def test_images_that_0_1_held_out(command, cli, old, digits_dir, tmp_path):
    "It chose them otherwise, so that this version would test on images that were trained on"
    rewrite(old/'finished', data='folder', path=str(digits_dir/'grey'), size=16)
    for own in ((), ('--path', digits_dir/'grey')): assert 'another way' in command(clae_eval, 'finished', *own)
    others = shutil.copytree(digits_dir/'grey', tmp_path/'others')
    assert cli('clae_eval', 'finished', '--path', others, '--protocol', 'authors', '--knn-on', 'h').returncode == 0
    rewrite(old/'finished', version='0.2.0')
    assert cli('clae_eval', 'finished', '--protocol', 'authors', '--knn-on', 'h').returncode == 0

def test_what_an_old_run_lacks(old):
    rewrite(old/'finished', drop=train_options)
    assert read_options(old/'finished') == {k: v for k,(_,v) in train_options.items()}

@pytest.mark.parametrize('change,words', [({}, ['clae_fastai 0.1.0','pip install clae_fastai==0.1.0']),
                                          (dict(version='9.0.0', later=1), ['later','pip install clae_fastai==9.0.0'])])
def test_what_cannot_go_on_exactly_is_refused(command, old, change, words):
    rewrite(old/'stopped', **change)
    for run in ('stopped', old/'stopped'):
        err = command(clae_train, '--resume', run)
        assert all(w in err for w in words) and len(err.splitlines()) == 1, err

def test_trials_of_an_old_version(old):
    "Neither is one gone on with, nor are weights looked at that cannot be read"
    options = json.loads((old/'stopped'/'settings.json').read_text())['options']
    before = (old/'stopped'/'settings.json').read_bytes()
    with pytest.raises(ValueError, match='clae_fastai==0.1.0'):
        trial({'data': 'digits', 'limit': options['limit']}, old/'stopped')
    with pytest.raises(ValueError, match='clae_fastai==0.1.0'):
        trained(old/'finished')
    assert (old/'stopped'/'settings.json').read_bytes() == before

# Trials of this one

def test_a_trial_and_its_learner(tmp_path):
    "Its summary has what a table needs, and it is loaded with its weights"
    folder = tmp_path/'trial'
    folder.mkdir()
    options = dict(data='digits', method='plain', limit=128, epochs=1, seed=3)
    trial(options, folder)
    s = json.loads((folder/'summary.json').read_text())
    assert s['settings']['name'] == 'trial' and s['seed'] == 3 and 0 < s['metrics']['accuracy']['knn'] <= 1
    learn = trained(folder)
    weights = safetensors.torch.load_file(folder/'encoder.safetensors')
    net = learn.export_encoder(tmp_path/'e.safetensors')
    assert all(torch.equal(v, weights[k]) for k,v in safetensors.torch.load_file(net).items())

def test_a_trial_is_no_run(cli, command, monkeypatch):
    "It needs more than `--resume` does: the table's own command goes on with it"
    folder = cli.cwd/'results'/'runs'/'trial'
    folder.mkdir(parents=True)
    options = dict(data='digits', method='plain', limit=64, bs=32, epochs=1, seed=0)
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', lambda self: exec('raise KeyboardInterrupt'))
        with pytest.raises(KeyboardInterrupt): trial(options, folder)
    assert 'start that clae_table' in command(clae_train, '--resume', folder)
    trial(options, folder)
    assert json.loads((folder/'summary.json').read_text())['metrics']['accuracy']
