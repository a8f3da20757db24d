"Runs that die, as real processes: killed, terminated, out of disk, with dead workers; and what resumes equals what was never interrupted."
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import safetensors
import torch

from fastai.vision.all import Callback, ImageDataLoaders, OptimWrapper, PILImage, RandomCrop, Resize, aug_transforms, partial, ranger, set_seed

from clae_fastai.method.attacks import PGD
from clae_fastai.train.checkpoint import Checkpoint, Resume, checkpoints, load_checkpoint
from clae_fastai.data.catalogue import get_dls
from clae_fastai.train.learner import clae_learner
from clae_fastai.method.models import resnet8

small = ['--limit', '320', '--epochs', '8', '--every-batches', '2']

def start(cwd, *args):
    "A run in a process of its own, which has begun to train when this returns"
    exe = Path(sys.executable).with_name('clae_train')
    p = subprocess.Popen([exe, *map(str, args)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1'})
    while ' training images of ' not in (line := p.stdout.readline()): assert line or p.poll() is None, p.stderr.read()
    return p

def finish(p):
    out,err = p.communicate(timeout=300)
    return p.returncode,out,err

def newest(folder): return [f.name for f in checkpoints(folder)[-1:]]

def outcome(run):
    "All that must not depend on interruptions"
    hist = pd.read_csv(run/'history.csv').drop(columns='time')
    with safetensors.safe_open(run/'encoder.safetensors', 'np') as f: enc = f.metadata(),{k: f.get_tensor(k).tobytes() for k in f.keys()} # the file's header has no order
    return enc, hist.to_csv(), json.dumps(json.loads((run/'summary.json').read_text())['metrics']['knn']), checkpoints(run/'checkpoints')[-1]

def assert_same(a, b):
    (enc_a,hist_a,knn_a,last_a),(enc_b,hist_b,knn_b,last_b) = outcome(a),outcome(b)
    assert hist_a == hist_b and knn_a == knn_b and enc_a == enc_b
    assert last_a.name == last_b.name
    ma,mb = (load_checkpoint(f)['model'] for f in (last_a,last_b))
    assert ma.keys() == mb.keys() and all(torch.equal(ma[k], mb[k]) for k in ma)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Uninterrupted runs by their options, made when first asked for"
    cwd,done = tmp_path_factory.mktemp('whole'),{}
    def _whole(*args):
        if args not in done:
            code,_,err = finish(start(cwd, *small, *args, '--name', f'run{len(done)}'))
            assert code == 0, err
            done[args] = cwd/'runs'/f'run{len(done)}'
        return done[args]
    return _whole

@pytest.mark.slow
def test_killed_ten_times(whole, tmp_path):
    "kill -9 at random moments, of one run that is resumed after each"
    folder,rng,args = tmp_path/'runs'/'killed'/'checkpoints',random.Random(0),[*small, '--name', 'killed']
    for _ in range(10):
        before,p = newest(folder),start(tmp_path, *args)
        while newest(folder) == before: time.sleep(.01); assert p.poll() is None
        time.sleep(rng.uniform(0, .3))
        p.kill()
        assert p.wait() == -signal.SIGKILL
        args = ['--resume', 'killed']
    code,_,err = finish(start(tmp_path, *args))
    assert code == 0, err
    assert_same(tmp_path/'runs'/'killed', whole())
    assert not [f for f in (tmp_path/'runs'/'killed').rglob('*.tmp')]

@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_terminated_and_interrupted(whole, tmp_path, precision):
    "SIGTERM and Ctrl-C save in the middle of an epoch, at any batch"
    opts = [] if precision == 'fp32' else ['--precision', precision]
    args = [*small[:-2], *opts, '--name', 'stopped']
    for sig,code in ((signal.SIGTERM,143), (signal.SIGINT,130)):
        p = start(tmp_path, *args)
        folder = tmp_path/'runs'/'stopped'/'checkpoints'
        before = newest(folder)
        while p.poll() is None and newest(folder) == before: time.sleep(.02)
        time.sleep(.25)
        p.send_signal(sig)
        got,_,err = finish(p)
        assert got == code and 'Traceback' not in err and signal.Signals(sig).name in err, err
        args = ['--resume', tmp_path/'runs'/'stopped']
    code,_,err = finish(start(tmp_path, *args))
    assert code == 0, err
    a,b = outcome(tmp_path/'runs'/'stopped'),outcome(whole(*opts))
    assert a[:3] == b[:3]

def test_damaged_newest_and_two_at_once(whole, tmp_path):
    p = start(tmp_path, *small, '--name', 'torn')
    folder = tmp_path/'runs'/'torn'/'checkpoints'
    while len(checkpoints(folder)) < 2: time.sleep(.02)
    other = subprocess.run([Path(sys.executable).with_name('clae_train'), '--resume', 'torn'], cwd=tmp_path, capture_output=True, text=True)
    if p.poll() is None: assert other.returncode == 2 and 'Another process' in other.stderr, other.stderr
    p.kill(); p.wait()
    newest = checkpoints(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    (tmp_path/'runs'/'torn'/'summary.json').unlink(missing_ok=True)
    code,_,err = finish(start(tmp_path, '--resume', 'torn'))
    assert code == 0 and newest.name in err and 'The one before it is used' in err, err
    assert_same(tmp_path/'runs'/'torn', whole())

def test_killed_after_the_last_epoch(whole, tmp_path):
    run = tmp_path/'runs'/'late'
    shutil.copytree(whole(), run)
    for o in ('summary.json','encoder.safetensors','history.csv'): (run/o).unlink()
    code,_,err = finish(start(tmp_path, '--resume', 'late'))
    assert code == 0, err
    assert_same(run, whole())

def learner(dls, cbs=None, **kwargs): return clae_learner(dls, resnet8, views='digits', cbs=cbs, **kwargs)

class Stop(Callback):
    run_valid,order = False,2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.train_iter == self.at: raise InterruptedError('stopped')

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('at', [4,5])
def test_random_item_transforms(digits_dir, tmp_path, quiet, workers, at):
    "Views by batch and random crops by item, in this process and in workers: the rest of an epoch is the rest of the same epoch"
    def fit(*cbs):
        set_seed(3)
        dls = ImageDataLoaders.from_folder(digits_dir/'rgb', valid_pct=.2, seed=1, item_tfms=[Resize(20), RandomCrop(16)], batch_tfms=[*aug_transforms(size=16)], bs=64, num_workers=workers)
        learn = quiet(learner(dls, cbs=cbs))
        learn.fit_one_cycle(3, 3e-3)
        return learn
    a = fit()
    with pytest.raises(Exception, match='stopped'): fit(Checkpoint(tmp_path, every_batches=1), Stop(at))
    b = fit(Checkpoint(tmp_path, every_batches=1), Resume(tmp_path))
    assert a.recorder.values == b.recorder.values
    assert all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

@pytest.mark.parametrize('opt', ['sgd','adam','fastai'])
def test_optimisers(tmp_path, quiet, opt):
    def fit(*cbs):
        set_seed(0)
        funcs = dict(sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), adam=partial(OptimWrapper, opt=torch.optim.Adam), fastai=ranger)
        learn = quiet(learner(get_dls('digits', bs=32, limit=128), cbs=cbs, opt_func=funcs[opt], channels_last=True, attack=PGD(.03, steps=2)))
        learn.fit_one_cycle(2, 1e-3)
        return learn
    a = fit()
    with pytest.raises(Exception, match='stopped'): fit(Checkpoint(tmp_path, every_batches=1), Stop(6))
    b = fit(Resume(tmp_path))
    assert all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

def test_float16_scaler(tmp_path, quiet):
    "The scale, and how long it has been good"
    def fit(*cbs):
        set_seed(0)
        learn = quiet(learner(get_dls('digits', bs=32, limit=128, size=8), cbs=cbs, precision='fp16')) # PyTorch's own float16 convolutions are slow
        learn.mixed_precision.kwargs.update(init_scale=2.**8, growth_interval=3)
        kept = []
        learn.add_cb(type('Keep', (Callback,), dict(run_valid=False, after_batch=lambda self: kept.append(self.learn.scaler.get_scale())))())
        with torch.backends.mkldnn.flags(enabled=False): learn.fit(3, 1e-3)
        return learn,kept
    a,scales = fit()
    with pytest.raises(Exception, match='stopped'), torch.backends.mkldnn.flags(enabled=False): fit(Checkpoint(tmp_path, every_batches=1), Stop(5))
    b,rest = fit(Resume(tmp_path))
    assert rest == scales[-len(rest):] and len(set(scales)) > 2
    assert all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

def test_full_disk(tmp_path, quiet, capsys):
    "The kernel refuses to write: training goes on, and what was saved is whole"
    class Full(Callback):
        def before_epoch(self):
            if self.epoch == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    learn = quiet(learner(get_dls('digits', bs=32, limit=64), cbs=[Checkpoint(tmp_path), Full()]))
    try: learn.fit(3)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    err = capsys.readouterr().err
    assert err.count('COULD NOT BE SAVED') == 2 and 'epoch0000' in err and len(learn.recorder.values) == 3
    assert os.listdir(tmp_path) == ['epoch0000.safetensors'] and load_checkpoint(tmp_path/'epoch0000.safetensors')['epoch'] == 0

def test_best_and_last_are_kept(tmp_path, quiet):
    class Score(Callback):
        order = 900
        def after_epoch(self): self.recorder.values[-1][1] = [3.,1.,2.,4.,5.][self.epoch]
    learn = quiet(learner(get_dls('digits', bs=32, limit=64), cbs=[Checkpoint(tmp_path, keep=2), Score()]))
    learn.fit(5)
    assert [f.stem for f in checkpoints(tmp_path)] == ['epoch0001','epoch0003','epoch0004']

@pytest.fixture
def large_images(digits_dir, tmp_path):
    "Images too large for memory, which workers load"
    out = tmp_path/'images'
    for f in (digits_dir/'rgb').rglob('*.png'):
        g = out/f.relative_to(digits_dir/'rgb')
        g.parent.mkdir(parents=True, exist_ok=True)
        PILImage.create(f).resize((70,70)).save(g)
    return out

def test_dead_worker_and_lost_image(large_images, tmp_path):
    args = ['--path', large_images, '--arch', 'resnet8', '--size', 16, '--epochs', 40, '--bs', 32, '--workers', 1, '--every-batches', 1, '--name', 'images']
    p = start(tmp_path, *args)
    folder = tmp_path/'runs'/'images'/'checkpoints'
    def workers(): return [int(o) for o in subprocess.run(['ps','--ppid',str(p.pid),'-o','pid='], capture_output=True, text=True).stdout.split()]
    while not (checkpoints(folder) and workers()): time.sleep(.02); assert p.poll() is None
    for w in workers():
        try: os.kill(w, signal.SIGKILL)
        except ProcessLookupError: pass
    code,_,err = finish(p)
    assert code == 2 and 'loads images died' in err and '--resume' in err, err
    seen = checkpoints(folder)
    assert seen
    p = start(tmp_path, '--resume', 'images')
    while checkpoints(folder)[-1] == seen[-1]: time.sleep(.02); assert p.poll() is None
    for f in large_images.rglob('0[0-4]*.png'): f.write_bytes(b'no image')
    code,_,err = finish(p)
    assert code == 2 and 'cannot be read as an image' in err and '.png' in err and 'Traceback' not in err, err
    assert checkpoints(folder)
