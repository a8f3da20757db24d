"""The figures: no trace left in the learner, intervals and distances against SciPy, every kind of learner and data,
helpful errors."""
import copy
import random
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clae_fastai.all import (FGSM, Callback, CLAECallback, CLAELoss, ContrastiveModel, DataLoader, DataLoaders,
                             DualBatchNorm, IntToFloatTensor, Learner, MemoryDL, MemoryImages, Normalize, NTXentLoss,
                             adversarial_bn, clae_learner, create_encoder, extract_features, full_batches, get_dls,
                             linear_probe, partial, projection_head, resnet8, seeded_clae, set_seed)
from clae_fastai.paper.analysis import (adversarial_images, bn_distance, bn_statistics, classifier_vs_eps,
                                        confidence_interval, frechet_distance, intervals, loss_vs_eps,
                                        paired_intervals, plot_adversarial_images, plot_bn_statistics,
                                        plot_classifier_vs_eps, plot_loss_vs_eps)

small = partial(resnet8, width=4)

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def make(quiet, data='digits', digits_dir=None, fit=True, seed=3, **kwargs):
    set_seed(seed)
    dls = get_dls(data, **(dict(path=digits_dir/'rgb', size=16, num_workers=0) if data == 'folder' else
                           dict(limit=128)), bs=32)
    learn = quiet(clae_learner(
        dls, small, **{**({} if data == 'folder' else dict(views='digits')), 'every': 1, **kwargs}))
    if fit: learn.fit(1, 1e-3)
    return learn

def all_figures(learn):
    plot_adversarial_images(adversarial_images(learn, 3))
    plot_loss_vs_eps(loss_vs_eps(learn, (0,.03), 2))
    plot_classifier_vs_eps(classifier_vs_eps(learn, (0,.03), 1, l2s=[1.]))
    plot_bn_statistics(bn_statistics(learn))
    bn_statistics(learn, reestimate=True, n_batches=2)

# the learner afterwards

def state(learn):
    "Everything that training depends on, and what a user could notice"
    opt,grads = [v for s in learn.opt.state.values() for v in s.values()],[p.grad for p in learn.model.parameters()]
    tensors = copy.deepcopy([*learn.model.state_dict().values(), *opt, *grads])
    loaders,drawn = [dl.rng.getstate() for dl in learn.dls.loaders],getattr(learn.clae.attack, 'generator', None)
    generators = [random.getstate(), np.random.get_state(), torch.get_rng_state(), loaders, drawn and drawn.get_state()]
    noticed = ('training','track_running_stats','momentum','use_adv')
    modules = [[getattr(m, k, None) for k in noticed] + [len(m._forward_hooks), len(m._backward_hooks)]
               for m in learn.model.modules()]
    batch = [learn.loss_func.loss_aug, learn.loss_func.loss_adv, learn.xb, learn.yb]
    objects = [*learn.cbs, learn.clae.attack, learn.clae.views, learn.clae.learn, learn.dls, *learn.dls.loaders]
    return tensors,generators,modules,batch,[held(cb) for cb in learn.cbs],[id(o) for o in objects]

def held(cb):
    "The numbers that a callback holds"
    def _numbers(v): return isinstance(v, (int,float,torch.Tensor)) or isinstance(v, list) and all(map(_numbers, v))
    return [(k, copy.deepcopy(v)) for k,v in sorted(vars(cb).items()) if _numbers(v)]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x,y in zip(a, b)) if isinstance(a, (list,tuple)) else a == b

@pytest.mark.parametrize('data,attack', [('digits','rfgsm'), ('folder','fgsm')])
def test_training_goes_on_as_if_nobody_had_looked(data, attack, digits_dir, quiet):
    def two_fits(between):
        learn = make(quiet, data, digits_dir, attack=attack)
        learn.model.train(); learn.model.head.eval() # any mode must come back
        before = state(learn)
        between(learn)
        assert same(before, state(learn))
        learn.fit(1, 1e-3)
        return learn.recorder.losses,learn.recorder.values,state(learn)[:2]
    assert same(two_fits(lambda learn: None), two_fits(all_figures))

@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_looking_from_within_training(precision, quiet, monkeypatch):
    "Within a batch, and under autocast; what is measured there is measured in float32"
    seen,autocast,attack = [],[],CLAECallback.adversarial_views
    class Look(Callback):
        def after_pred(self):
            if not self.training or self.train_iter != 6: return
            with monkeypatch.context() as m:
                def _spy(self, x):
                    autocast.append(torch.is_autocast_enabled('cpu'))
                    return attack(self, x)
                m.setattr(CLAECallback, 'adversarial_views', _spy)
                all_figures(self.learn)
                seen.append(loss_vs_eps(self.learn, .03, 2))
    def fit(cbs):
        learn = make(quiet, fit=False, precision=precision, attack='rfgsm')
        learn.fit(2, 1e-3, cbs=cbs)
        return learn.recorder.losses,learn.recorder.values,state(learn)[:2]
    assert same(fit([]), fit([Look()])) and len(seen) == 1 and autocast and not any(autocast)
    t = seen[0].pivot(index='batch', columns=['kind','eps'], values='loss')
    assert (t['adversarial'][.03] > t['random'][.03]).all()

def test_an_error_in_the_middle_changes_nothing_either(quiet, monkeypatch):
    learn = make(quiet, attack='rfgsm')
    learn.model.train() # not the mode that the error leaves behind
    before = state(learn)
    monkeypatch.setattr(CLAECallback, 'adversarial_views', lambda self, x: self.model.eval() and self.views(x) and 1/0)
    for figure in (loss_vs_eps, partial(classifier_vs_eps, l2s=[1.]), adversarial_images,
                   partial(bn_statistics, reestimate=True), Learner.show_views):
        with pytest.raises(ZeroDivisionError): figure(learn)
        assert same(before, state(learn)), figure

def test_the_seed_decides_and_nothing_else(quiet):
    learn = make(quiet, attack='rfgsm')
    def tables(seed):
        images = adversarial_images(learn, 4, seed=seed)
        return [np.stack(images.x_adv), *(np.asarray(column) for column in (
            loss_vs_eps(learn, .03, 2, seed).loss, classifier_vs_eps(learn, .03, 2, seed=seed, l2s=[1.]).cross_entropy,
            bn_statistics(learn, True, 2, seed)['mean']))]
    a = tables(1)
    torch.manual_seed(9); random.seed(9); np.random.seed(9)
    learn.clae.attack(learn.model, torch.zeros(2,1,16,16), learn.loss_func.pair) # moves the attack's generator
    assert all(np.array_equal(x, y) for x,y in zip(a, tables(1)))
    assert not any(np.array_equal(x, y) for x,y in zip(a, tables(2)))

# the numbers

@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), level=st.floats(.5, .999))
def test_intervals_are_scipys(values, level):
    with warnings.catch_warnings(action='error'): mean,low,high = confidence_interval(values, level)
    v = np.array(values)
    if (sem := scipy.stats.sem(v)) > 1e-9: # else SciPy's own interval is nan
        assert (low, high) == pytest.approx(scipy.stats.t.interval(level, len(v)-1, v.mean(), sem), rel=1e-6, abs=1e-6)
    assert low <= mean <= high and mean == pytest.approx(v.mean())

@pytest.mark.parametrize('value', [0, .1, 3., -1e9])
def test_an_interval_of_equal_values_is_the_value(value):
    with warnings.catch_warnings(action='error'): assert confidence_interval([value]*7) == (value,)*3

def test_paired_intervals_are_scipys(quiet):
    rows = loss_vs_eps(make(quiet), (0,.02,.05), 6)
    wide = rows.pivot(index='batch', columns=['kind','eps'], values='loss')
    for e in (.02,.05):
        ref = scipy.stats.ttest_rel(wide['adversarial'][e], wide['random'][e]).confidence_interval(.9)
        assert paired_intervals(rows, level=.9).loc[e, ['low','high']].tolist() == pytest.approx([ref.low, ref.high])
        assert intervals(rows).loc[('random',e)].tolist() == pytest.approx(confidence_interval(wide['random'][e]))
    other_way = paired_intervals(rows, kinds=('random','adversarial'))
    assert other_way.loc[.05, 'mean'] == pytest.approx(-paired_intervals(rows).loc[.05, 'mean'])
    assert paired_intervals(rows).index.tolist() == [.02,.05]

def numbers(low, high, n): return st.lists(st.floats(low, high), min_size=n, max_size=n)
gaussians = st.integers(1, 6).flatmap(
    lambda n: st.tuples(*[st.tuples(numbers(-9, 9, n), numbers(1e-3, 9, n)) for _ in range(3)]))

@settings(deadline=None, max_examples=50)
@given(gaussians)
def test_frechet_distance_is_that_of_the_matrices(abc):
    (m1,v1),(m2,v2),(m3,v3) = a,b,c = abc
    s1,s2 = np.diag(v1),np.diag(v2)
    full = np.square(np.subtract(m1, m2)).sum() + np.trace(s1 + s2 - 2*scipy.linalg.sqrtm(s1@s2).real)
    d = frechet_distance(*a, *b)
    assert d**2 == pytest.approx(full, abs=1e-6) and d == frechet_distance(*b, *a) and frechet_distance(*a, *a) == 0
    assert d <= frechet_distance(*a, *c) + frechet_distance(*c, *b) + 1e-9

@pytest.mark.parametrize('kw', [dict(), dict(norm='l2'), dict(space='pixel'), dict(norm='l2', space='pixel')])
def test_perturbations_have_their_size(kw, quiet):
    eps = .5 if 'norm' in kw else .02
    images = adversarial_images(make(quiet, attack=FGSM(eps, **kw)), 32)
    # the views divide by a standard deviation of .5
    d = np.stack(images.difference).reshape(32, -1)*(1 if 'space' in kw else 2)
    fresh = make(quiet, fit=False, attack=FGSM(eps, **kw)) # nor need it have been trained to know its normalisation
    assert len(adversarial_images(fresh, 2)) == 2
    size = np.linalg.norm(d, axis=1) if 'norm' in kw else np.abs(d).max(1)
    said = images.l2 if 'norm' in kw else images.linf
    assert size.max() <= eps*(1 + 1e-4) and said.to_numpy() == pytest.approx(size*(2 if 'space' in kw else 1), rel=1e-4)
    if 'space' not in kw: assert size == pytest.approx(eps, rel=1e-4)

def test_originals_are_the_images_of_the_data(quiet):
    learn = make(quiet, fit=False)
    data = learn.dls.train_ds.images.permute(0,2,3,1).numpy()/255
    images = adversarial_images(learn, 8)
    assert all((np.abs(data - o).max((1,2,3)) < 1e-6).any() for o in images.original)
    def near(a, b): return np.corrcoef(a.ravel(), b.ravel())[0,1]
    own,others = ([near(images.original[i], images.x_q[(i+k) % 8]) for i in range(8)] for k in (0,1))
    assert np.mean(own) > np.mean(others) + .2 # each beside its own views
    assert len(adversarial_images(learn, 99)) == 32

@pytest.mark.parametrize('kw', [dict(), dict(norm='l2'), dict(space='pixel')])
def test_the_sweep_is_the_attack_at_each_strength(kw, quiet):
    """One gradient for all strengths gives what an attack of each strength gives,
    and the loss is the second term of a training step's"""
    learn,eps = make(quiet, attack=FGSM(.03, **kw)),(0,.03,.2)
    rows,slow = loss_vs_eps(learn, eps, 3, seed=5),[]
    with seeded_clae(learn, 5) as (clae,model,device), torch.no_grad():
        for x,*_ in full_batches(clae.dls.train, device, 3):
            x_q,x_p = clae.views(x)
            for e in eps:
                clae.attack = FGSM(e, **kw)
                clae.attack.stats = clae.views.stats
                loss = CLAELoss(learn.loss_func.base, 1.)
                loss(model(x_q, x_p, clae.adversarial_views(x_q)))
                slow.append((loss.loss_aug.item(), loss.loss_adv.item()))
    assert rows[rows.kind == 'adversarial'].loss.tolist() == [o[1] for o in slow]
    assert rows[rows.kind == 'augmentation'].loss.tolist() == [o[0] for o in slow[::3]]
    zero = rows[rows.eps == 0].pivot(index='batch', columns='kind', values='loss')
    assert (zero.adversarial == zero.random).all() and (zero.augmentation > zero.random).all()
    alone = loss_vs_eps(learn, .2, 3, seed=5).query("kind != 'augmentation'")
    assert alone.loss.tolist() == rows[rows.eps == .2].loss.tolist() # other strengths beside it change nothing

def test_bn_statistics_are_those_of_the_layers_inputs(quiet):
    learn = make(quiet)
    duals = {n.removeprefix('encoder.'): m for n,m in learn.model.named_modules() if isinstance(m, DualBatchNorm)}
    trained,anew = bn_statistics(learn),bn_statistics(learn, True, 3, seed=4)
    for (layer,kind),t in trained.groupby(['layer','kind']):
        bn = getattr(duals[layer], kind)
        assert t['mean'].tolist() == bn.running_mean.tolist() and t['var'].tolist() == bn.running_var.tolist()
    seen,now = {},None
    def _see(layer, m, x):
        if now: seen.setdefault((layer,now), []).append(x[0].transpose(0,1).flatten(1))
    hooks = [m.register_forward_pre_hook(partial(_see, layer)) for layer,m in duals.items()]
    with seeded_clae(learn, 4) as (clae,model,device), torch.no_grad():
        for x,*_ in list(full_batches(clae.dls.train, device, 3)):
            x_q,x_p = clae.views(x)
            now = None
            x_adv = clae.adversarial_views(x_q)
            now = 'clean'
            model(x_q)
            now = 'clean_p'
            model(x_p)
            now = 'adv'
            with adversarial_bn(model): model(x_adv)
    for h in hooks: h.remove()
    assert set(seen) == set(zip(anew.layer, anew.kind)) and set(k for _,k in seen) == {'clean','clean_p','adv'}
    for (layer,kind),t in anew.groupby(['layer','kind']):
        np.testing.assert_allclose(t['mean'], torch.stack([o.mean(1) for o in seen[layer,kind]]).mean(0), atol=1e-4)
        np.testing.assert_allclose(t['var'], torch.stack([o.var(1) for o in seen[layer,kind]]).mean(0), atol=1e-4)

def test_unperturbed_images_are_the_probes_own(quiet):
    "At eps 0 the classifier is the linear probe, on the validation images in another order"
    learn = make(quiet)
    train,valid = (extract_features(learn, dl) for dl in learn.dls.loaders)
    linear = linear_probe(train, valid, l2s=[1.]).linear.float()
    ce = F.cross_entropy(linear(valid[0]), valid[1], reduction='none').detach()
    dls = DataLoaders(learn.dls.train, learn.dls.valid.new(bs=90))
    tables = [classifier_vs_eps(learn, (0,.05), dls=dls, seed=s, l2s=[1.]) for s in (0,1)]
    wide = [t.pivot(index='image', columns=['kind','eps'], values='cross_entropy') for t in tables]
    for w in wide:
        for kind in ('adversarial','random','supervised'):
            np.testing.assert_allclose(sorted(w[kind][0]), ce.sort().values, atol=1e-3)
        assert not np.allclose(w['random'][0], ce, atol=1e-2) # shuffled
        assert w['supervised'][.05].mean() > max(w[k][.05].mean() for k in ('adversarial','random'))
    assert not np.allclose(wide[0]['random'][0], wide[1]['random'][0])
    assert not np.allclose(sorted(wide[0]['random'][.05]), sorted(wide[1]['random'][.05]), atol=1e-5)
    right = linear(valid[0]).argmax(1) == valid[1]
    assert tables[0].query("kind == 'random' and eps == 0").correct.mean() == pytest.approx(float(right.float().mean()))

@pytest.mark.slow
def test_the_adversary_is_harder_than_noise(quiet):
    set_seed(42)
    learn = quiet(clae_learner(get_dls('digits', bs=64), partial(resnet8, width=8), views='digits', every=1))
    learn.fit_one_cycle(4, 3e-3)
    rows = loss_vs_eps(learn, (.01,.03,.1), 40)
    t = intervals(rows)
    assert (t.loc['adversarial'].low > t.loc['random'].high).all() and (paired_intervals(rows).low > 0).all()
    clf = intervals(classifier_vs_eps(learn, (0,.05), l2s=[1.]), 'correct')['mean']
    assert clf['supervised'][.05] < clf['adversarial'][.05] - .1 and clf['random'][0] == clf['supervised'][0] > .8
    stats = bn_statistics(learn, True)
    adv,none = (bn_distance(stats, ('clean',k)).set_index('layer').relative for k in ('adv','clean_p'))
    assert (adv[1:] > 2*none[1:]).all()

# learners and data of every kind

def test_baseline_and_encoder_without_batch_norm(quiet):
    plain = make(quiet, eps=0.)
    assert set(loss_vs_eps(plain, .03, 2).kind) == {'augmentation','adversarial','random'}
    assert len(adversarial_images(plain, 2, eps=.03)) == 2 and len(classifier_vs_eps(plain, .03, 1, l2s=[1.])) == 3*32
    dls = get_dls('digits', bs=32, limit=64)
    arch = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn = quiet(clae_learner(dls, arch, views='digits', every=1))
    learn.fit(1, 1e-3)
    assert len(loss_vs_eps(learn, .03, 2)) == 6
    with pytest.raises(ValueError, match='an encoder with batch norm'): bn_statistics(learn)

@pytest.mark.parametrize('attack', ['pgd', 'ffgsm', lambda embed, x, loss: x + .1])
def test_any_attack(attack, quiet):
    learn = make(quiet, attack=attack)
    all_figures(learn)
    if callable(attack): assert adversarial_images(learn, 3).linf.tolist() == pytest.approx([.1]*3, rel=1e-4)

def test_attacks_and_views_with_random_numbers_of_their_own(quiet):
    class Noise:
        def __init__(self): self.rng = torch.Generator().manual_seed(0)
        def draw(self, x): return x + .1*torch.randn(x.shape, generator=self.rng)
    class Attack_(Noise):
        def __call__(self, embed, x, loss): return self.draw(x)
    class Views(Noise):
        def __call__(self, x): return self.draw(x.as_subclass(torch.Tensor)),self.draw(x.as_subclass(torch.Tensor))
    attack,views = Attack_(),Views()
    learn = make(quiet, attack=attack, views=views)
    before = [o.rng.get_state() for o in (attack,views)]
    all_figures(learn)
    assert all(torch.equal(a, o.rng.get_state()) for a,o in zip(before, (attack,views)))

def test_unlabelled_training_and_a_labelled_classifier(digits_dir, quiet):
    set_seed(1)
    learn = quiet(clae_learner(get_dls('folder', path=digits_dir/'flat', size=16, bs=32, num_workers=0), small))
    learn.fit(1, 1e-3)
    labelled = get_dls('folder', path=digits_dir/'rgb', size=16, bs=24, num_workers=0)
    with pytest.raises(ValueError, match='no labels'): classifier_vs_eps(learn)
    rows = classifier_vs_eps(learn, (0,.05), dls=labelled, l2s=[1.])
    assert rows.image.nunique() == 48 and set(rows.correct) <= {0.,1.}
    assert np.stack(adversarial_images(learn, 2).x_q).shape == (2,16,16,3)

def test_a_learner_of_ones_own(quiet):
    "CLAECallback in a plain Learner, with the Normalize in the DataLoaders"
    set_seed(1)
    dls = get_dls('digits', bs=32, limit=64, batch_tfms=Normalize.from_stats([.5],[.5],cuda=False))
    enc = create_encoder(small, n_in=1)
    clae = CLAECallback(lambda x: (F.dropout(x, .1), F.dropout(x, .1)), FGSM(.02, space='pixel'))
    learn = quiet(Learner(dls, ContrastiveModel(enc, projection_head(16, 'mlp', 8)), CLAELoss(NTXentLoss(), 1.),
                          cbs=clae))
    learn.fit(1, 1e-3)
    all_figures(learn)
    images = adversarial_images(learn, 4) # in pixels, whoever normalised them
    x,x_q,x_adv = (np.stack(images[k]) for k in ('original','x_q','x_adv'))
    assert 0 <= x.min() and x.max() <= 1 + 1e-6
    assert np.abs(x_adv - x_q).max() == pytest.approx(.02, abs=1e-6) # of views, which dropout takes beyond white

def test_a_validation_set_smaller_than_a_batch(quiet):
    learn = make(quiet)
    dls = DataLoaders(learn.dls.train, learn.dls.valid.new(learn.dls.valid_ds.take(torch.randperm(450)[:20])))
    assert classifier_vs_eps(learn, .03, dls=dls, l2s=[1.]).image.nunique() == 20

# errors

def test_errors_name_the_remedy(quiet, digits_dir):
    learn,fresh,plain = make(quiet),make(quiet, fit=False),make(quiet, eps=0.)
    unlabelled = MemoryDL(MemoryImages(learn.dls.train_ds.images), bs=32, after_batch=[IntToFloatTensor()])
    for f,words in ((lambda: bn_statistics(plain), 'train one with an attack'),
                    (lambda: bn_statistics(fresh), 'call learn.fit first'),
                    (lambda: loss_vs_eps(fresh), 'call learn.fit first'),
                    (lambda: classifier_vs_eps(fresh), 'call learn.fit first'),
                    (lambda: adversarial_images(plain), r'as in eps=\.03'),
                    (lambda: classifier_vs_eps(learn, dls=DataLoaders(unlabelled, unlabelled)), 'no labels'),
                    (lambda: classifier_vs_eps(learn, dls=DataLoaders(learn.dls.train)),
                     'give DataLoaders with some as dls'),
                    (lambda: loss_vs_eps(Learner(learn.dls, nn.Flatten(), nn.MSELoss())), 'make it with clae_learner'),
                    (lambda: Learner(learn.dls, nn.Flatten(), nn.MSELoss()).show_views(), 'make it with clae_learner'),
                    (lambda: loss_vs_eps(learn, (.1,-.1)), '0 or more'),
                    (lambda: loss_vs_eps(learn, ()), '0 or more'),
                    (lambda: loss_vs_eps(learn, .03, 0), 'n_batches'),
                    (lambda: intervals(loss_vs_eps(learn, .03, 1)), 'more batches'),
                    (lambda: plot_bn_statistics(bn_statistics(learn), layer='bn9'), 'are bn1')):
        with pytest.raises(ValueError, match=words) as e: f()
        assert '\n' not in str(e.value)
    assert len(adversarial_images(fresh, 2)) == 2 # pictures are for before training as well

# the drawings

def test_drawings_show_what_the_tables_hold(quiet):
    learn = make(quiet)
    rows = loss_vs_eps(learn, (0,.03,.1), 4)
    ax = plot_loss_vs_eps(rows)
    t = intervals(rows)
    assert [list(l.get_ydata()) for l in ax.lines[:2]] == [t.loc[k]['mean'].tolist() for k in ('adversarial','random')]
    assert len(ax.collections) == 2
    band = ax.collections[0].get_paths()[0].vertices[:,1]
    assert (band.min() == pytest.approx(t.loc['adversarial'].low.min()) and
            band.max() == pytest.approx(t.loc['adversarial'].high.max()))
    for mean,drawn in ((t['mean'].max(), True), (99., False)): # what is far above is named, and flattens nothing
        other = rows.assign(loss=rows.loss.where(rows.kind != 'augmentation', mean))
        ax = plot_loss_vs_eps(other)
        assert (len(ax.patches) == 1) == drawn and ax.get_ylim()[1] < 9
        assert 'other augmentation' in ax.get_legend().get_texts()[2].get_text()
    given_ax = plt.subplots()[1]
    assert plot_loss_vs_eps(rows[rows.kind != 'augmentation'], ax=given_ax) is given_ax and len(given_ax.lines) == 2
    clf = classifier_vs_eps(learn, (0,.05), 2, l2s=[1.])
    acc = plot_classifier_vs_eps(clf).axes[1].lines[2]
    assert list(acc.get_ydata()) == pytest.approx((100*intervals(clf, 'correct').loc['supervised']['mean']).tolist())
    stats = bn_statistics(learn)
    fig = plot_bn_statistics(stats, 'layer1.0.bn2', [3,1])
    means = stats.query("layer == 'layer1.0.bn2' and kind == 'clean'").set_index('channel')['mean']
    assert list(fig.axes[0].lines[0].get_ydata()) == means[[3,1]].tolist()
    assert list(fig.axes[2].lines[0].get_xdata()) == bn_distance(stats).relative.tolist()
    both = pd.concat([stats, bn_statistics(learn, True, 2)])
    # bars of what counts as none, behind the points
    right,d = plot_bn_statistics(both).axes[-1],bn_distance(both, ('clean','clean_p'))
    assert [o.get_width() for o in right.patches] == d.relative.tolist()
    times = bn_distance(both).query("estimate == 're-estimated'").relative.to_numpy()/d.relative.to_numpy()
    assert f'{np.median(times):.0f} times' in right.get_title() and len(right.lines[1].get_xdata()) == len(d)

def rows_of(fig, n): return np.array(fig.axes).reshape(n, -1)
def shown(axes): return [np.asarray(ax.images[0].get_array()) for ax in axes]
def captions(fig): return fig.get_supxlabel()

def test_the_picture_of_figure_2(quiet):
    "Each image is in its column, the change has one scale and a centre without colour, and it is said in words"
    images = adversarial_images(make(quiet), 3)
    fig = plot_adversarial_images(images)
    axes = rows_of(fig, 3)
    assert [ax.get_title() for ax in axes[0]] == ['original','view A','view B','adversary','change']
    for ax,column in zip(axes.T, ('original','x_q','x_p','x_adv')):
        assert all(np.array_equal(a, b[...,0]) for a,b in zip(shown(ax), images[column]))
    maps = [ax.images[0] for ax in axes[:,4]]
    assert all(np.allclose(a.get_array(), b.mean(2)) for a,b in zip(maps, images.difference))
    for m in maps:
        low,high = m.get_clim()
        assert (low == -high and high >= max(np.abs(d).max() for d in images.difference) and
                (low,high) == maps[0].get_clim())
        up,none,down = (m.cmap(m.norm(v)) for v in (.015,0,-.015))
        assert up[0] > 2*up[2] and down[2] > 2*down[0] and min(none[:3]) > .95
    assert [ax.get_xlabel() for ax in axes[:,3]] == [f'{c:.3f}' for c in images.cos_adv] and not axes[0,1].get_xlabel()
    assert ('1.5 % of the way' in captions(fig) and 'red brighter, blue darker' in captions(fig) and
            'cosine' in captions(fig))
    assert not any(word in captions(fig) for word in ('x_','eps'))

def test_letters_are_readable_on_a_phone(quiet):
    "390 pixels wide, the smallest letters are 10 pixels high, and no text leaves the picture or meets its neighbour"
    for fig in (plot_adversarial_images(adversarial_images(make(quiet), 2)), make(quiet, eps=0.).show_views(2)):
        fig.draw_without_rendering()
        width,height = fig.canvas.get_width_height()
        texts = [t for t in fig.findobj(plt.Text) if t.get_text() and t.get_visible()]
        boxes = [t.get_window_extent() for t in texts]
        assert min(t.get_fontsize() for t in texts)*fig.dpi/72*390/width >= 10
        assert all(b.x0 >= 0 and b.y0 >= -1 and b.x1 <= width and b.y1 <= height + 1 for b in boxes)
        assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])

@pytest.mark.parametrize('n_in', [1,2,3,5])
def test_the_picture_for_any_channels(n_in, quiet):
    x = torch.rand(8, n_in, 24, 32)
    learn = quiet(clae_learner(DataLoaders(DataLoader([(o,) for o in x], bs=8)), small))
    fig = learn.show_views(2)
    assert (f'Of {n_in} channels' in captions(fig)) == (n_in not in (1,3))
    axes = rows_of(fig, 2)
    assert [a.shape[:2] for a in shown(axes[0])] == [(24,32)]*5 and shown(axes[0])[4].ndim == 2
    channels = range(3) if n_in == 3 else [0]
    assert any(np.allclose(np.atleast_3d(shown(axes[:,0])[0]), o.permute(1,2,0)[...,channels]) for o in x)

def test_without_an_attack_the_picture_has_three_columns(quiet):
    learn = make(quiet, eps=0.)
    assert [ax.get_title() for ax in rows_of(learn.show_views(2), 2)[0]] == ['original','view A','view B']
    seen = shown(rows_of(learn.show_views(2), 2).ravel())
    assert all(np.array_equal(a, b) for a,b in zip(seen, shown(rows_of(learn.show_views(2), 2).ravel())))
    assert not any(np.array_equal(a, b) for a,b in zip(seen, shown(rows_of(learn.show_views(2, seed=1), 2).ravel())))
