"Every method with every attack and norm, on labelled and unlabelled data; losses of other libraries; precision; given weights."
import itertools

import lightly.loss
import numpy as np
import pytest
import pytorch_metric_learning.losses as pml
import torch
import torchvision
from torch import nn

from clae_fastai.all import (FGSM, CLAELoss, DataBlock, DataLoaders, GradientClip, ImageBlock, IndexSplitter, NTXentLoss, PILImageBW, RandomSplitter, TensorImage, TfmdDL, TransformBlock,
                             TwoViews, attacks, clae_learner, deepcopy, dual_bns, extract_features, few_label_knn, get_dls, get_files, has_bf16, methods, noop, partial, resnet8, resnet18, set_seed, strip_dual_bn)

tiny = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())

@pytest.fixture(scope='module')
def dls():
    "Two batches of digits, labelled and not"
    labelled = get_dls('digits', bs=16, limit=32)
    items = [np.array(x[0]) for x,_ in labelled.train_ds]
    unlabelled = DataBlock([ImageBlock(PILImageBW)], splitter=IndexSplitter([])).dataloaders(items, bs=16, num_workers=0)
    return {True: labelled, False: unlabelled}

@pytest.mark.parametrize('method,attack,norm,labelled', itertools.product(methods, attacks, ('linf','l2'), (True,False)))
def test_two_steps_of_everything(dls, quiet, method, attack, norm, labelled):
    set_seed(0)
    learn = quiet(clae_learner(dls[labelled], deepcopy(tiny), method=method, attack=attacks[attack](.1, norm=norm), views='digits'))
    before = {k: v.clone() for k,v in learn.model.named_parameters()}
    learn.fit(1, 1e-2)
    assert learn.clae.n_batches == 2 and np.isfinite(learn.clae.mean_loss(0)) and np.isfinite(learn.clae.mean_loss(1))
    assert all(v.isfinite().all() for v in learn.model.parameters())
    assert all(not torch.equal(v, before[k]) for k,v in learn.model.named_parameters() if 'bn' in k or k.endswith('weight'))

others = dict(ntxent=lightly.loss.NTXentLoss, dcl=lightly.loss.DCLLoss, vicreg=lightly.loss.VICRegLoss, barlow=lightly.loss.BarlowTwinsLoss, pml=lambda: pml.SelfSupervisedLoss(pml.NTXentLoss()))

@pytest.mark.parametrize('name', others)
@pytest.mark.parametrize('bf16', [False,True])
def test_losses_of_other_libraries(dls, quiet, name, bf16):
    "Unmodified, on embeddings before L2 normalisation"
    set_seed(0)
    base,seen = others[name](),[]
    def loss(a, b):
        seen.append((a, b))
        return base(a, b)
    learn = quiet(clae_learner(dls[True], resnet8, method=loss, views='digits'))
    if bf16: learn.to_bf16()
    learn.fit(2, 1e-3)
    assert np.isfinite(learn.recorder.final_record[0]) and np.isfinite(learn.clae.mean_loss(1))
    assert all(a.dtype == b.dtype == torch.float32 for a,b in seen)
    assert not torch.allclose(seen[0][0].norm(dim=1), torch.ones(16), atol=1e-2)
    direct = quiet(clae_learner(dls[True], resnet8, method=others[name](), views='digits'))
    direct.fit(1, 1e-3)
    assert isinstance(direct.loss_func, CLAELoss) and np.isfinite(direct.recorder.final_record[0])

def test_lightly_agrees_with_ours():
    a,b = torch.randn(2, 12, 8)
    torch.testing.assert_close(NTXentLoss(.5)(a, b), lightly.loss.NTXentLoss(.5)(a, b))
    torch.testing.assert_close(NTXentLoss(.5)(a, b), pml.SelfSupervisedLoss(pml.NTXentLoss(.5))(a, b))

def test_a_loss_that_is_no_number(dls, quiet):
    learn = quiet(clae_learner(dls[True], resnet8, method=lambda a,b: (a - b).pow(2).sum(1), views='digits'))
    with pytest.raises(ValueError, match=r'shape \(16,\)'): learn.fit(1)

def test_pixel_space_needs_a_normalize(dls):
    with pytest.raises(ValueError, match='Normalize'): clae_learner(dls[True], resnet8, attack=FGSM(.1, space='pixel'), views=TwoViews(noop))

@pytest.mark.parametrize('precision,dtype', [('to_bf16', torch.bfloat16), ('to_fp16', torch.float16)])
def test_precision_is_what_it_says(dls, quiet, precision, dtype):
    "Activations in low precision, in training's forwards and in the attack's; views, x_adv and weights in float32"
    learn = quiet(clae_learner(dls[True], resnet8, views='digits', cbs=GradientClip(1.)))
    getattr(learn, precision)()
    seen,adv = [],[]
    learn.model.encoder.layer2.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    attack = learn.clae.attack
    def spy(embed, x, loss):
        adv.append((x, attack(embed, x, loss)))
        return adv[-1][1]
    learn.clae.attack = spy
    learn.fit_one_cycle(2, 1e-3)
    assert set(seen) == {dtype} and all(x.dtype == y.dtype == torch.float32 for x,y in adv)
    assert all(torch.equal((y - x).abs() <= .03 + 1e-5, torch.ones_like(x, dtype=torch.bool)) for x,y in adv)
    assert all(p.dtype == torch.float32 for p in learn.model.parameters()) and np.isfinite(learn.recorder.final_record[0])
    assert not torch.is_autocast_enabled('cpu')

def test_channels_last(dls, quiet):
    learn = quiet(clae_learner(dls[True], resnet18, views='digits').to_channelslast(use_amp=False))
    learn.fit(1)
    assert learn.model.encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) and np.isfinite(learn.recorder.final_record[0])

@pytest.mark.parametrize('precision', ['fp32','bf16','fp16','auto'])
def test_precision_by_name(dls, quiet, precision):
    learn = quiet(clae_learner(dls[True], resnet8, views='digits', precision=precision, channels_last=True))
    assert learn.precision == (precision if precision != 'auto' else 'bf16' if has_bf16('cpu') else 'fp32')
    seen = []
    learn.model.encoder.layer1[0].conv1.register_forward_hook(lambda m, i, o: seen.append((o.dtype, o.is_contiguous(memory_format=torch.channels_last))))
    learn.fit(1)
    assert set(seen) == {(dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[learn.precision], True)}

@pytest.mark.parametrize('precision', ['fp32','bf16'])
def test_attack_through_the_clean_batch_norm(dls, quiet, precision):
    "The attack's own forward uses the chosen batch norm, the adversarial view's always the adversarial one, and the attack leaves both statistics alone"
    for bn,want in (('adv', 2), ('clean', 1)):
        learn = quiet(clae_learner(dls[True], resnet8, views='digits', attack_bn=bn, precision=precision))
        calls = {'clean': 0, 'adv': 0}
        d = dual_bns(learn.model)[0]
        for k in calls: getattr(d, k).register_forward_hook(lambda m, i, o, k=k: calls.update({k: calls[k] + m.training}))
        learn.fit(1)
        assert calls == {'adv': 2*want, 'clean': 2*(4 - want)} # two batches of four forwards: of two views, of the attack, of x_adv
        assert int(d.clean.num_batches_tracked) == 4 and int(d.adv.num_batches_tracked) == 2

@pytest.mark.slow
def test_low_precision_is_as_good():
    "5-label kNN on digits, mean of 3 seeds: bfloat16 and float16 within 2 points of float32, with one-cycle and gradient clipping"
    dls = get_dls('digits', bs=64)
    def accuracy(precision, seed):
        set_seed(seed)
        learn = clae_learner(get_dls('digits', bs=64), partial(resnet8, width=8), views='digits', cbs=GradientClip(1.))
        if precision: getattr(learn, precision)()
        # where a CPU has no units for a type, oneDNN's convolutions in it are a slow reference implementation; PyTorch's own compute the same
        with learn.no_bar(), learn.no_logging(), torch.backends.mkldnn.flags(enabled=precision is None or precision == 'to_bf16' and has_bf16('cpu')): learn.fit_one_cycle(5, 3e-3)
        return few_label_knn(*extract_features(learn, dls.train), *extract_features(learn, dls.valid), ns=(5,))['5']['mean']
    mean = {p: np.mean([accuracy(p, s) for s in range(3)]) for p in (None,'to_bf16','to_fp16')}
    print(mean)
    assert mean[None] > .65 and mean['to_bf16'] > mean[None] - .02 and mean['to_fp16'] > mean[None] - .02, mean

def test_given_weights(quiet):
    "Before the first step the clean path gives the stock model's features, bit for bit; both batch norm sets start from the given values"
    set_seed(0)
    stock = torchvision.models.resnet18()
    for b in stock.modules():
        if isinstance(b, nn.BatchNorm2d): b.running_mean.normal_(); b.running_var.uniform_(.5, 2); nn.init.normal_(b.weight); nn.init.normal_(b.bias)
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

@pytest.mark.parametrize('n_in', [1,2,5])
def test_channels_other_than_three(tmp_path, quiet, n_in):
    "A folder of arrays, read by the user's own block"
    for i in range(40): np.save(tmp_path/f'{i}.npy', np.random.default_rng(i).random((n_in, 16, 16), dtype=np.float32))
    block = DataBlock(TransformBlock(type_tfms=lambda f: TensorImage(torch.from_numpy(np.load(f)))), get_items=lambda p: get_files(p, extensions='.npy'), splitter=RandomSplitter(.2, seed=0))
    state = torchvision.models.resnet18().state_dict()
    for kw in (dict(arch=resnet8), dict(arch=resnet18, weights=state)):
        learn = quiet(clae_learner(block.dataloaders(tmp_path, bs=16, num_workers=0), **kw))
        learn.fit(1)
        assert learn.model.encoder.conv1.in_channels == n_in and np.isfinite(learn.recorder.final_record[0])
