"The commands: what they leave behind, how they fail, and how quickly they answer."
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn

from clae_fastai import __version__, cli as commands, runs
from clae_fastai.cli import clae_train, parser
from clae_fastai.data.catalogue import get_dls
from clae_fastai.measure.monitors import CollapseMonitor
from clae_fastai.train.checkpoint import checkpoints, load_checkpoint
from clae_fastai.train.precision import has_bf16

columns = ['epoch','train_loss','valid_loss','loss_aug','loss_adv',*CollapseMonitor.names,'time']
quick = ['--epochs', 1, '--limit', 128]
names = ['clae_train','clae_eval','clae_embed','clae_report','clae_export','clae_table','clae_figure']

def summary(run): return json.loads((run/'summary.json').read_text())
def header(run):
    with safetensors.safe_open(run/'encoder.safetensors', 'pt') as f: return f.metadata()

# Answering at once

def in_a_process(name, *args, cwd=None):
    "A command in a process of its own, which says in the end which heavy modules it has imported, and the process"
    code = f'''if 1:
        import sys
        from clae_fastai.cli import {name}
        try: {name}.main()
        finally: print('heavy:', [o for o in ('torch','fastai','fastcore','numpy','matplotlib') if o in sys.modules])'''
    clean = {k: v for k,v in os.environ.items() if k != 'PYTHONWARNINGS'}
    return subprocess.run([sys.executable, '-c', code, *map(str, args)],
        cwd=cwd, capture_output=True, text=True, env=clean)

def test_answers_at_once():
    """Help, the version and wrong options of all commands, without importing anything heavy,
    in a fraction of the time that takes"""
    def seconds(f, *args):
        start = time.perf_counter()
        return f(*args),time.perf_counter() - start
    times = []
    for name in names:
        for args,code in ((['--help'],0), (['--nonsense'],2), (['--workers=x'],2), (['--version'],0)):
            p,s = seconds(in_a_process, name, *args)
            assert (p.returncode == code and 'Traceback' not in p.stderr and
                    p.stdout.endswith('heavy: []\n')), (name, args, p)
            times.append(s)
    fastai,s = seconds(lambda: subprocess.run([sys.executable, '-W', 'ignore', '-c', 'import fastai.vision.all']))
    assert fastai.returncode == 0 and np.median(times) <= .15*s, (times, s)

def test_a_process_of_its_own(tmp_path):
    "Not a word from other packages, and columns with their heads in a log that goes to a file"
    p = in_a_process('clae_train', *quick, cwd=tmp_path)
    assert p.returncode == 0 and p.stderr == '', p.stderr
    log = [o.split() for o in p.stdout.splitlines()]
    i = log.index(columns)
    heads,row = p.stdout.splitlines()[i:i+2]
    assert log[i+1][0] == '0' and len(log[i+1]) == len(columns) and len(heads) == len(row) < 120

def test_console_scripts():
    "What settings.ini calls a command is one, of that name"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(Path(__file__).parent.parent/'settings.ini')
    scripts = dict(o.split('=') for o in cfg['DEFAULT']['console_scripts'].split())
    assert list(scripts) == names
    for name,where in scripts.items():
        main = EntryPoint(name, where, 'console_scripts').load()
        assert main.args == (getattr(commands, name),)

# Help

@pytest.mark.parametrize('name', names)
def test_help(cli, name, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    r = cli(name, '--help')
    assert r.returncode == 0 and r.stderr == ''
    options = r.stdout.partition('\noptions:')[2]
    for action in parser(getattr(commands, name))._actions:
        assert action.help and len(action.help) > 5
        if action.option_strings: assert re.search(rf'^  (-h, )?{action.option_strings[-1]}\b', options, re.M), action
        if action.choices: assert '{' + ','.join(map(str, action.choices)) + '}' in options, action
    assert not re.search(r'--\w+_', r.stdout) and not re.search(r'\b[A-Z]+_[A-Z]+\b', r.stdout)
    assert cli(name, '--version').stdout == f'clae_fastai {__version__}\n'

def test_groups(cli):
    text = cli('clae_train', '--help').stdout
    heads = re.findall(r'^(\w+):$', text, re.M)
    assert heads[:6] == ['options','data','method','training','hardware','run'] and 'examples' in heads
    assert (text.index('\nmethod:') < text.index('  --eps ') < text.index('\ntraining:') <
            text.index('  --lr ') < text.index('\nhardware:'))

@pytest.mark.parametrize('name', names)
def test_examples_are_right(name):
    "Their command lines can be read"
    func = getattr(commands, name)
    examples = re.findall(rf'^  +{name}.*', parser(func).epilog, re.M)
    assert len(examples) >= (5 if name == 'clae_train' else 2)
    for line in examples: parser(func).parse_args(shlex.split(re.split('  +', line.strip())[0])[1:])

@pytest.mark.parametrize('args,values', [
    (['--skip-bad','--every-batches','3'], dict(skip_bad=True, every_batches=3)),
    (['--skip_bad','--every_batches=3','--path=a_b'], dict(skip_bad=True, every_batches=3, path='a_b')),
    (['--channels','1','--data','folder','--eps','-1'], dict(channels=1, data='folder', eps=-1.)), ([], {})])
def test_spelling(monkeypatch, args, values):
    "Hyphens or underscores in names, and values as they are"
    seen = []
    @commands.command
    def clae_train(**options): seen.append(options)
    monkeypatch.setattr(commands, 'parser', lambda func: parser(commands.clae_train))
    clae_train.main(args)
    defaults = {a.dest: a.default for a in parser(commands.clae_train)._actions if a.dest not in ('help','version')}
    assert seen == [{**defaults, **values}]

# Training

def test_runs_twice_and_leaves_the_run_folder(cli):
    for i in (1,2):
        r = cli('clae_train', *quick)
        assert r.returncode == 0, r.stderr
        run = cli.cwd/'runs'/f'digits-simclr-{i}'
        assert sorted(o.name for o in run.iterdir()) == [
            '.lock','checkpoints','encoder.safetensors','history.csv','loss.png','neighbours.png','settings.json',
            'summary.json','views.png']
    assert 'trained encoder' in r.stdout and 'raw pixels' in r.stdout and '\r' not in r.stdout
    s = summary(run)
    assert (set(s) == {'settings','seed','images','versions','metrics','not_written'} and
            s['settings']['name'] == 'digits-simclr-2')
    for row in ('raw','untrained','encoder'):
        knn = s['metrics']['knn'][row]
        assert {k: len(v['values']) for k,v in knn.items()} == {'1': 20, '5': 20, 'all': 1}
        for v in knn.values(): assert v['mean'] == pytest.approx(np.mean(v['values'])) and 0 <= v['mean'] <= 1
    hist = pd.read_csv(run/'history.csv')
    assert list(hist) == columns and len(hist) == 1
    assert Image.open(run/'views.png').size > (300,300) and Image.open(run/'loss.png').size > (300,300)
    # the same seed gives the same encoder
    a,b = (safetensors.torch.load_file(cli.cwd/'runs'/f'digits-simclr-{i}'/'encoder.safetensors') for i in (1,2))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_baseline_and_methods(cli):
    for args in (['--eps', 0], ['--method', 'plain', '--attack', 'pgd', '--attack-bn', 'clean'],
                 ['--method', 'uel', '--alpha', .5]):
        name = args[1] or 'base'
        r = cli('clae_train', *quick, *args, '--name', name)
        assert r.returncode == 0, r.stderr
        assert header(cli.cwd/'runs'/name)['method'] == (args[1] or 'simclr')
    assert 'loss_adv' not in pd.read_csv(cli.cwd/'runs'/'base'/'history.csv')
    clae = load_checkpoint(checkpoints(cli.cwd/'runs'/'plain'/'checkpoints')[-1])['settings']
    assert clae['attack'].startswith('PGD(') and clae['attack_bn'] == 'clean'

def test_flat_folder_trains_and_says_that_it_cannot_evaluate(cli, digits_dir):
    r = cli('clae_train', '--path', digits_dir/'flat', '--arch', 'resnet8', '--epochs', 1, '--workers', 0)
    assert r.returncode == 0, r.stderr
    assert 'no classes' in r.stdout
    run = cli.cwd/'runs'/'flat-simclr-1'
    assert 'knn' not in summary(run)['metrics'] and (run/'encoder.safetensors').exists()

def test_precision_auto_is_chosen_once(cli):
    "What it chose stands in the settings, for a computer where it would choose something else"
    r = cli('clae_train', *quick, '--precision', 'auto', '--channels-last', '--name', 'auto')
    assert r.returncode == 0, r.stderr
    s = summary(cli.cwd/'runs'/'auto')['settings']
    assert s['precision'] == ('bf16' if has_bf16('cpu') else 'fp32') and s['channels_last'] is True
    assert json.loads((cli.cwd/'runs'/'auto'/'settings.json').read_text())['options']['precision'] == s['precision']

def test_recipe(cli, digits_dir):
    "Its settings reach the training, what is given goes before them, and its name is not the run's"
    args = ['--data', 'folder', '--path', digits_dir/'rgb', '--recipe', 'plain-cifar10', '--arch', 'resnet8',
            '--size', 16, '--limit', 64, '--epochs', 1, '--bs', 32, '--workers', 0]
    for name,own in (('mine',[]), (None,['--lr', .01]), (None,['--lr', .01, '--head', 'mlp'])):
        r = cli('clae_train', *args, *(['--name', name] if name else []), *own)
        assert r.returncode == 0, r.stderr
    assert sorted(o.name for o in (cli.cwd/'runs').iterdir()) == ['mine','rgb-plain-1','rgb-plain-2']
    run = cli.cwd/'runs'/'mine'
    s = summary(run)['settings']
    assert [s[k] for k in ('method','views','n_out','lr','eps','size')] == ['plain','plain',128,.03,.03,[16,16]]
    states = [load_checkpoint(checkpoints(run.parent/o/'checkpoints')[-1])
              for o in ('mine','rgb-plain-1','rgb-plain-2')]
    assert [summary(run.parent/o)['settings']['head'] for o in ('mine','rgb-plain-2')] == ['linear','mlp']
    heads = [[v.shape for k,v in o['model'].items() if k.startswith('head') and v.ndim == 2] for o in states]
    assert heads == [[(128,64)], [(128,64)], [(64,64),(128,64)]]
    opts = [o['opt']['param_groups'] for o in states[:2]]
    for o,lr in zip(opts, (.03,.01)):
        assert [(g['momentum'],g['weight_decay'],g['lr']) for g in o] == [(.9,5e-4,lr)]*len(o)

@pytest.fixture
def bad_images(digits_dir, tmp_path):
    out = tmp_path/'images'
    shutil.copytree(digits_dir/'rgb', out)
    whole = (out/'1'/'001.png').read_bytes()
    (out/'1'/'001.png').write_bytes(whole[:len(whole)//2])
    (out/'2'/'notes.png').write_text('these are no pixels')
    return out

def test_bad_images_are_named_or_skipped(cli, bad_images):
    args = ['--path', bad_images, '--arch', 'resnet8', '--epochs', 1, '--workers', 0]
    r = cli('clae_train', *args)
    assert r.returncode == 2 and all(w in r.stderr for w in ('001.png','notes.png','--skip-bad')), r.stderr
    assert not (cli.cwd/'runs').exists()
    r = cli('clae_train', *args, '--skip-bad')
    assert r.returncode == 0 and 'Left out: 2 of 241 files' in r.stdout, r.stderr

def test_empty_folder(command, tmp_path):
    (tmp_path/'none').mkdir()
    assert 'There is no image in' in command(clae_train, '--path', 'none')

def test_existing_run_is_not_overwritten(command, tmp_path):
    run = tmp_path/'runs'/'mine'
    run.mkdir(parents=True)
    (run/'summary.json').write_text('precious')
    err = command(clae_train, *quick, '--name', 'mine')
    assert 'runs/mine exists' in err and 'mine-1' in err

@pytest.mark.parametrize('args,words', [
    (['--arch', 'resnte18'], ['resnet18','densenet121']), (['--eps', 'nan'], ['eps']),
    (['--name', '../out'], ['folder name']), (['--data', 'imagenet100'], ['image-net.org']),
    (['--recipe', 'simclr-tinyimagenet'], ['tiny-imagenet-200.zip']),
    (['--data', 'cifar11'], ['usage:','--data','cifar10','tinyimagenet']),
    (['--epochs', '1.5'], ['usage:','--epochs',"'1.5'"]), (['--channels', '2'], ['usage:','--channels']),
    (['--nonsense'], ['usage:','--nonsense'])])
def test_bad_options(command, args, words):
    err = command(clae_train, *args)
    assert all(w in err for w in words), err

def test_non_finite_loss_stops_the_run(cli):
    r = cli('clae_train', '--epochs', 3, '--limit', 128, '--lr', '1e30')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and r.stderr.startswith('clae_train: '), r.stderr
    assert all(w in r.stderr for w in ('epoch','batch','not finite')), r.stderr
    run = cli.cwd/'runs'/'digits-simclr-1'
    assert (run/'history.csv').exists() and not (run/'summary.json').exists()

@pytest.mark.slow
def test_photographs(cli, cifar_dir, tmp_path):
    "Two epochs of a ResNet-18 on some CIFAR-10 images; the encoder is torchvision's"
    few = tmp_path/'few'
    for split,n in (('train',16), ('test',8)):
        for d in (cifar_dir/split).glob('*/'):
            (few/split/d.name).mkdir(parents=True)
            for f in sorted(d.iterdir())[:n]: shutil.copy(f, few/split/d.name)
    r = cli('clae_train', '--path', few, '--arch', 'resnet18', '--epochs', 2, '--bs', 32)
    assert r.returncode == 0, r.stderr
    run, = (cli.cwd/'runs').iterdir()
    assert 'trained encoder' in r.stdout
    hist = pd.read_csv(run/'history.csv')
    assert hist.train_loss.is_monotonic_decreasing and (hist.loss_aug + hist.loss_adv).is_monotonic_decreasing
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.conv1,model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False),nn.Identity()
    model.load_state_dict(safetensors.torch.load_file(run/'encoder.safetensors'), strict=True)

def test_classes_without_training_images(cli):
    "Training needs no labels, so it is not refused for the sake of an evaluation"
    r = cli('clae_train', '--epochs', 1, '--limit', 20, '--bs', 10)
    assert r.returncode == 0 and 'classes without training images' in r.stdout, r.stderr
    assert 'knn' not in summary(cli.cwd/'runs'/'digits-simclr-1')['metrics']

def test_eval_on_images_that_were_trained_on_without_labels(cli, digits_dir):
    args = '--path', digits_dir/'grey', '--workers', 0
    r = cli('clae_train', *args, '--unlabelled', '--name', 'mine', '--arch', 'resnet8', '--epochs', 1, '--bs', 32)
    assert r.returncode == 0, r.stderr
    r = cli('clae_eval', 'mine', *args)
    assert r.returncode == 0 and 'without their labels' in r.stdout and 'Held out 20 %' in r.stdout, r.stderr

def test_eval_on_images_that_have_changed(cli, digits_dir):
    "Sorted into classes since, or with one more; `settings.json` beside an encoder need not be a run's"
    photos = shutil.copytree(digits_dir/'flat', cli.cwd/'photos')
    args = '--path', photos, '--workers', 0
    assert cli('clae_train', *args, '--name', 'flat', '--arch', 'resnet8', '--epochs', 1, '--bs', 32).returncode == 0
    shutil.rmtree(photos)
    shutil.copytree(digits_dir/'rgb', photos)
    r = cli('clae_eval', 'flat', *args)
    assert r.returncode == 0 and 'without their labels' in r.stdout and 'Held out 20 %' in r.stdout, r.stderr
    assert cli('clae_train', *args, '--name', 'sorted', '--arch', 'resnet8', '--epochs', 1, '--bs', 32).returncode == 0
    shutil.copy(next((photos/'0').glob('*.png')), photos/'0'/'one more.png')
    r = cli('clae_eval', 'sorted', *args)
    assert r.returncode == 0 and 'not quite those' in r.stdout and 'their number' in r.stdout, r.stderr
    (cli.cwd/'mine').mkdir()
    shutil.copy(cli.cwd/'runs'/'sorted'/'encoder.safetensors', cli.cwd/'mine')
    (cli.cwd/'mine'/'settings.json').write_text('{"editor": 1}')
    assert cli('clae_eval', 'mine/encoder.safetensors', *args).returncode == 0

@pytest.mark.parametrize('change', ['another','one more'])
def test_other_images_of_a_run_with_a_limit(cli, digits_dir, change):
    photos = shutil.copytree(digits_dir/'grey', cli.cwd/'photos')
    args = '--path', photos, '--workers', 0, '--limit', 40, '--arch', 'resnet8', '--epochs', 1, '--bs', 20
    assert cli('clae_train', *args, '--name', 'a').returncode == 0
    same = cli('clae_eval', 'a', '--workers', 0), cli('clae_report', 'a', '--workers', 0)
    assert [o.returncode for o in same] == [0,0], same
    assert 'not quite' not in cli('clae_eval', 'a', '--path', photos, '--workers', 0).stdout
    one,other = sorted((photos/'0').iterdir())[:2]
    if change == 'another': shutil.rmtree(photos/'0'); shutil.copytree(photos/'1', photos/'0')
    else: shutil.copy(one, photos/'0'/'more.png')
    for r in (cli('clae_eval', 'a', '--workers', 0), cli('clae_report', 'a', '--workers', 0)):
        assert r.returncode == 2 and 'not those that' in r.stderr, r.stderr
    assert 'not quite those' in cli('clae_eval', 'a', '--path', photos, '--workers', 0).stdout

def test_eval_reads_as_many_channels_as_the_run(cli, digits_dir):
    args = '--workers', 0, '--arch', 'resnet8', '--epochs', 1, '--bs', 32
    assert cli('clae_train', '--path', digits_dir/'rgb', '--channels', 1, *args, '--name', 'a').returncode == 0
    others = shutil.copytree(digits_dir/'rgb', cli.cwd/'others')
    next((others/'3').iterdir()).unlink()
    r = cli('clae_eval', 'a', '--path', others, '--workers', 0)
    assert r.returncode == 0, r.stderr

def test_eval_is_on_the_data_of_the_run(cli, digits_dir, monkeypatch):
    "And on the images that it held out"
    r = cli('clae_train', '--path', digits_dir/'grey', '--name', 'mine', '--views', 'digits', '--arch', 'resnet8',
            '--epochs', 1, '--seed', 5, '--workers', 0)
    assert r.returncode == 0, r.stderr
    run = cli.cwd/'runs'/'mine'
    assert summary(run)['settings']['views'] == 'digits'
    seeds = []
    monkeypatch.setattr(runs, 'get_dls',
        lambda *args, **kwargs: seeds.append(kwargs['seed']) or get_dls(*args, **kwargs))
    r = cli('clae_eval', 'mine', '--workers', 0)
    assert r.returncode == 0 and seeds == [5], r.stderr
    link = cli.cwd/'link' # whatever it is called, it is the run's own folder
    link.symlink_to(digits_dir/'grey')
    again = cli('clae_eval', 'mine', '--path', link, '--workers', 0)
    def table(r): return r.stdout.splitlines()[-6:-1]
    assert again.returncode == 0 and set(seeds) == {5} and table(again) == table(r) and 'not quite' not in again.stdout
    moved = shutil.copytree(digits_dir/'grey', cli.cwd/'moved')
    assert table(cli('clae_eval', 'mine', '--path', moved, '--workers', 0)) == table(r)
    shutil.copytree(moved, here := cli.cwd/'here')
    next((here/'0').glob('*.png')).unlink() # these are other images, of which nothing is known
    assert table(cli('clae_eval', 'mine', '--path', here, '--workers', 0)) != table(r) and set(seeds) == {5}
    e = json.loads((run/'eval-folder-honest.json').read_text())
    n = sum(1 for _ in (digits_dir/'grey').rglob('*.png'))
    assert e['n_train'] + e['n_test'] == n and e['settings']['k'] == min(200, e['n_train'])
    shutil.copy(run/'encoder.safetensors', cli.cwd/'e.safetensors')
    r = cli('clae_eval', 'e.safetensors')
    assert r.returncode == 2 and '--data NAME or --path FOLDER' in r.stderr
