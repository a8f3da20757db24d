"""Runs that die, as real processes: killed, terminated, out of disk, with dead workers;
and what resumes equals what was never interrupted."""
import contextlib
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

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch

from fastai.vision.all import (Callback, CSVLogger, EarlyStoppingCallback, GradientAccumulation, ImageDataLoaders,
    OptimWrapper, PILImage, RandomCrop, Recorder, Resize, SaveModelCallback, ShowGraphCallback, aug_transforms, nn,
    partial, ranger, set_seed, working_directory)

from clae_fastai.cli import clae_train
from clae_fastai.data.catalogue import get_dls
from clae_fastai.method.attacks import PGD
from clae_fastai.method.models import resnet8
from clae_fastai.train.checkpoint import Checkpoint, Resume, checkpoints, load_checkpoint
from clae_fastai.train.learner import clae_learner

small = ['--limit', '320', '--epochs', '8', '--every-batches', '2']

def start(cwd, *args, **kwargs):
    "A run in a process of its own, which has begun to train when this returns"
    exe = Path(sys.executable).with_name('clae_train')
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1'}
    p = subprocess.Popen([exe, *map(str, args)], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs,
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)) # also where the tests run under nohup
    while ' training images of ' not in (line := p.stdout.readline()): assert line or p.poll() is None, p.stderr.read()
    return p

def finish(p):
    out,err = p.communicate(timeout=300)
    return p.returncode,out,err

def train_here(cwd, *args):
    "`clae_train` in this process"
    with working_directory(cwd): clae_train.main(list(map(str, args)))

def newest(folder): return [f.name for f in checkpoints(folder)[-1:]]

def outcome(run):
    "All that must not depend on interruptions"
    hist = pd.read_csv(run/'history.csv').drop(columns='time')
    with safetensors.safe_open(run/'encoder.safetensors', 'np') as f: # the file's header has no order
        enc = f.metadata(),{k: f.get_tensor(k).tobytes() for k in f.keys()}
    knn = json.loads((run/'summary.json').read_text())['metrics']['knn']
    return enc, hist.to_csv(), json.dumps(knn), checkpoints(run/'checkpoints')[-1]

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
            train_here(cwd, *small, *args, '--name', f'run{len(done)}')
            done[args] = cwd/'runs'/f'run{len(done)}'
        return done[args]
    return _whole

@pytest.fixture
def unfinished(whole, tmp_path):
    "A run that has written its checkpoints, and died before it could write anything else"
    run = tmp_path/'runs'/'unfinished'
    shutil.copytree(whole(), run)
    for name in ('summary.json','encoder.safetensors','history.csv'): (run/name).unlink()
    return run

def killed(cwd, args, times, seconds):
    """The folder of a run that is killed that often, at a random moment of so many seconds after a checkpoint,
    and resumed to its end"""
    run,rng,args = cwd/'runs'/'killed',random.Random(0),[*args, '--name', 'killed']
    for _ in range(times):
        before,p = newest(run/'checkpoints'),start(cwd, *args)
        while newest(run/'checkpoints') == before:
            time.sleep(.01)
            assert p.poll() is None
        time.sleep(rng.uniform(0, seconds))
        p.kill()
        p.communicate()
        assert p.returncode == -signal.SIGKILL
        args = ['--resume', 'killed']
    code,_,err = finish(start(cwd, *args))
    assert code == 0, err
    return run

@pytest.mark.slow
def test_killed_ten_times(whole, tmp_path):
    "kill -9 at random moments, of one run that is resumed after each"
    run = killed(tmp_path, small, 10, .3)
    assert_same(run, whole())
    assert not [f for f in run.rglob('*.tmp')]

@pytest.mark.slow
def test_killed_while_reading_photographs(tmp_path):
    "kill -9 inside epochs; the run is begun with two processes that read, and compared with one that reads by itself"
    draw = np.random.default_rng(0)
    for i in range(40):
        coarse = PILImage.create(draw.integers(0, 256, (12,16,3), dtype=np.uint8)).resize((320,240))
        (tmp_path/'photos'/f'{i%2}').mkdir(parents=True, exist_ok=True)
        coarse.save(tmp_path/'photos'/f'{i%2}'/f'{i}.jpg')
    args = ['--path', 'photos', '--arch', 'resnet8', '--size', 48, '--bs', 4, '--epochs', 4, '--every-batches', 1]
    train_here(tmp_path, *args, '--workers', 0, '--name', 'whole')
    assert_same(killed(tmp_path, [*args, '--workers', 2], 3, .2), tmp_path/'runs'/'whole')

@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_terminated_and_interrupted(whole, tmp_path, precision):
    "SIGTERM, Ctrl-C and a closed terminal save in the middle of an epoch, at any batch"
    opts = [] if precision == 'fp32' else ['--precision', precision]
    args = [*small[:-2], *opts, '--name', 'stopped']
    for sig,code in ((signal.SIGTERM,143), (signal.SIGINT,130), (signal.SIGHUP,129)):
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

def test_damaged_newest(whole, unfinished, tmp_path, capsys):
    damaged = checkpoints(unfinished/'checkpoints')[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    train_here(tmp_path, '--resume', 'unfinished')
    err = capsys.readouterr().err
    assert damaged.name in err and 'The one before it is used' in err
    assert_same(unfinished, whole())

def test_killed_after_the_last_epoch(whole, unfinished, tmp_path):
    train_here(tmp_path, '--resume', 'unfinished')
    assert_same(unfinished, whole())

def test_two_at_once(tmp_path, command):
    "A run that goes on for minutes, and is stopped where it is, so that nothing depends on who is faster"
    p = start(tmp_path, '--limit', 128, '--epochs', 10_000, '--name', 'busy')
    try:
        p.send_signal(signal.SIGSTOP)
        os.waitpid(p.pid, os.WUNTRACED)
        assert 'Another process' in command(clae_train, '--resume', 'busy')
    finally:
        p.kill()
        p.communicate()

def learner(dls, cbs=None, arch=resnet8, **kwargs):
    return clae_learner(dls, arch, views='digits', cbs=cbs, every=1, **kwargs)

class Stop(Callback):
    run_valid,order = False,2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.train_iter == self.at: raise InterruptedError('stopped')

def same_weights(a, b):
    a,b = a.model.state_dict(),b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('workers,at', [(0,5),(2,4)])
def test_random_item_transforms(digits_dir, tmp_path, quiet, workers, at):
    """Views by batch and random crops by item, in this process and in workers:
    the rest of an epoch is the rest of the same epoch"""
    def fit(*cbs):
        set_seed(3)
        dls = ImageDataLoaders.from_folder(digits_dir/'rgb', valid_pct=.2, seed=1,
                                           item_tfms=[Resize(20), RandomCrop(16)],
                                           batch_tfms=[*aug_transforms(size=16)], bs=64, num_workers=workers)
        learn = quiet(learner(dls, cbs=cbs))
        learn.fit_one_cycle(2, 3e-3) # of three batches
        return learn
    a = fit()
    with pytest.raises(Exception, match='stopped'): fit(Checkpoint(tmp_path, every_batches=1), Stop(at))
    b = fit(Checkpoint(tmp_path, every_batches=1), Resume(tmp_path))
    assert a.recorder.values == b.recorder.values and same_weights(a, b)

@pytest.mark.parametrize('opt', ['sgd','adam','fastai'])
def test_optimisers(tmp_path, quiet, opt):
    sgd,adam = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),partial(OptimWrapper, opt=torch.optim.Adam)
    func = dict(sgd=sgd, adam=adam, fastai=ranger)[opt]
    def fit(*cbs):
        set_seed(0)
        dls = get_dls('digits', bs=32, limit=96)
        learn = quiet(learner(dls, cbs=cbs, opt_func=func, channels_last=True, attack=PGD(.03, steps=2)))
        learn.fit_one_cycle(2, 1e-3)
        return learn
    a = fit()
    with pytest.raises(Exception, match='stopped'): fit(Checkpoint(tmp_path, every_batches=1), Stop(5))
    assert same_weights(a, fit(Resume(tmp_path)))

def test_a_column_that_is_not_there(tmp_path, quiet):
    "Best of what? It is asked before the first step"
    learn = quiet(learner(get_dls('digits', bs=32, limit=64), cbs=Checkpoint(tmp_path/'c', monitor='valid_los')))
    with pytest.raises(ValueError, match="'valid_los' is no column .* train_loss, valid_loss"): learn.fit(1)
    assert not (tmp_path/'c').exists()

def test_a_column_of_a_later_callback(tmp_path, quiet):
    "`lr_find` saves nothing, and the training loss may stand for the validation loss that nobody records"
    learn = quiet(learner(get_dls('digits', bs=32, limit=64), cbs=Checkpoint(tmp_path, monitor='knn')))
    learn.lr_find(num_it=10, show_plot=False)
    learn = quiet(learner(get_dls('digits', bs=32, limit=64), cbs=Checkpoint(tmp_path)))
    learn.recorder.valid_metrics = False
    learn.fit(1)
    assert newest(tmp_path)

def test_an_error_in_validation(tmp_path, quiet):
    "Nothing is saved inside of it: training goes on from the last whole epoch, and ends as if nothing had been"
    class Breaks(Callback):
        def before_batch(self):
            if not self.training and self.epoch == 1 and self.iter == 1: raise OSError('a lost drive')
    def fit(*cbs):
        set_seed(0)
        learn = quiet(learner(get_dls('digits', bs=32, limit=96)))
        checkpoint = Checkpoint(tmp_path)
        with checkpoint.guard(learn): learn.fit(2, 1e-3, cbs=cbs)
        return learn
    with pytest.raises(Exception, match='a lost drive'): fit(Breaks())
    assert newest(tmp_path) == ['epoch0000.safetensors']
    resumed = fit(Resume(tmp_path))
    set_seed(0)
    whole = quiet(learner(get_dls('digits', bs=32, limit=96)))
    whole.fit(2, 1e-3)
    assert same_weights(whole, resumed)

class Score(Callback):
    "Other losses than were measured"
    order,losses = Recorder.order+5,(3.,1.,2.5,2.4)
    def after_epoch(self): self.recorder.values[-1][1] = self.losses[self.epoch]

class StopAfter(Callback):
    order = 2000
    def after_epoch(self):
        if self.epoch == 1: raise InterruptedError('stopped')

def test_what_fastais_callbacks_remember(tmp_path, monkeypatch):
    "The best model so far, how long there was none better, and what is drawn"
    drawn = []
    monkeypatch.setattr(ShowGraphCallback, 'after_epoch', lambda self: drawn.append([*self.nb_batches]))
    def fit(*cbs):
        set_seed(0)
        learn = learner(get_dls('digits', bs=32, limit=96)) # with the bar, in which it draws
        learn.path = tmp_path
        stops = EarlyStoppingCallback(patience=3)
        ours = Checkpoint(tmp_path/'c'),SaveModelCallback(),stops,ShowGraphCallback(),Score()
        learn.fit(4, 1e-3, cbs=[*ours, *cbs])
        return stops
    with pytest.raises(Exception, match='stopped'): fit(StopAfter())
    best = (tmp_path/'models'/'model.pth').read_bytes()
    drawn.clear()
    stops = fit(Resume(tmp_path/'c'))
    assert (tmp_path/'models'/'model.pth').read_bytes() == best and (stops.best,stops.wait) == (1.,2)
    assert drawn == [[3,6,9],[3,6,9,12]]

def test_the_log_of_the_epochs_before(tmp_path, quiet):
    def fit(*cbs, append=False):
        learn = quiet(learner(get_dls('digits', bs=32, limit=96)))
        learn.path = tmp_path
        learn.fit(3, 1e-3, cbs=[Checkpoint(tmp_path/'c'), CSVLogger(append=append), *cbs])
    with pytest.raises(Exception, match='stopped'): fit(StopAfter())
    before = (tmp_path/'history.csv').read_text()
    with pytest.raises(ValueError, match='append=True'): fit(Resume(tmp_path/'c'))
    assert (tmp_path/'history.csv').read_text() == before
    fit(Resume(tmp_path/'c'), append=True)
    assert (tmp_path/'history.csv').read_text().startswith(before)

@pytest.mark.parametrize('every', [1,4])
@pytest.mark.parametrize('every_batches,at', [(None,3),(1,5)])
def test_gathered_gradients(tmp_path, quiet, every_batches, at, every):
    def fit(*cbs):
        set_seed(0)
        learn = quiet(learner(get_dls('digits', bs=32, limit=96))) # three batches an epoch, and a step each two
        learn.clae.every = every
        learn.fit(2, 1e-3, cbs=[GradientAccumulation(64), *cbs])
        return learn
    class Stops(Callback):
        order = 2000
        def after_batch(self):
            if self.training and self.train_iter == at and every_batches: raise InterruptedError('stopped')
        def after_epoch(self):
            if not every_batches: raise InterruptedError('stopped')
    with pytest.raises(Exception, match='stopped'): fit(Checkpoint(tmp_path, every_batches), Stops())
    assert same_weights(fit(), fit(Resume(tmp_path)))

@pytest.mark.parametrize('given', ['to fit','anew to fit','to the learner'])
@pytest.mark.parametrize('every_batches', [None,2])
def test_an_interrupt_while_it_passes_over(tmp_path, quiet, every_batches, given):
    "What is done passes again in the next fit, and the learner has its callbacks"
    def learner_of(*cbs):
        set_seed(0)
        return quiet(learner(get_dls('digits', bs=32, limit=128), cbs=cbs))
    def fit(learn, *cbs):
        learn.fit(2, 1e-3, cbs=cbs)
        return learn
    whole = fit(learner_of())
    with pytest.raises(Exception, match='stopped'): fit(learner_of(), Checkpoint(tmp_path, every_batches), Stop(7))
    both = resume,_ = Resume(tmp_path),Checkpoint(tmp_path, every_batches)
    learn = learner_of(*(both if given == 'to the learner' else ()))
    mine,others = () if given == 'to the learner' else both,learn.cbs.attrgot('name')
    resume.after_epoch = resume.before_batch = lambda: exec('raise KeyboardInterrupt')
    with pytest.raises(KeyboardInterrupt): fit(learn, *mine)
    del resume.after_epoch, resume.before_batch
    assert learn.cbs.attrgot('name') == others
    set_seed(0)
    if given == 'anew to fit': mine = Resume(tmp_path),Checkpoint(tmp_path, every_batches)
    assert same_weights(whole, fit(learn, *mine))
    assert not load_checkpoint(checkpoints(tmp_path)[-1])['earlier_fits']

def linear_encoder(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16))

def test_float16_scaler(tmp_path, quiet):
    "The scale, and how long it has been good"
    class Scales(Callback):
        run_valid = False
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append(self.learn.scaler.get_scale())
    def fit(*cbs):
        set_seed(0)
        dls = get_dls('digits', bs=32, limit=128, size=8)
        learn = quiet(learner(dls, [Scales(), *cbs], linear_encoder(), precision='fp16'))
        learn.mixed_precision.kwargs.update(init_scale=2.**8, growth_interval=3)
        learn.fit(3, 1e-3)
        return learn
    a = fit()
    with pytest.raises(Exception, match='stopped'): fit(Checkpoint(tmp_path, every_batches=1), Stop(5))
    b = fit(Resume(tmp_path))
    scales,rest = a.scales.seen,b.scales.seen
    assert len(rest) == 7 and rest == scales[5:] and len(set(scales)) > 2
    assert same_weights(a, b)

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
    assert (err.count('COULD NOT BE SAVED') == 2 and 'epoch0001' in err and 'epoch0000' not in err and
            len(learn.recorder.values) == 3)
    assert (os.listdir(tmp_path) == ['epoch0000.safetensors'] and
            load_checkpoint(tmp_path/'epoch0000.safetensors')['epoch'] == 0)

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

def test_a_terminal_that_closes(quiet, tmp_path):
    "It stops a training, but for one that `nohup` started"
    class HangUp(Callback):
        def after_batch(self):
            if self.train_iter == 1: os.kill(os.getpid(), signal.SIGHUP)
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler,code in ((signal.SIG_IGN,None), (signal.SIG_DFL,129)):
            signal.signal(signal.SIGHUP, handler)
            learn,cb = quiet(learner(get_dls('digits', bs=32, limit=96), cbs=HangUp())),Checkpoint(tmp_path/str(code))
            with pytest.raises(SystemExit) if code else contextlib.nullcontext() as e, cb.guard(learn): learn.fit(1)
            assert (code is None or e.value.code == code) and signal.getsignal(signal.SIGHUP) == handler
            assert ('batch' in newest(tmp_path/str(code))[0]) == bool(code)
    finally: signal.signal(signal.SIGHUP, before)

@pytest.mark.slow
def test_a_signal_to_the_whole_group(large_images, tmp_path):
    """Ctrl-C in a terminal reaches all of a process's group, and launchers send theirs to it:
    those that load images go on"""
    args = ['--path', large_images, '--arch', 'resnet8', '--size', 16, '--epochs', 1000, '--bs', 32, '--workers', 2,
            '--name', 'group']
    for sig,code in ((signal.SIGINT,130), (signal.SIGTERM,143)):
        p = start(tmp_path, *args, start_new_session=True)
        folder,args = tmp_path/'runs'/'group'/'checkpoints',['--resume', 'group']
        before = newest(folder)
        while p.poll() is None and newest(folder) == before: time.sleep(.02)
        before = newest(folder)
        os.killpg(p.pid, sig)
        got,_,err = finish(p)
        assert got == code and 'died' not in err and 'Traceback' not in err and newest(folder) != before, err

def test_dead_worker_and_lost_image(large_images, tmp_path):
    args = ['--path', large_images, '--arch', 'resnet8', '--size', 16, '--epochs', 1000, '--bs', 32, '--workers', 1]
    p = start(tmp_path, *args, '--every-batches', 1, '--name', 'images')
    folder = tmp_path/'runs'/'images'/'checkpoints'
    def workers():
        ps = subprocess.run(['ps','--ppid',str(p.pid),'-o','pid='], capture_output=True, text=True)
        return [int(o) for o in ps.stdout.split()]
    while not (checkpoints(folder) and workers()):
        time.sleep(.02)
        assert p.poll() is None
    for w in workers():
        try: os.kill(w, signal.SIGKILL)
        except ProcessLookupError: pass
    code,_,err = finish(p)
    assert code == 2 and 'loads images died' in err and '--resume' in err, err
    seen = checkpoints(folder)
    assert seen
    p = start(tmp_path, '--resume', 'images')
    while checkpoints(folder)[-1] == seen[-1]:
        time.sleep(.02)
        assert p.poll() is None
    for f in large_images.rglob('0[0-4]*.png'): f.write_bytes(b'no image')
    code,_,err = finish(p)
    assert code == 2 and 'cannot be read as an image' in err and '.png' in err and 'Traceback' not in err, err
    assert checkpoints(folder)
