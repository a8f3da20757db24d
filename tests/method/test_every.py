"An adversarial term in each k-th step: what it costs, and that the steps between leave its batch norms alone."
import math
from collections import Counter

import pytest
import torch
from fastai.vision.all import SGD, Adam, Callback, DataLoaders, GradientAccumulation, OptimWrapper, partial, set_seed
from torch import nn
from torch.profiler import ProfilerActivity, profile

from clae_fastai.all import (
    FFGSM, FGSM, PGD, RFGSM, Attack, Checkpoint, FusedAdam, RandomPerturbation, Resume, clae_learner, dual_bns, get_dls,
    resnet8)

def learner(quiet, **kwargs):
    set_seed(0)
    # ten steps an epoch
    return quiet(clae_learner(get_dls('digits', bs=32, limit=320), resnet8, views='digits', **kwargs))

def adversarial(model): return [t.clone() for bn in dual_bns(model) for t in (*bn.adv.parameters(), *bn.adv.buffers())]
def same(a, b): return all(map(torch.equal, a, b))

class Spy(Callback):
    "Of each step: was it attacked, and did the adversarial batch norms move, and the clean ones?"
    order,run_valid = 1000,False
    def before_fit(self): self.attacked,self.moved,self.terms,self.now = [],[],[],self.state()
    def state(self): return adversarial(self.model),[p.clone() for p in self.model.encoder.conv1.parameters()]
    def after_loss(self):
        self.attacked.append(len(self.learn.xb) == 3)
        self.terms.append(self.loss_func.loss_adv)
    def after_batch(self):
        before,self.now = self.now,self.state()
        self.moved.append(tuple(not same(a, b) for a,b in zip(before, self.now)))

optimisers = dict(fused=FusedAdam, adam=Adam, sgd=partial(SGD, mom=.9),
                  torch=partial(OptimWrapper, opt=torch.optim.AdamW))

@pytest.mark.parametrize('opt_func', optimisers.values(), ids=optimisers.keys())
def test_between_attacks_its_batch_norms_rest(opt_func, quiet):
    "No momentum, no decay, no statistics; all else is trained in every step"
    learn = learner(quiet, every=3, opt_func=opt_func)
    learn.fit(2, 1e-3, cbs=(spy := Spy()), wd=.1)
    assert spy.attacked == [i % 3 == 2 for i in range(20)] # of the run, not of the epoch
    assert spy.moved == [(o,True) for o in spy.attacked]

@pytest.mark.parametrize('options,every,units', [({}, 4, 7.25), (dict(every=1), 1, 11)], ids=['by default','the paper'])
def test_how_often(options, every, units, quiet):
    learn = learner(quiet, **options)
    learn.fit(1, 1e-3, cbs=(spy := Spy()))
    assert spy.attacked == [i % every == every-1 for i in range(10)] and learn.clae.units == units

def test_mean_of_attacked_steps(quiet):
    learn = learner(quiet, every=4)
    learn.fit(1, 1e-3, cbs=(spy := Spy()))
    terms = [float(o) for o in spy.terms if o is not None]
    assert len(terms) == 2 and learn.loss_terms.mean('loss_adv') == pytest.approx(sum(terms)/2)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['loss_adv'] == learn.loss_terms.mean('loss_adv') and row['loss_aug'] > 0

def test_no_attack_in_a_short_run(quiet):
    learn = learner(quiet, every=100)
    learn.fit(1, 1e-3, cbs=(spy := Spy()))
    assert not any(spy.attacked) and learn.loss_terms.mean('loss_adv') is None and not any(a for a,_ in spy.moved)

def test_accumulated_gradients_are_kept(quiet):
    "An attack in the first of two batches that make a step is part of that step"
    learn = learner(quiet, every=3)
    learn.fit(1, 1e-3, cbs=[spy := Spy(), GradientAccumulation(2*32)])
    attacked = [i for i,o in enumerate(spy.attacked) if o] # 2, 5 and 8
    steps = {i//2 for i in attacked}
    assert [i//2 for i,(a,_) in enumerate(spy.moved) if a and i % 2] == sorted(steps)

@pytest.mark.parametrize('attack', [dict(attack='random'), {}], ids=str)
@pytest.mark.parametrize('at', [5,6,13])
def test_resumed(at, attack, quiet, tmp_path):
    "Interrupted before, in and after an attacked step, bit for bit"
    class Stop(Callback):
        order,run_valid = 2000,False
        def after_batch(self):
            if self.learn.train_iter == at: raise InterruptedError('stopped')
    def run(*cbs):
        learn = learner(quiet, every=3, **attack)
        learn.fit_one_cycle(2, 1e-3, cbs=cbs)
        return learn
    whole = run()
    with pytest.raises(InterruptedError): run(Checkpoint(tmp_path, every_batches=1), Stop())
    resumed = run(Resume(tmp_path))
    assert same(whole.model.state_dict().values(), resumed.model.state_dict().values())
    assert whole.recorder.values == resumed.recorder.values

@pytest.mark.parametrize('every,units', [(1,11), (4,7.25)])
def test_convolutions_of_a_cycle(every, units, quiet):
    "Forwards, backwards into images and weights, and those into the images alone, counted by PyTorch's profiler"
    dls = get_dls('digits', bs=32, limit=4*32)
    dls = DataLoaders(dls.train, dls.valid.new(dls.valid.dataset.new_empty()))
    learn = quiet(clae_learner(dls, resnet8, views='digits', every=every))
    n_convs = sum(isinstance(m, nn.Conv2d) for m in learn.model.modules())
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as prof: learn.fit(1, 1e-3)
    calls = Counter({o.key: o.count for o in prof.key_averages()})
    forwards,backwards = (calls[k]/n_convs for k in ('aten::convolution','aten::convolution_backward'))
    attacks = 4/every
    # two views each; the attack's, and the adversarial view's
    assert (forwards, backwards) == (8 + 2*attacks, 8 + 2*attacks)
    assert (forwards + 2*backwards - attacks)/4 == units == learn.clae.units # the attack's backward is half of one

class Count:
    "Counts forwards and gradients of an attack"
    def __init__(self): self.n = 0
    def __call__(self, x):
        self.n += 1
        return x.flatten(1)*2
    def loss(self, a, b):
        if b.requires_grad: b.register_hook(lambda g: setattr(self, 'n', self.n+1))
        return (a*b).sum().sin()

@pytest.mark.parametrize('attack,units', [
    (FGSM(.1), 2), (RFGSM(.1), 3), (RFGSM(.1, 0.), 2), (FFGSM(.1), 3), (FFGSM(.1, start='zero'), 2),
    (PGD(.1, steps=3), 7), (PGD(.1, steps=3, start='zero'), 6), (RandomPerturbation(.1), 0)], ids=str)
def test_units_of_attacks(attack, units):
    count = Count()
    attack(count, torch.rand(4,1,3,3), count.loss)
    assert count.n == units == attack.units

def test_units(quiet):
    for kwargs,units in ((dict(eps=0), 6), (dict(alpha=0), 6), (dict(attack='random', every=1), 9),
                         (dict(attack='random', every=4), 6.75), (dict(every=2), 8.5),
                         (dict(attack=PGD(.03), every=1), 6+3+21)):
        assert learner(quiet, **kwargs).clae.units == units
    class Own(Attack):
        def delta(self, x, grad): return .01*grad().sign()
    for attack in (lambda embed, x, loss: x, Own(.01)):
        assert math.isnan(learner(quiet, attack=attack).clae.units) # nobody knows

@pytest.mark.parametrize('every', [0, -1, 1.5, 'x', None])
def test_refused(every, quiet):
    with pytest.raises(ValueError, match='every must be a whole number'): learner(quiet, every=every)
