"""`--log`: TensorBoard's files are in the run's folder, also of a run that goes on;
a package that is missing is asked for before any work."""
import importlib.util
import json

import pytest

def test_tensorboard(cli):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    args = ['clae_train', '--limit', 64, '--bs', 32, '--every', 1, '--epochs', 2, '--log', 'tensorboard']
    assert cli(*args, '--name', 'a').returncode == 0
    acc = events.EventAccumulator(str(cli.cwd/'runs'/'a'/'tensorboard')).Reload()
    assert [o.step for o in acc.Scalars('loss_adv')] == [2,4] and len(acc.Images('views')) == 2
    assert json.loads((cli.cwd/'runs'/'a'/'settings.json').read_text())['options']['log'] == 'tensorboard'
    def encoder(name): return (cli.cwd/'runs'/name/'encoder.safetensors').read_bytes()
    assert cli(*args[:-2], '--name', 'b').returncode == 0 # nothing else is different
    assert encoder('a') == encoder('b')

def test_a_log_that_cannot_be_written(cli, monkeypatch):
    "It costs no run"
    writers = pytest.importorskip('torch.utils.tensorboard.writer')
    def _fails(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(writers.SummaryWriter, 'add_scalar', _fails)
    r = cli('clae_train', '--limit', 64, '--bs', 32, '--epochs', 2, '--log', 'tensorboard', '--name', 'a')
    assert r.returncode == 0 and 'tensorboard COULD NOT BE WRITTEN' in r.stderr, r.stderr
    assert (cli.cwd/'runs'/'a'/'summary.json').exists()

def test_wandb(cli, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    r = cli('clae_train', '--limit', 64, '--bs', 32, '--epochs', 1, '--log', 'wandb', '--name', 'a')
    assert r.returncode == 0 and 'WandbCallback' not in r.stdout, r.stderr
    assert list((cli.cwd/'runs'/'a'/'wandb').glob('offline-run-*/*.wandb'))

def test_wandb_that_cannot_log(cli, monkeypatch):
    "Nobody is logged in, or there is no network: the run goes on once there is"
    wandb = pytest.importorskip('wandb')
    def _fails(**kwargs): raise wandb.errors.UsageError('No API key configured')
    options = '--limit', 64, '--bs', 32, '--epochs', 1, '--log', 'wandb', '--name', 'a'
    with monkeypatch.context() as m:
        m.setattr(wandb, 'init', _fails)
        r = cli('clae_train', *options)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'WANDB_MODE=offline' in r.stderr, r.stderr
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    assert cli('clae_train', '--resume', 'a').returncode == 0

@pytest.mark.parametrize('package', ['tensorboard','wandb'])
def test_a_package_that_is_not_there(package, command, monkeypatch):
    from clae_fastai import runs
    from clae_fastai.cli import clae_train
    monkeypatch.setattr(runs, 'find_spec', lambda name: None if name == package else importlib.util.find_spec(name))
    assert f"pip install 'clae_fastai[{package}]'" in command(clae_train, '--limit', 64, '--log', package)
