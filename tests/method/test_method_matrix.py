"Every method with every attack; losses of other libraries; precision; steps that are skipped; given weights; channels."
import itertools

import lightly.loss
import numpy as np
import pytest
import pytorch_metric_learning.losses as pml
import torch
import torchvision
from torch import nn

from clae_fastai.all import (
    FGSM, Callback, CLAELoss, DataBlock, DataLoaders, GradientClip, ImageBlock, IndexSplitter, MixedPrecision,
    NTXentLoss, PILImageBW, RandomSplitter, TensorImage, TfmdDL, TransformBlock, TwoViews, attacks, clae_learner,
    deepcopy, dual_bns, extract_features, few_label_knn, get_dls, get_files, has_bf16, methods, noop, partial, resnet8,
    resnet18, set_seed, strip_dual_bn)

tiny = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                     nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
low_types = dict(bf16=torch.bfloat16, fp16=torch.float16)

@pytest.fixture(scope='module')
def dls():
    "Two batches of digits, labelled and not"
    labelled = get_dls('digits', bs=16, limit=32)
    items = [np.array(x[0]) for x,_ in labelled.train_ds]
    block = DataBlock([ImageBlock(PILImageBW)], splitter=IndexSplitter([]))
    return {True: labelled, False: block.dataloaders(items, bs=16, num_workers=0)}

# every method with every attack; norms and labels so that any two values meet once at least
combinations = [(m, a, ('linf','l2')[(i+j)%2], (True,False)[(i+j//2)%2])
                for (i,m),(j,a) in itertools.product(enumerate(methods), enumerate(attacks))]

def test_any_two_values_meet():
    values = methods,attacks,('linf','l2'),(True,False)
    for i,j in itertools.combinations(range(4), 2):
        assert {(o[i],o[j]) for o in combinations} == set(itertools.product(values[i], values[j]))

@pytest.mark.parametrize('method,attack,norm,labelled', combinations)
def test_two_steps_of_everything(dls, quiet, method, attack, norm, labelled):
    set_seed(0)
    attack = attacks[attack](.1, norm=norm)
    learn = quiet(clae_learner(dls[labelled], deepcopy(tiny), method=method, attack=attack, views='digits', every=1))
    before = {k: v.clone() for k,v in learn.model.named_parameters()}
    seen = []
    class Terms(Callback):
        run_valid,order = False,1000
        def after_loss(self): seen.append((float(self.loss_func.loss_aug), float(self.loss_func.loss_adv)))
    learn.fit(1, 1e-2, cbs=Terms())
    means = [learn.loss_terms.mean(k) for k in ('loss_aug','loss_adv')]
    assert len(seen) == 2 and np.isfinite(seen).all() and means == pytest.approx(np.mean(seen, 0), rel=1e-5)
    assert all(v.isfinite().all() for v in learn.model.parameters())
    assert all(not torch.equal(v, before[k]) for k,v in learn.model.named_parameters()
               if 'bn' in k or k.endswith('weight'))

others = dict(ntxent=lightly.loss.NTXentLoss, dcl=lightly.loss.DCLLoss, vicreg=lightly.loss.VICRegLoss,
              barlow=lightly.loss.BarlowTwinsLoss, pml=lambda: pml.SelfSupervisedLoss(pml.NTXentLoss()))

@pytest.mark.parametrize('name,bf16', [('ntxent',False), *((o,True) for o in others)])
def test_losses_of_other_libraries(dls, quiet, name, bf16):
    "Unmodified, on embeddings before L2 normalisation, in float32 whatever the precision"
    set_seed(0)
    base,seen = others[name](),[]
    base.register_forward_pre_hook(lambda m, args: seen.append(args))
    learn = quiet(clae_learner(dls[True], resnet8, method=base, views='digits', every=1))
    if bf16: learn.to_bf16()
    learn.fit(1, 1e-3)
    assert isinstance(learn.loss_func, CLAELoss) and np.isfinite(learn.recorder.final_record).all()
    # the attack's, loss_aug, loss_adv
    assert len(seen) >= 6 and all(a.dtype == b.dtype == torch.float32 for a,b in seen)
    assert not torch.allclose(seen[0][0].norm(dim=1), torch.ones(16), atol=1e-2)

def test_lightly_agrees_with_ours():
    a,b = torch.randn(2, 12, 8)
    torch.testing.assert_close(NTXentLoss(.5)(a, b), lightly.loss.NTXentLoss(.5)(a, b))
    torch.testing.assert_close(NTXentLoss(.5)(a, b), pml.SelfSupervisedLoss(pml.NTXentLoss(.5))(a, b))

def test_a_loss_that_is_no_number(dls, quiet):
    learn = quiet(clae_learner(dls[True], resnet8, method=lambda a, b: (a - b).pow(2).sum(1), views='digits', every=1))
    with pytest.raises(ValueError, match=r'shape \(16,\)'): learn.fit(1)

def test_pixel_space_needs_a_normalize(dls):
    attack = FGSM(.1, space='pixel')
    with pytest.raises(ValueError, match='Normalize'):
        clae_learner(dls[True], resnet8, attack=attack, views=TwoViews(noop))

@pytest.mark.parametrize('precision', low_types)
def test_precision_is_what_it_says(dls, quiet, precision):
    """Low precision in training's forwards and in the attack's, whose loss is scaled, too;
    views, x_adv and weights in float32"""
    learn = quiet(clae_learner(dls[True], resnet8, views='digits', every=1, cbs=GradientClip(1.)))
    getattr(learn, f'to_{precision}')()
    seen,adv,scales = [],[],[]
    learn.model.encoder.layer2.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    attack,(a,b) = learn.clae.attack,torch.randn(2, 4, 8)
    def spy(embed, x, loss):
        scales.append((float(loss(a, b)/learn.loss_func.pair(a, b)), learn.scaler.get_scale()))
        adv.append((x, attack(embed, x, loss)))
        return adv[-1][1]
    learn.clae.attack = spy
    # where a CPU has no units for a type, oneDNN's convolutions in it are slow; PyTorch's own compute the same
    with torch.backends.mkldnn.flags(enabled=precision == 'bf16' and has_bf16('cpu')): learn.fit_one_cycle(1, 1e-3)
    assert set(seen) == {low_types[precision]} and len(adv) == 2
    assert all(x.dtype == y.dtype == torch.float32 and ((y - x).abs() <= .03 + 1e-5).all() for x,y in adv)
    assert all(got == pytest.approx(want) for got,want in scales) and (scales[0][1] > 1) == (precision == 'fp16')
    assert (all(p.dtype == torch.float32 for p in learn.model.parameters()) and
            np.isfinite(learn.recorder.final_record[0]))
    assert not torch.is_autocast_enabled('cpu')

def test_channels_last(dls, quiet):
    learn = quiet(clae_learner(dls[True], resnet8, views='digits', every=1).to_channelslast(use_amp=False))
    learn.fit(1)
    assert learn.model.encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert np.isfinite(learn.recorder.final_record[0])

@pytest.mark.parametrize('precision', ['fp32','bf16','auto'])
def test_precision_by_name(dls, quiet, precision):
    learn = quiet(clae_learner(dls[True], resnet8, views='digits', every=1, precision=precision, channels_last=True))
    assert learn.precision == (precision if precision != 'auto' else 'bf16' if has_bf16('cpu') else 'fp32')
    seen,conv = set(),learn.model.encoder.layer1[0].conv1
    conv.register_forward_hook(lambda m, i, o: seen.add((o.dtype, o.is_contiguous(memory_format=torch.channels_last))))
    learn.fit(1)
    assert seen == {(low_types.get(learn.precision, torch.float32), True)}

def test_float16_by_name(dls):
    "The same callbacks as those of `to_fp16`, which is tried above"
    by_name = clae_learner(dls[True], resnet8, views='digits', every=1, precision='fp16')
    by_method = clae_learner(dls[True], resnet8, views='digits', every=1).to_fp16()
    def kinds(learn): return sorted(type(cb).__name__ for cb in learn.cbs)
    assert kinds(by_name) == kinds(by_method) and isinstance(by_name.mixed_precision, MixedPrecision)
    assert by_name.mixed_precision.amp_mode == by_method.mixed_precision.amp_mode

def test_a_skipped_step_leaves_nothing(dls, quiet):
    """A batch whose loss is no number, the second of two: weights, batch norm's statistics and the means
    are those after the first"""
    learn = quiet(clae_learner(dls[True], resnet8, views='digits', every=1, on_nonfinite='skip'))
    base,kept = learn.loss_func.base,[]
    def loss(a, b): return base(a, b)*(float('nan') if learn.training and learn.iter == 1 else 1)
    learn.loss_func = CLAELoss(loss)
    class Keep(Callback):
        run_valid,order = False,1000
        def after_batch(self): kept.append([deepcopy(self.model.state_dict()), float(self.loss_func.loss_aug)])
    learn.fit(1, 1e-2, cbs=Keep())
    (first,loss_aug),(after,_) = kept
    assert learn.check_finite.n_skipped == 1 and all(torch.equal(v, after[k]) for k,v in first.items())
    assert learn.loss_terms.mean('loss_aug') == pytest.approx(loss_aug)

@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_attack_through_the_clean_batch_norm(dls, quiet, precision):
    """The attack's own forward uses the chosen batch norm, the adversarial view's the adversarial one;
    the attack leaves both alone"""
    for bn,want in (('adv', 2), ('clean', 1)):
        learn = quiet(clae_learner(dls[True], resnet8, views='digits', every=1, attack_bn=bn, precision=precision))
        calls = {'clean': 0, 'adv': 0}
        d = dual_bns(learn.model)[0]
        for k in calls:
            getattr(d, k).register_forward_hook(lambda m, i, o, k=k: calls.update({k: calls[k] + m.training}))
        learn.fit(1)
        # two batches of four forwards: of two views, of the attack, of x_adv
        assert calls == {'adv': 2*want, 'clean': 2*(4 - want)}
        assert int(d.clean.num_batches_tracked) == 4 and int(d.adv.num_batches_tracked) == 2

@pytest.mark.slow
def test_low_precision_is_as_good():
    """5-label kNN on digits, mean of 3 seeds: bfloat16 and float16 within 2 points of float32,
    with one-cycle and gradient clipping"""
    def accuracy(precision, seed):
        set_seed(seed)
        dls = get_dls('digits', bs=64)
        learn = clae_learner(dls, partial(resnet8, width=8), views='digits', every=1, cbs=GradientClip(1.))
        if precision: getattr(learn, precision)()
        fast = precision is None or precision == 'to_bf16' and has_bf16('cpu') # see above
        with learn.no_bar(), learn.no_logging(), torch.backends.mkldnn.flags(enabled=fast): learn.fit_one_cycle(5, 3e-3)
        return few_label_knn(*extract_features(learn, dls.train), *extract_features(learn, dls.valid),
                             ns=(5,))['5']['mean']
    full,*low = (np.mean([accuracy(p, s) for s in range(3)]) for p in (None,'to_bf16','to_fp16'))
    assert full > .65 and min(low) > full - .02, (full,low)

def test_given_weights(quiet):
    """Before the first step the clean path gives the stock model's features, bit for bit;
    both batch norms start from the given values"""
    set_seed(0)
    stock = torchvision.models.resnet18()
    for b in (m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)):
        for v in (b.running_mean, b.weight.data, b.bias.data): v.normal_()
        b.running_var.uniform_(.5, 2)
    state = {k: v.clone() for k,v in stock.state_dict().items()}
    x = torch.randn(8, 3, 32, 32)
    items = list(torch.rand(32, 3, 32, 32))
    dl = TfmdDL([(TensorImage(o),) for o in items], bs=16, shuffle=True, num_workers=0)
    learn = quiet(clae_learner(DataLoaders(dl, device='cpu'), resnet18, weights=state))
    stock.fc = nn.Identity()
    with torch.no_grad(): assert torch.equal(learn.model.eval().features(x), stock.eval()(x))
    for d in dual_bns(learn.model):
        for k,v in d.clean.state_dict().items(): assert torch.equal(v, d.adv.state_dict()[k])
    learn.fit(1)
    assert list(strip_dual_bn(learn.model.encoder).state_dict()) == [k for k in state if not k.startswith('fc.')]

@pytest.mark.parametrize('n_in,given', [(1,True), (2,False), (5,True)])
def test_channels_other_than_three(tmp_path, quiet, n_in, given):
    "A folder of arrays, read by the user's own block; from the start, and from weights of three channels"
    for i in range(40): np.save(tmp_path/f'{i}.npy', np.random.default_rng(i).random((n_in, 16, 16), dtype=np.float32))
    block = DataBlock(TransformBlock(type_tfms=lambda f: TensorImage(torch.from_numpy(np.load(f)))),
                      get_items=lambda p: get_files(p, extensions='.npy'), splitter=RandomSplitter(.2, seed=0))
    own = dict(arch=resnet18, weights=torchvision.models.resnet18().state_dict()) if given else dict(arch=resnet8)
    learn = quiet(clae_learner(block.dataloaders(tmp_path, bs=16, num_workers=0), **own))
    learn.fit(1)
    assert learn.model.encoder.conv1.in_channels == n_in and np.isfinite(learn.recorder.final_record[0])
