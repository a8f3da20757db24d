"A finished run is trained longer, in a new run that names its parent."
import json
import shutil

import torch

from clae_fastai.all import Checkpoint, load_checkpoint
from clae_fastai.runs import trained

def last(run): return load_checkpoint(sorted((run/'checkpoints').glob('*'))[-1])['model']

def test_longer(cli):
    assert cli('clae_train', '--limit', 64, '--bs', 32, '--epochs', 1, '--eps', .05, '--name', 'a').returncode == 0
    a,b = cli.cwd/'runs'/'a',cli.cwd/'runs'/'b'
    before = {f: f.read_bytes() for f in a.rglob('*') if f.is_file()}
    r = cli('clae_train', '--extend', 'a', '--epochs', 2, '--lr', 1e-12, '--name', 'b')
    assert r.returncode == 0 and 'from the weights of a' in r.stdout and 'eps=0.05' in r.stdout, r.stderr
    assert {f: f.read_bytes() for f in a.rglob('*') if f.is_file()} == before
    options = json.loads((b/'settings.json').read_text())['options']
    assert options['extends'] == str(a.resolve()) and (options['epochs'],options['eps'],options['limit']) == (2,.05,64)
    old,new = last(a),last(b)
    assert old.keys() == new.keys() and any('.adv.' in k for k in old)
    for k,v in old.items(): # all but the statistics of batch norm
        if 'running' not in k and 'num_batches' not in k: torch.testing.assert_close(new[k], v, rtol=0, atol=1e-7)
    assert any(not torch.equal(old[k], new[k]) for k in old if '.adv.running' in k)
    learn = trained(a) # and in Python
    assert all(torch.equal(v, old[k]) for k,v in learn.model.state_dict().items())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    # a free name by default, and as often as one likes
    r = cli('clae_train', '--extend', 'b', '--epochs', 1)
    assert r.returncode == 0 and 'runs/digits-simclr-1: ' in r.stdout, r.stderr

def test_what_cannot_be_extended(cli):
    assert cli('clae_train', '--limit', 64, '--bs', 32, '--epochs', 1, '--name', 'a').returncode == 0
    for args,says in ((['--extend', 'a', '--arch', 'resnet18'], 'leave out --arch'),
                      (['--extend', 'a', '--seed', 7], 'leave out --seed'), # it says which images were held out
                      (['--extend', 'none'], 'There is no run none'),
                      (['--extend', 'a', '--resume', 'a'], 'leave out --extend')):
        r = cli('clae_train', *args)
        assert r.returncode == 2 and says in r.stderr, r.stderr
    assert '--extend a --epochs' in cli('clae_train', '--resume', 'a').stdout
    (cli.cwd/'runs'/'a'/'summary.json').unlink()
    assert '--resume a' in cli('clae_train', '--extend', 'a').stderr

def test_what_is_untrained(cli):
    "In a run's last table it is an encoder of random weights, the parent's own, also after an interrupted evaluation"
    def untrained(name):
        return json.loads((cli.cwd/'runs'/name/'summary.json').read_text())['metrics']['knn']['untrained']
    options = '--limit',256,'--bs',32
    assert cli('clae_train', *options, '--epochs', 3, '--name', 'a').returncode == 0
    assert cli('clae_train', '--extend', 'a', '--epochs', 1, '--name', 'b').returncode == 0
    assert untrained('b') == untrained('a')
    (cli.cwd/'runs'/'b'/'summary.json').unlink()
    assert cli('clae_train', '--resume', 'b').returncode == 0
    assert untrained('b') == untrained('a')

def test_images_of_the_parent(cli, digits_dir):
    "Others are refused, moved ones are found where one says, and a run without checkpoints leaves no folder"
    photos = shutil.copytree(digits_dir/'grey', cli.cwd/'photos')
    args = '--arch', 'resnet8', '--epochs', 1, '--bs', 32, '--workers', 0
    assert cli('clae_train', '--path', photos, *args, '--name', 'a').returncode == 0
    photos.rename(cli.cwd/'moved')
    r = cli('clae_train', '--extend', 'a', '--epochs', 1)
    assert r.returncode == 2 and 'which is not there' in r.stderr and '--extend a --path' in r.stderr, r.stderr
    r = cli('clae_train', '--extend', 'a', '--path', 'moved', '--epochs', 1, '--name', 'b')
    assert r.returncode == 0, r.stderr
    shutil.copy(next((cli.cwd/'moved'/'0').iterdir()), cli.cwd/'moved'/'0'/'more.png')
    r = cli('clae_train', '--extend', 'b', '--epochs', 1, '--name', 'c')
    assert r.returncode == 2 and 'their number' in r.stderr and '--weights' in r.stderr, r.stderr
    shutil.rmtree(cli.cwd/'runs'/'b'/'checkpoints')
    r = cli('clae_train', '--extend', 'b', '--epochs', 1, '--name', 'd')
    assert r.returncode == 2 and 'no checkpoint' in r.stderr and not (cli.cwd/'runs'/'d').exists(), r.stderr

def test_a_folder_that_has_gone(cli, monkeypatch):
    "With the parent's: the encoder is written all the same"
    args = '--limit', 64, '--bs', 32, '--epochs', 1
    assert cli('clae_train', *args, '--name', 'a').returncode == 0
    after = Checkpoint.after_epoch
    def _move(self):
        after(self)
        (cli.cwd/'runs').rename(cli.cwd/'moved')
    monkeypatch.setattr(Checkpoint, 'after_epoch', _move)
    r = cli('clae_train', '--extend', 'a', '--epochs', 1, '--name', 'b')
    assert r.returncode == 0 and (cli.cwd/'runs'/'b'/'encoder.safetensors').exists(), r.stderr
