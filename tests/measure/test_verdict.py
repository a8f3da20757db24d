"What a training without labels says about itself, told apart on real short runs, and its numbers against NumPy's."
import math

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback
from torch import nn

from clae_fastai.all import (
    Checkpoint, CollapseMonitor, MemoryImages, Resume, clae_learner, extract_features, get_dls, memory_dls, resnet8,
    set_seed)

class Constant(nn.Module):
    "A head whose embeddings are all equal, whatever comes in and is learnt"
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(16))
    def forward(self, h): return self.bias + 0*h[:,:16]

def learner(quiet, method='simclr', limit=640, **kwargs):
    set_seed(0)
    return quiet(clae_learner(get_dls('digits', bs=32, limit=limit), resnet8, method, views='digits', **kwargs))

def verdict(learn, epochs, lr=3e-3):
    learn.fit_one_cycle(epochs, lr, cbs=(monitor := CollapseMonitor()))
    return monitor.verdict

methods = pytest.mark.parametrize('method', ['plain','uel','simclr'])

@methods
def test_states(method, quiet, capsys):
    "Too short, not learning and collapsed runs of each method"
    assert verdict(learner(quiet, method), 2).state == 'still falling'
    assert verdict(learner(quiet, method, 320), 2, 1e-12).state == 'not learning'
    last = verdict(learner(quiet, method, 320, head=Constant()), 2)
    assert last.state == 'collapsed' and capsys.readouterr().out.strip().endswith(str(last))

@methods
@pytest.mark.slow
def test_healthy(method, quiet): assert verdict(learner(quiet, method), 12).state == 'learning'

def test_only_drawn_together(quiet):
    "A loss without negatives collapses by itself"
    def align(z1, z2): return (nn.functional.normalize(z1) - nn.functional.normalize(z2)).square().sum(1).mean()
    assert verdict(learner(quiet, align), 4).state == 'collapsed'

class Spy(Callback):
    "Embeddings and losses of the training batches of an epoch"
    run_valid = False
    def before_epoch(self): self.seen = []
    def after_loss(self):
        self.seen.append((*(z.detach().numpy() for z in self.pred[:2]), float(self.loss_func.loss_aug)))

def numbers_of(z_q, z_p):
    n = len(z_q)
    pairs = [((z_q[i]-z_q[j])**2).sum() for i in range(n) for j in range(n) if i < j]
    own = [(z_q[i] @ z_p.T).argmax() == i for i in range(n)]
    return (z_q.std(0, ddof=1).mean(), ((z_q-z_p)**2).sum(1).mean(), math.log(np.exp(-2*np.array(pairs)).mean()),
            np.mean(own))

def test_numbers(quiet):
    learn = learner(quiet, limit=128)
    monitor,spy = CollapseMonitor(),Spy()
    learn.fit(2, 1e-3, cbs=[monitor, spy])
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    for name,expected in zip(('z_std','alignment','uniformity','own_view'),
                             np.mean([numbers_of(*o[:2]) for o in spy.seen], 0)):
        assert row[name] == pytest.approx(expected, rel=1e-4), name
    assert row['collapse_level'] == pytest.approx(math.log(63))
    assert monitor.last['loss_aug'] == pytest.approx(np.mean([o[2] for o in spy.seen]))
    held_out = extract_features(learn, learn.dls.valid)[0].numpy()
    some = held_out[np.linspace(0, 449, 128).round().astype(int)] # spread over all of them
    s = np.linalg.svd(some, compute_uv=False)
    assert row['rankme'] == pytest.approx(math.exp(-(s/s.sum()*np.log(s/s.sum())).sum()), rel=1e-3)
    assert set(monitor.verdict.numbers) == {'loss_aug','z_std','alignment','uniformity','own_view','rankme'}

@pytest.mark.parametrize('method,level', [('plain',math.log(32)), ('simclr',math.log(63)),
                                          (lambda a,b: (a*b).sum(1).mean(), 1.)])
def test_collapse_level(method, level, quiet):
    learn = learner(quiet, method, 64)
    learn.fit(1, 1e-3, cbs=(monitor := CollapseMonitor()))
    assert monitor.last['collapse_level'] == pytest.approx(level, rel=1e-5)

class Queue(nn.Module):
    "A loss that remembers, and cannot be asked about embeddings that are all equal"
    def __init__(self):
        super().__init__()
        self.calls = 0
    def forward(self, a, b):
        self.calls += 1
        if float(a.detach().std()) < 1e-3: raise ArithmeticError('no direction')
        return -(a*b).sum(1).mean()

def test_a_loss_that_cannot_say(quiet):
    learn = learner(quiet, loss := Queue(), 64, eps=0)
    learn.fit(1, 1e-3, cbs=(monitor := CollapseMonitor()))
    assert loss.calls == len(learn.dls.train) + len(learn.dls.valid) and math.isnan(monitor.last['collapse_level'])
    assert 'nan' not in str(monitor.verdict)

def test_nothing_held_out(quiet):
    images = MemoryImages(torch.randint(256, (32,3,16,16), dtype=torch.uint8))
    learn = quiet(clae_learner(memory_dls(images, images.take([]), bs=8), resnet8))
    learn.fit(1, 1e-3, cbs=(monitor := CollapseMonitor()))
    assert math.isnan(monitor.last['rankme']) and 'rankme' not in monitor.verdict.numbers

class Stop(Callback):
    order,run_valid = 2000,False
    def __init__(self, at=6): self.at = at
    def after_batch(self):
        if self.learn.train_iter == self.at: raise InterruptedError('stopped')

@pytest.mark.parametrize('at', [6,8])
def test_resumed(at, quiet, tmp_path):
    "Interrupted inside an epoch, or after the last, a training has the verdict that it would have had"
    def run(*cbs):
        learn = learner(quiet, limit=128) # four batches an epoch
        learn.fit_one_cycle(3, 1e-3, cbs=[monitor := CollapseMonitor(), *cbs])
        return monitor
    whole = run()
    with pytest.raises(InterruptedError): run(Checkpoint(tmp_path, every_batches=1), Stop(at))
    resumed = run(Checkpoint(tmp_path), Resume(tmp_path))
    assert resumed.verdict == whole.verdict and resumed.curve == whole.curve
    assert run(Resume(tmp_path)).verdict == whole.verdict

def test_resumed_where_batches_are_others(quiet, tmp_path):
    "As in another number of processes: what a part of an epoch has left behind does not fit"
    cbs = [CollapseMonitor(), Checkpoint(tmp_path, every_batches=1), Stop()]
    with pytest.raises(InterruptedError): learner(quiet, limit=128).fit(3, 1e-3, cbs=cbs)
    monitor = CollapseMonitor()
    class Shorter(Callback):
        order,run_valid = Resume.order+1,False
        def before_batch(self):
            if len(monitor.batches if monitor.batches is not None else ()) == 4 and self.epoch == 1:
                monitor.batches = monitor.batches[:2]
    learner(quiet, limit=128).fit(3, 1e-3, cbs=[monitor, Resume(tmp_path), Shorter()])
    assert all(math.isfinite(o) for o in monitor.last.values())
