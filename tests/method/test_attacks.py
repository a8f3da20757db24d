"Properties of every attack, in every norm and space."
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clae_fastai.all import (
    FFGSM, FGSM, PGD, RFGSM, CLAECallback, NTXentLoss, PlainLoss, RandomPerturbation, adversarial_bn, attacks,
    clae_learner, frozen_bn_stats, get_dls, resnet8, set_seed)

mean,std = torch.tensor([.49,.48,.45]),torch.tensor([.25,.24,.26])
kinds = [(a,n,s) for a in attacks for n in ('linf','l2') for s in ('normalized','pixel')]

def embedder(c, h, w, dtype):
    torch.manual_seed(c*h*w)
    return nn.Sequential(nn.Conv2d(c, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4*h*w, 8)).to(dtype)

def size_of(delta, norm): return delta.flatten(1).abs().amax(1) if norm == 'linf' else delta.flatten(1).norm(dim=1)

@pytest.mark.parametrize('name,norm,space', kinds)
@settings(max_examples=12, deadline=None)
@given(b=st.integers(2, 6), h=st.integers(1, 7), w=st.integers(1, 7), eps=st.floats(0, 2),
       dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_size_validity_and_no_nan(name, norm, space, b, h, w, eps, dtype, seed):
    f,g = embedder(3, h, w, dtype),torch.Generator().manual_seed(seed)
    m,s = (o.to(dtype).view(-1,1,1) for o in (mean,std))
    x = (torch.rand(b, 3, h, w, generator=g, dtype=dtype) - m)/s
    attack = attacks[name](eps, norm=norm, space=space)
    attack.stats = mean,std
    x_adv = attack(f, x, NTXentLoss())
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and x_adv.isfinite().all() and not x_adv.requires_grad
    if eps == 0: assert x_adv is x
    delta = (x_adv - x)*(s if space == 'pixel' else 1)
    tol = 100*torch.finfo(dtype).eps*(1 + x.abs().max())*(1 if norm == 'linf' else (3*h*w)**.5)
    assert (size_of(delta, norm) <= eps + tol).all()
    if space == 'pixel':
        pixels = x_adv*s + m
        assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6

def test_pgd_takes_its_steps():
    "As many as it is told, written out here"
    f,loss,eps,size = embedder(3, 5, 5, torch.float64),NTXentLoss(),.1,.04
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    anchor,delta = f(x).detach(),torch.zeros_like(x)
    for steps in (1,2,3):
        moved = (x + delta).requires_grad_()
        g, = torch.autograd.grad(loss(anchor, f(moved)), moved)
        delta = (delta + size*g.sign()).clamp(-eps, eps)
        torch.testing.assert_close(PGD(eps, steps=steps, step_size=size, start='zero')(f, x, loss), x + delta,
                                   rtol=0, atol=1e-12)

@pytest.mark.parametrize('norm', ['linf','l2'])
@pytest.mark.parametrize('attack', [FGSM, partial(PGD, steps=4, start='zero'), partial(FFGSM, start='zero')])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_permuting_the_batch_permutes_the_adversary(attack, norm, seed):
    g = torch.Generator().manual_seed(seed)
    f,x = embedder(3, 5, 5, torch.float64),torch.randn(6, 3, 5, 5, generator=g, dtype=torch.float64)
    perm,attack = torch.randperm(6, generator=g),attack(.1, norm=norm)
    for loss in (NTXentLoss(), PlainLoss()):
        torch.testing.assert_close(attack(f, x, loss)[perm], attack(f, x[perm], loss), rtol=0, atol=1e-12)

@pytest.mark.parametrize('norm', ['linf','l2'])
@pytest.mark.parametrize('space', ['normalized','pixel'])
@settings(max_examples=15, deadline=None)
@given(eps=st.floats(1e-3, 1), seed=st.integers(0, 99))
def test_special_cases_equal_fgsm(norm, space, eps, seed):
    f,x = embedder(3, 6, 5, torch.float32),torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
    kw = dict(norm=norm, space=space)
    ref,same = FGSM(eps, **kw),[PGD(eps, steps=1, step_size=eps, start='zero', **kw), RFGSM(eps, start_size=0, **kw),
                                FFGSM(eps, step_size=eps, start='zero', **kw)]
    for a in (ref, *same): a.stats = mean,std
    x_adv = ref(f, x, NTXentLoss())
    for a in same: assert torch.equal(a(f, x, NTXentLoss()), x_adv), a

@settings(max_examples=20, deadline=None)
@given(d=st.integers(2, 40), b=st.integers(1, 9), seed=st.integers(0, 999))
def test_a_positive_pair_alone_has_no_gradient(d, b, seed):
    """At delta=0 a normalised positive pair is at its maximum of similarity: FGSM is directed by the negatives,
    not so a random start"""
    seen = []
    class Watch(FGSM):
        def direction(self, g): seen.append(g); return super().direction(g)
    class WatchRandom(RFGSM):
        def direction(self, g): seen.append(g); return super().direction(g)
    x = torch.randn(b, d, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    def embed(x): return nn.functional.normalize(x.flatten(1), dim=1)
    def similarity(anchors, z): return -(anchors*z).sum()
    Watch(.1)(embed, x, similarity)
    assert seen[0].abs().max() < 1e-12
    WatchRandom(.1)(embed, x, similarity)
    assert seen[-1].abs().max() > 1e-6

@pytest.fixture(scope='module')
def trained():
    set_seed(0)
    learn = clae_learner(get_dls('digits', bs=64, limit=640), resnet8, views='digits', every=1)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 3e-3)
    return learn

@pytest.mark.parametrize('norm,eps', [('linf',.06), ('l2',1.)])
@pytest.mark.parametrize('attack', [FGSM, RFGSM, FFGSM])
def test_one_step_attacks_beat_random_on_a_trained_encoder(trained, attack, norm, eps):
    model,loss = trained.model.train(),trained.loss_func.base
    def mean_loss(a):
        torch.manual_seed(1)
        tot = 0.
        for b in list(trained.dls.valid)[:4]:
            x = trained.clae.views(b[0])[0]
            with adversarial_bn(model), frozen_bn_stats(model):
                x_adv = a(model, x, loss)
                with torch.no_grad(): tot += float(loss(model(x), model(x_adv)))
        return tot
    assert mean_loss(attack(eps, norm=norm)) > mean_loss(RandomPerturbation(eps, norm=norm))

def test_any_callable_is_an_attack(quiet):
    calls = []
    def shift(embed, x, loss):
        calls.append(float(loss(embed(x), embed(x))))
        return x + .1
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=64), resnet8, views='digits', every=1, attack=shift))
    learn.fit(1)
    assert len(calls) == 2 and isinstance(learn.clae, CLAECallback)
