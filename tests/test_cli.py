"`clae_train` as a process: what it leaves behind, and how it fails."
import inspect
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn

from clae_fastai.train.precision import has_bf16
from clae_fastai.cli import clae_train

quick = ['--epochs', 1, '--limit', 128]

def test_runs_twice_and_leaves_the_run_folder(cli):
    for i in (1,2):
        r = cli('clae_train', *quick)
        assert r.returncode == 0, r.stderr
        run = cli.cwd/'runs'/f'digits-simclr-{i}'
        assert sorted(o.name for o in run.iterdir()) == ['.lock','checkpoints','encoder.safetensors','history.csv','loss.png','settings.json','summary.json','views.png']
    assert 'trained encoder' in r.stdout and 'raw pixels' in r.stdout and '\r' not in r.stdout
    s = json.loads((run/'summary.json').read_text())
    assert set(s) == {'settings','seed','versions','metrics'} and s['settings']['name'] == 'digits-simclr-2'
    for row in ('raw','untrained','encoder'):
        knn = s['metrics']['knn'][row]
        assert {k: len(v['values']) for k,v in knn.items()} == {'1': 20, '5': 20, 'all': 1}
        for v in knn.values(): assert v['mean'] == pytest.approx(np.mean(v['values'])) and 0 <= v['mean'] <= 1
    hist = pd.read_csv(run/'history.csv')
    assert list(hist) == ['epoch','train_loss','valid_loss','loss_aug','loss_adv','time'] and len(hist) == 1
    assert Image.open(run/'views.png').size > (300,300) and Image.open(run/'loss.png').size > (300,300)
    # the same seed gives the same encoder
    a,b = (safetensors.torch.load_file(cli.cwd/'runs'/f'digits-simclr-{i}'/'encoder.safetensors') for i in (1,2))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_baseline_and_methods(cli):
    for args in (['--eps', 0], ['--method', 'plain', '--attack', 'pgd'], ['--method', 'uel', '--alpha', .5]):
        r = cli('clae_train', *quick, *args, '--name', args[1] if isinstance(args[1], str) else 'base')
        assert r.returncode == 0, r.stderr
    assert 'loss_adv' not in pd.read_csv(cli.cwd/'runs'/'base'/'history.csv')

def test_flat_folder_trains_and_says_that_it_cannot_evaluate(cli, digits_dir):
    r = cli('clae_train', '--path', digits_dir/'flat', '--arch', 'resnet8', '--epochs', 1)
    assert r.returncode == 0, r.stderr
    assert 'no classes' in r.stdout
    run = cli.cwd/'runs'/'flat-simclr-1'
    assert 'knn' not in json.loads((run/'summary.json').read_text())['metrics'] and (run/'encoder.safetensors').exists()

def test_precision_is_in_the_summary(cli):
    r = cli('clae_train', *quick, '--precision', 'auto', '--channels-last', '--name', 'auto')
    assert r.returncode == 0, r.stderr
    s = json.loads((cli.cwd/'runs'/'auto'/'summary.json').read_text())['settings']
    assert s['precision'] == ('bf16' if has_bf16('cpu') else 'fp32') and s['channels_last'] is True

def test_help_documents_every_option(cli):
    r = cli('clae_train', '--help')
    for o in inspect.signature(clae_train).parameters: assert re.search(rf'^  --{o.replace("_", "[_-]")}\b', r.stdout, re.M), o # fastcore 2 writes dashes
    assert 'plain, uel, simclr (the default)' in ' '.join(r.stdout.split())

def test_recipe(cli, digits_dir):
    r = cli('clae_train', '--data', 'folder', '--path', digits_dir/'rgb', '--recipe', 'plain-cifar10', '--arch', 'resnet8', '--size', 32, '--epochs', 1, '--bs', 32)
    assert r.returncode == 0, r.stderr

def fails(r, *words):
    assert r.returncode == 2 and 'Traceback' not in r.stderr, (r.returncode, r.stderr)
    lines = [o for o in r.stderr.splitlines() if o.startswith('clae_train: ')]
    assert len(lines) == 1 and all(w in r.stderr for w in words), r.stderr

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
    fails(cli('clae_train', *args), '001.png', 'notes.png', '--skip-bad')
    assert not (cli.cwd/'runs').exists()
    r = cli('clae_train', *args, '--skip-bad')
    assert r.returncode == 0 and 'Skipped 2 of 241 files' in r.stdout, r.stderr

def test_empty_folder(command, tmp_path):
    (tmp_path/'none').mkdir()
    assert 'no image in none' in command(clae_train, '--path', 'none')

def test_existing_run_is_not_overwritten(command, tmp_path):
    run = tmp_path/'runs'/'mine'
    run.mkdir(parents=True); (run/'summary.json').write_text('precious')
    err = command(clae_train, *quick, '--name', 'mine')
    assert 'runs/mine exists' in err and 'mine-1' in err

@pytest.mark.parametrize('args,words', [(['--arch', 'resnte18'], ['resnet18','densenet121']), (['--eps', 'nan'], ['eps']), (['--name', '../out'], ['folder name']), (['--data', 'cifar11'], ['cifar10','tinyimagenet']), (['--data', 'imagenet100'], ['image-net.org'])])
def test_bad_options(command, args, words):
    err = command(clae_train, *args)
    assert all(w in err for w in words), err

def test_non_finite_loss_stops_the_run(cli):
    r = cli('clae_train', '--epochs', 3, '--limit', 128, '--lr', '1e30')
    fails(r, 'epoch', 'batch', 'not finite')
    assert (cli.cwd/'runs'/'digits-simclr-1'/'history.csv').exists()

@pytest.mark.slow
def test_photographs(cli, cifar_dir, tmp_path):
    "Two epochs of a ResNet-18 on some CIFAR-10 images; the encoder is torchvision's"
    few = tmp_path/'few'
    for split,n in (('train',16), ('test',8)):
        for d in (cifar_dir/split).iterdir():
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

def test_names_of_runs_with_a_recipe(cli, digits_dir):
    "A recipe has a name, which is not the run's"
    args = ['--recipe', 'simclr-cifar10', '--data', 'folder', '--path', digits_dir/'rgb', '--size', 16, '--arch', 'resnet8', '--limit', 64, '--bs', 32, '--epochs', 1, '--workers', 0]
    for name in ('mine',None,None):
        r = cli('clae_train', *args, *(['--name', name] if name else []))
        assert r.returncode == 0, r.stderr
    assert sorted(o.name for o in (cli.cwd/'runs').iterdir()) == ['mine','rgb-simclr-1','rgb-simclr-2']

def test_classes_without_training_images(cli):
    "Training needs no labels, so it is not refused for the sake of an evaluation"
    r = cli('clae_train', '--epochs', 1, '--limit', 20, '--bs', 10)
    assert r.returncode == 0 and 'classes there is no training image' in r.stdout, r.stderr
    assert (cli.cwd/'runs'/'digits-simclr-1'/'summary.json').exists()

def test_eval_is_on_the_data_of_the_run(cli, digits_dir):
    r = cli('clae_train', '--path', digits_dir/'grey', '--name', 'mine', '--views', 'digits', '--arch', 'resnet8', '--epochs', 1, '--seed', 5, '--workers', 0)
    assert r.returncode == 0, r.stderr
    run = cli.cwd/'runs'/'mine'
    s = json.loads((run/'summary.json').read_text())
    assert s['settings']['views'] == 'digits'
    r = cli('clae_eval', 'mine', '--workers', 0)
    assert r.returncode == 0, r.stderr
    e = json.loads((run/'eval-folder-honest.json').read_text())
    n = sum(1 for _ in (digits_dir/'grey').rglob('*.png'))
    assert e['n_train'] + e['n_test'] == n and e['settings']['k'] == min(200, e['n_train'])
    shutil.copy(run/'encoder.safetensors', cli.cwd/'e.safetensors')
    r = cli('clae_eval', 'e.safetensors')
    assert r.returncode == 2 and '--data NAME or --path FOLDER' in r.stderr

def test_precision_auto_is_chosen_once(cli):
    assert cli('clae_train', *quick, '--precision', 'auto').returncode == 0
    run = cli.cwd/'runs'/'digits-simclr-1'
    assert json.loads((run/'settings.json').read_text())['options']['precision'] == json.loads((run/'summary.json').read_text())['settings']['precision'] != 'auto'
