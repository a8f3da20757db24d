"The linear probe against scikit-learn, against its plain form on whole features, and against the authors' loop."
import json

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn

from clae_fastai.data.catalogue import get_dls
from clae_fastai.measure.features import extract_features
from clae_fastai.measure.probe import linear_probe
from clae_fastai.method.models import resnet8
from clae_fastai.train.learner import clae_learner

def rerun_encoder(encoder, images, y, n_classes, epochs, bs, lr, seed):
    "The authors' way: the encoder runs on every batch of every epoch"
    torch.manual_seed(seed)
    linear = nn.Linear(encoder(images[:2]).shape[1], n_classes)
    opt,g = torch.optim.Adam(linear.parameters(), lr=lr),torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        perm = torch.randperm(len(images), generator=g)
        for i in range(len(images)//bs):
            idx = perm[i*bs:(i+1)*bs]
            with torch.no_grad(): h = encoder(images[idx])
            loss = F.cross_entropy(linear(h), y[idx])
            opt.zero_grad(); loss.backward(); opt.step()
    return linear

def test_adam_follows_the_loop_that_reruns_the_encoder():
    dls = get_dls('digits', bs=64, limit=300)
    learn = clae_learner(dls, resnet8, views='digits')
    (h,y),test = (extract_features(learn, dl) for dl in dls.loaders)
    images = torch.cat([learn.clae.normalize(b[0]) for b in dls.train.new(shuffle=False, drop_last=False)])
    p = linear_probe((h,y), test, 'adam', epochs=3, bs=32, seed=5)
    ref = rerun_encoder(learn.model.encoder.eval(), images, y, 10, 3, 32, 3e-4, 5)
    torch.testing.assert_close(p.linear.weight, ref.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.linear.bias, ref.bias, rtol=0, atol=1e-6)
    assert p.curve[-1] == p.final == pytest.approx(float((ref(test[0]).argmax(1) == test[1]).float().mean()))

def loss_of(w, b, x, y, l2): return F.cross_entropy(F.linear(x, w, b), y, reduction='sum') + l2/2*w.square().sum()

@pytest.mark.parametrize('l2,spread', [(1e3,1.), (1.,4.), (1.,1.), (1e-3,4.)]) # separable (spread 1), and not
def test_lbfgs_reaches_scikit_learns_loss(blobs, l2, spread):
    x,y = blobs(600, 40, 6, spread=spread)
    p = linear_probe((x,y), (x,y), l2s=[l2])
    m = LogisticRegression(C=1/l2, tol=1e-10, max_iter=20000).fit(x.double(), y)
    ours,theirs = ((p.linear.weight.data,p.linear.bias.data),(torch.tensor(m.coef_),torch.tensor(m.intercept_)))
    assert (float(loss_of(*ours, x.double(), y, l2)) ==
            pytest.approx(float(loss_of(*theirs, x.double(), y, l2)), rel=1e-4))

def plain_fit(x, y, l2, start, tol):
    def loss_and_grad(v):
        w = torch.from_numpy(v).view_as(start).requires_grad_()
        loss = loss_of(w[:,:-1], w[:,-1], x, y, l2)
        return loss.item(),torch.autograd.grad(loss, w)[0].flatten().numpy()
    options = dict(ftol=tol, gtol=0, maxiter=5000, maxfun=10**6)
    res = scipy.optimize.minimize(loss_and_grad, start.flatten().numpy(), jac=True, method='L-BFGS-B', options=options)
    return torch.from_numpy(res.x).view_as(start)

def plain_probe(x, y, valid, l2s):
    "The whole features in float64, centred, and autograd: classifier, penalty, accuracies on held-out images"
    x,mean = x.double(),x.double().mean(0)
    if valid is None:
        fit,held_out = train_test_split(np.arange(len(y)), test_size=.2, random_state=0, stratify=y)
        fit_x,fit_y,valid_x,valid_y = x[fit],y[fit],x[held_out],y[held_out]
    else:
        fit_x,fit_y,valid_x,valid_y = x,y,valid[0].double(),valid[1]
        x,y = torch.cat([x,valid_x]),torch.cat([y,valid_y])
    w,path,curve = x.new_zeros(int(y.max())+1, x.shape[1]+1),[],[]
    for l2 in l2s:
        w = plain_fit(fit_x - mean, fit_y, l2, w, 1e-6)
        path.append(w)
        curve.append(float((F.linear(valid_x - mean, w[:,:-1], w[:,-1]).argmax(1) == valid_y).float().mean()))
    i = int(np.argmax(curve))
    w = plain_fit(x - mean, y, l2s[i], path[i], 1e-9)
    return w[:,:-1],w[:,-1] - w[:,:-1]@mean,l2s[i],curve

@pytest.mark.parametrize('dtype,sizes,given', [
    (torch.float32,(300,40,6),False), (torch.float16,(300,40,6),True),
    (torch.float32,(700,6000,4),False), (torch.float64,(500,6000,4),True)]) # of 6,000 numbers a block has 349 rows
def test_lbfgs_in_blocks_is_that_of_the_whole_features(blobs, dtype, sizes, given):
    (x,y),test = blobs(*sizes, 0, 4),blobs(200, *sizes[1:], 1, 4)
    x,l2s = x.to(dtype),[1e4,10.] if sizes[1] > 100 else [1e4,10.,1e-2,1e-5]
    valid = blobs(400, *sizes[1:], 2, 4) if given else None
    p = linear_probe((x,y), test, valid=valid, l2s=l2s, device='cpu')
    weight,bias,l2,curve = plain_probe(x, y, valid, l2s)
    assert p.curve == curve and p.settings['l2'] == l2
    torch.testing.assert_close(p.linear.weight.data, weight, rtol=1e-6, atol=1e-6*float(weight.abs().max()))
    torch.testing.assert_close(p.linear.bias.data, bias, rtol=1e-6, atol=1e-6*float(weight.abs().max()))
    assert p.top1 == pytest.approx(
        float((F.linear(test[0].double(), weight, bias).argmax(1) == test[1]).float().mean()))

def test_the_penalty_is_chosen_without_the_test_set(blobs):
    train,(tx,ty) = blobs(300, 20, 4, 0, 2),blobs(200, 20, 4, 1, 2)
    a,b = linear_probe(train, (tx,ty)),linear_probe(train, (tx[:50],ty.flip(0)[:50]))
    assert a.settings == b.settings and torch.equal(a.linear.weight, b.linear.weight)
    l2s = a.settings['l2s']
    assert len(l2s) == len(a.curve) == 45 and min(l2s) == pytest.approx(1e-6) and max(l2s) == pytest.approx(1e5)
    # of equals the strongest
    assert a.curve.index(max(a.curve)) == l2s.index(a.settings['l2']) and a.best_on_test is None
    assert a.final > .6 and a.final == a.top1 and a.top5 is None

def test_best_on_test_is_not_the_headline(blobs):
    p = linear_probe(blobs(200, 10, 8, 0, 3), blobs(100, 10, 8, 1, 3), 'adam', epochs=40, bs=50, lr=.05)
    assert p.final == p.curve[-1] and p.best_on_test == max(p.curve) == p.curve[p.best_epoch-1]
    j = json.loads(p.to_json())
    assert j['final'] == p.final and j['settings'] == dict(solver='adam', seed=0, epochs=40, bs=50, lr=.05)

def test_accuracies_of_more_test_images_than_a_block(blobs):
    train,(tx,ty) = blobs(300, 12, 7, 0, 4),blobs(2500, 12, 7, 1, 4)
    for solver in ('lbfgs','adam'):
        p = linear_probe(train, (tx,ty), solver, epochs=3, l2s=[1.])
        with torch.no_grad(): top = p.linear(tx.to(p.linear.weight)).argsort(1, descending=True)
        hit = top == ty[:,None]
        assert p.top1 == pytest.approx(float(hit[:,0].float().mean()))
        assert p.top5 == pytest.approx(float(hit[:,:5].any(1).float().mean()))
        assert p.mean_per_class == pytest.approx(np.mean([float(hit[ty == c,0].float().mean()) for c in range(7)]))

@pytest.mark.parametrize('wrong,words', [
    (dict(solver='adam', epochs=0), 'epochs .* 0, 256'), (dict(solver='adam', bs=0), 'bs .* 0 and'),
    (dict(solver='adam', lr=0.), 'lr above 0'),
    (dict(solver='adam', lr=float('nan')), 'lr above 0'), (dict(l2s=[]), 'one penalty or more'),
    (dict(l2s=[1.,-1.]), '0 or above')])
def test_bad_probe_settings(blobs, wrong, words):
    with pytest.raises(ValueError, match=words): linear_probe(blobs(60, 5, 3), blobs(30, 5, 3, 1), **wrong)
