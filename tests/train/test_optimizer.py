"`FusedAdam` is fastai's `Adam`: the same weights and state in float64, the same files, in a handful of kernels."
import pickle
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai.vision.all import (Adam, Callback, DataLoader, DataLoaders, L, Learner, MSELossFlat, Recorder, load_learner,
                               partial, set_seed)

from clae_fastai.data.catalogue import get_dls
from clae_fastai.method.models import resnet8
from clae_fastai.train.checkpoint import Checkpoint, Resume
from clae_fastai.train.learner import clae_learner, encoder_learner
from clae_fastai.train.optimizer import FusedAdam

both = FusedAdam,Adam

class Net(nn.Module):
    "Convolutions and norms, a weight that no gradient reaches, and one whose gradient is always zero"
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Flatten())
        self.head = nn.Linear(128, 4)
        self.unused,self.idle = nn.Parameter(torch.ones(3)),nn.Parameter(torch.ones(2, 2))
    def forward(self, x): return self.head(self.body(self.stem(x))) + 0*self.idle.sum()

def groups(model):
    return L([*model.stem.parameters()], [*model.body.parameters(), model.unused],
             [*model.head.parameters(), model.idle])

class Gradients(Callback):
    "Takes gradients away: in some steps the stem's, in others the head's; and lays one out in another way"
    order = 20
    def before_step(self):
        stem,head = self.model.stem[0].weight,self.model.head.weight
        if self.iter % 4 == 1: stem.grad = None
        if self.iter % 5 == 2: head.grad.zero_()
        if self.iter % 3 == 0 and stem.grad is not None: stem.grad = stem.grad.to(memory_format=torch.channels_last)

def learner(opt_func, channels_last=False, cbs=None, **kwargs):
    set_seed(0)
    dl = DataLoader([(torch.randn(3, 6, 6).double(), torch.randn(4).double()) for _ in range(120)], bs=6)
    model = Net().double()
    if channels_last: model = model.to(memory_format=torch.channels_last)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), model, MSELossFlat(), opt_func=opt_func, splitter=groups,
                    cbs=cbs, **kwargs)
    return learn.remove_cb(Recorder) # which smooths losses in float32 only

def whole(learn): learn.fit_one_cycle(1, 3e-3)
def layered(learn): learn.fit_one_cycle(1, slice(1e-4, 1e-2), wd=.3)
def head_first(learn): learn.fit_one_cycle(1, slice(1e-2), moms=(.8,.7,.8))
def frozen(learn):
    learn.freeze()
    learn.fit_one_cycle(1, 1e-2)
def frozen_then_not(learn):
    frozen(learn)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
def other_layout(learn):
    whole(learn)
    learn.model.to(memory_format=torch.channels_last)
    whole(learn)

cases = [(whole, {}, {}), (layered, {}, {}), (head_first, {}, {}), (frozen, {}, {}), (frozen_then_not, {}, {}),
    (other_layout, {}, {}), (frozen, {}, dict(train_bn=False)),
    (frozen_then_not, dict(wd=.2), dict(train_bn=False, wd_bn_bias=True)), (layered, dict(decouple_wd=False), {}),
    (layered, dict(decouple_wd=False), dict(wd_bn_bias=True)), (whole, dict(wd=0.), {}),
    (layered, dict(mom=.5, sqr_mom=.9, eps=1e-8), {}), (layered, {}, dict(channels_last=True)),
    (layered, {}, dict(cbs=Gradients())), (layered, dict(decouple_wd=False), dict(cbs=Gradients(), channels_last=True)),
    (frozen_then_not, {}, dict(cbs=Gradients()))]

def assert_equal(a, b):
    "Values and their names to 1e-12, wherever there are any"
    assert type(a) is type(b) or isinstance(a, (int,float)), (a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a: assert_equal(a[k], b[k])
    elif isinstance(a, (list,tuple,L)):
        assert len(a) == len(b)
        for o in zip(a, b): assert_equal(*o)
    elif isinstance(a, torch.Tensor): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    else: assert a == b

@pytest.mark.parametrize('fit,opt,kwargs', cases)
def test_equals_fastais_adam(quiet, fit, opt, kwargs):
    "Twenty steps of one cycle, or twice twenty"
    ours,fastai = (quiet(learner(partial(f, **opt), **deepcopy(kwargs))) for f in both)
    start = deepcopy(ours.model.state_dict())
    for learn in (ours,fastai): fit(learn)
    assert_equal(ours.opt.state_dict(), fastai.opt.state_dict())
    assert_equal(dict(ours.model.state_dict()), dict(fastai.model.state_dict()))
    assert not torch.equal(start['head.weight'], ours.model.head.weight)
    assert 'step' not in ours.opt.state[ours.model.unused]

shapes = st.sampled_from([(), (0,), (1,), (5,), (3,4), (4,3,3,3), (4,1,3,3), (4,3,1,1), (1,1,1,1)])
layouts = st.sampled_from(['as it comes','channels last','transposed','with gaps'])

def laid_out(t, layout):
    if layout == 'channels last' and t.ndim == 4: return t.contiguous(memory_format=torch.channels_last)
    if layout == 'transposed' and t.ndim > 1: return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == 'with gaps' and t.ndim: return torch.stack([t, t], -1)[...,0]
    return t

gradients = st.lists(st.sampled_from(['random','zero','none']), min_size=6, max_size=6) # of six steps

@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(shapes, layouts, layouts, gradients), min_size=1, max_size=4),
       st.sampled_from([0.,.1]), st.booleans(), st.floats(0, .95), st.floats(.5, .999))
def test_any_gradients_in_any_layout(params, wd, decouple_wd, mom, sqr_mom):
    "In memory, weights and gradients lie as they like"
    g = torch.Generator().manual_seed(0)
    def _random(shape, layout): return laid_out(torch.randn(shape, generator=g, dtype=torch.float64), layout)
    weights = [_random(shape, layout) for shape,layout,*_ in params]
    own = [[nn.Parameter(laid_out(w.clone(), layout)) for w,(_,layout,*_) in zip(weights, params)] for _ in both]
    opts = [f(ps, lr=.1, mom=mom, sqr_mom=sqr_mom, wd=wd, decouple_wd=decouple_wd) for f,ps in zip(both, own)]
    for i in range(6):
        grads = [dict(random=_random(shape, layout), zero=laid_out(torch.zeros(shape).double(), layout),
                      none=None)[kinds[i]] for shape,_,layout,kinds in params]
        for opt,ps in zip(opts, own):
            for p,grad in zip(ps, grads): p.grad = None if grad is None else grad.clone()
            opt.step()
    assert_equal([p.detach() for p in own[0]], [p.detach() for p in own[1]])
    assert_equal(opts[0].state_dict(), opts[1].state_dict())

def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

@pytest.mark.parametrize('first,then', [both, both[::-1]])
def test_saved_by_one_and_loaded_by_the_other(quiet, tmp_path, first, then):
    "`learn.save`: what comes after is what would have come"
    one,other = (quiet(learner(f, path=tmp_path)) for f in (first,then))
    one.fit_one_cycle(1, 3e-3)
    one.save('half', with_opt=True)
    other.load('half', with_opt=True)
    assert_equal(other.opt.state_dict(), one.opt.state_dict())
    for learn in (one,other):
        set_seed(1)
        learn.fit_one_cycle(1, 3e-3)
    assert_equal(weights(one), weights(other))
    assert_equal(other.opt.state_dict(), one.opt.state_dict())

class Stop(Callback):
    order,run_valid = 2000,False
    def after_batch(self):
        if self.train_iter == 4: raise InterruptedError('stopped')

def images(**kwargs):
    set_seed(0)
    return clae_learner(get_dls('digits', bs=32, limit=96), resnet8, views='digits', every=1, **kwargs)

@pytest.mark.parametrize('first,then', [both, both[::-1]])
def test_checkpoints_of_the_other(quiet, tmp_path, first, then):
    "`Resume` goes on with either's; the two differ by rounding in float32"
    def _fit(opt_func, *cbs):
        learn = quiet(images(opt_func=opt_func, cbs=cbs))
        learn.fit_one_cycle(2, 1e-3)
        return learn
    with pytest.raises(Exception, match='stopped'): _fit(first, Checkpoint(tmp_path, every_batches=1), Stop())
    resumed,uninterrupted = _fit(then, Resume(tmp_path)),_fit(then)
    for a,b in zip(weights(resumed).values(), weights(uninterrupted).values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert ([s.get('step') for s in resumed.opt.state_dict()['state']] ==
            [s.get('step') for s in uninterrupted.opt.state_dict()['state']])

def test_what_learners_take(quiet, tmp_path):
    "It is our default and nobody else's; one's own stays; it is exported and pickled"
    learn = quiet(images(path=tmp_path))
    learn.fit(1, 1e-3)
    assert (type(learn.opt) is FusedAdam and
            type(encoder_learner(get_dls('digits', bs=32, limit=96), learn).opt) is not FusedAdam)
    assert images(opt_func=Adam).opt_func is Adam
    before = deepcopy(learn.opt.state_dict())
    learn.export('learner.pkl') # which makes a new optimiser, and loads its state
    assert_equal(learn.opt.state_dict(), before)
    assert load_learner(tmp_path/'learner.pkl').opt_func is FusedAdam
    opt = pickle.loads(pickle.dumps(learn.opt))
    assert_equal(opt.state_dict(), learn.opt.state_dict())
    learn.opt.clear_state()
    assert all(s.keys() <= {'do_wd','force_train'} for s in learn.opt.state_dict()['state'])

class Operations(TorchDispatchMode):
    def __init__(self): self.names = []; super().__init__()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.partition('::')[2])
        return func(*args, **kwargs or {})

def test_a_step_is_a_few_kernels_and_no_wait():
    opt = FusedAdam(groups(model := Net()), lr=1e-3)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    with Operations() as seen:
        opt.step()
        opt.zero_grad()
    kinds = {n for n in seen.names if n not in ('detach_','unbind')}
    assert kinds == {'full','_foreach_add_','_fused_adamw_','_foreach_zero_'} and seen.names.count('_fused_adamw_') == 1

def test_gradients_of_a_second_derivative():
    "`zero_grad` cuts them from the graph that made them, as fastai's does"
    p = nn.Parameter(torch.ones(3))
    opt = FusedAdam([p], lr=.1)
    (p**3).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    opt.step()
    opt.zero_grad()
    assert not p.grad.requires_grad and p.grad.eq(0).all()

@pytest.mark.parametrize('opt', [{}, dict(decouple_wd=False)])
def test_a_device_without_fused_kernels(quiet, monkeypatch, opt):
    monkeypatch.setattr('clae_fastai.train.optimizer._get_fused_kernels_supported_devices', lambda: [])
    test_equals_fastais_adam(quiet, layered, opt, {})
