"Everything a fastai user does with a `Learner`, on labelled and unlabelled data of one and three channels."
import copy
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from clae_fastai.all import (FGSM, Callback, CategoryBlock, CLAECallback, CLAELoss, ContrastiveModel, DataBlock,
                             DataLoaders, FusedAdam, GradientAccumulation, GradientClip, ImageBlock, IntToFloatTensor,
                             Learner, MemoryDL, MemoryImages, Normalize, NTXentLoss, PILImage, PILImageBW,
                             RandomSplitter, TwoViews, accuracy, clae_learner, convert_dual_bn, create_encoder,
                             dual_bns, extract_features, get_dls, get_image_files, imagenet_stats, load_learner,
                             num_features, parent_label, projection_head, resnet18, resnet8, set_seed,
                             split_normalize, strip_dual_bn, vision_learner)

def make_dls(digits_dir, labelled, n_in):
    blocks = [ImageBlock(PILImage if n_in == 3 else PILImageBW)] + ([CategoryBlock] if labelled else [])
    stats = imagenet_stats if n_in == 3 else ([.5],[.5])
    block = DataBlock(blocks, get_items=get_image_files, get_y=parent_label if labelled else None,
                      splitter=RandomSplitter(.2, seed=1), batch_tfms=[Normalize.from_stats(*stats)])
    return block.dataloaders(digits_dir/('rgb' if n_in == 3 else 'grey'), bs=32, num_workers=0, device='cpu')

@pytest.mark.parametrize('labelled,n_in', [(True,3), (False,1)])
def test_life_of_a_learner(digits_dir, tmp_path, quiet, labelled, n_in):
    "Of labelled colour images and of unlabelled grey ones; the tests below have the other two"
    set_seed(0)
    dls = make_dls(digits_dir, labelled, n_in)
    pipes = [list(dl.after_batch.fs) for dl in dls.loaders]
    learn = quiet(clae_learner(dls, resnet8, views='digits', every=1, path=tmp_path))
    assert learn.model.encoder.conv1.in_channels == n_in
    learn.fit_one_cycle(1, 1e-3)
    assert all(np.isfinite(learn.recorder.final_record))
    assert learn.lr_find(num_it=5, show_plot=False).valley > 0
    assert 'CLAELoss' in (text := learn.summary()) and 'BatchNorm2d' in text and 'CLAECallback' in text
    assert len(learn.validate()) == 3 # valid_loss, loss_aug, loss_adv
    for shown in (dls, learn.dls): shown.show_batch(max_n=2)
    z,y = learn.get_preds()
    assert z.shape == (48,64)
    assert torch.equal(y, torch.tensor([o[1] for o in dls.valid_ds])) if labelled else y in (None, (), [])
    if labelled: assert torch.equal(learn.get_preds(with_loss=True)[2], torch.zeros(48))
    # get_preds gives z of the un-augmented, normalised images
    x = dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(): torch.testing.assert_close(learn.model.eval()(x), z[:32], rtol=0, atol=1e-5)
    torch.testing.assert_close(extract_features(learn, learn.dls.valid, 'z')[0], z, rtol=0, atol=1e-5)
    torch.testing.assert_close(extract_features(learn, dls.valid, 'z')[0], z, rtol=0, atol=1e-5)
    # saved and loaded
    learn.save('half')
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(1, 1e-2)
    learn.load('half')
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items())
    learn.export('learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    again.remove_cb(again.progress) if hasattr(again, 'progress') else None
    torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(list(dls.valid_ds.items)))[0], z, rtol=0, atol=1e-5)
    # the caller's dls is as it was, and goes on
    assert [list(dl.after_batch.fs) for dl in dls.loaders] == pipes
    if labelled:
        vision = quiet(vision_learner(dls, resnet18, pretrained=False, n_in=n_in, metrics=accuracy, path=tmp_path,
                                      normalize=False))
        vision.fit(1)
        assert np.isfinite(vision.recorder.final_record[0])

def test_predict(digits_dir, quiet):
    for labelled in (True,False):
        learn = quiet(clae_learner(make_dls(digits_dir, labelled, 1), resnet8, views='digits', every=1))
        f = learn.dls.valid_ds.items[3]
        torch.testing.assert_close(learn.predict(f)[2], learn.get_preds()[0][3], rtol=0, atol=1e-5)

def test_same_image_different_views(digits_dir, quiet):
    "Two equal images in one batch get different random views"
    learn = quiet(clae_learner(make_dls(digits_dir, False, 3), resnet8))
    x = learn.dls.one_batch()[0]
    x[1] = x[0]
    x_q,x_p = learn.clae.views(x)
    for a,b in ((x_q[0],x_q[1]), (x_p[0],x_p[1]), (x_q[0],x_p[0])): assert not torch.allclose(a, b, atol=1e-2)

@pytest.mark.parametrize('accumulated', [False,True])
def test_attack_leaves_no_trace(digits_dir, quiet, accumulated):
    learn = quiet(clae_learner(make_dls(digits_dir, False, 3), resnet8))
    model = learn.model.train()
    model.encoder.layer1.eval()
    if accumulated:
        for p in model.parameters(): p.grad = torch.randn_like(p)
    def state():
        ps = list(model.parameters())
        return copy.deepcopy([*model.buffers(), *(p.grad for p in ps), *(p.requires_grad for p in ps),
                              *(m.training for m in model.modules()), *(m.use_adv for m in dual_bns(model))])
    def same(a, b):
        return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x is y
                                        for x,y in zip(a, b))
    before,x_q = state(),learn.clae.views(learn.dls.one_batch()[0])[0]
    x_adv = learn.clae.adversarial_views(x_q)
    assert same(before, state()) and not torch.equal(x_adv, x_q)
    def fails(a, b): raise ZeroDivisionError('in the loss')
    learn.loss_func = CLAELoss(fails)
    with pytest.raises(ZeroDivisionError): learn.clae.adversarial_views(x_q)
    assert same(before, state())

@pytest.mark.parametrize('kw', [dict(eps=0.), dict(alpha=0.)])
def test_baseline_is_the_plain_method(digits_dir, quiet, kw):
    "eps=0 and alpha=0: no attack, no dual batch norm, the same weights bit for bit as without CLAE"
    def train(make):
        set_seed(3)
        learn = quiet(make(make_dls(digits_dir, False, 1)))
        learn.fit(1, 1e-3)
        return learn
    def plain(dls):
        for dl in dls.loaders: dl.after_batch.fs = split_normalize(dl.after_batch)[0]
        dls.loaders = [dl.new() for dl in dls.loaders] # as clae_learner's copies, with seeds of their own
        dls.one_batch()
        enc = create_encoder(resnet8, n_in=1, size=16)
        views = TwoViews.from_preset('digits', 16, 1, ([.5],[.5]))
        model = ContrastiveModel(enc, projection_head(num_features(enc, 1, 16), 'linear'))
        return Learner(dls, model, CLAELoss(NTXentLoss()), opt_func=FusedAdam, cbs=CLAECallback(views))
    baseline = train(partial(clae_learner, arch=resnet8, views='digits', temperature=.5, **kw)).model
    a,b = baseline.state_dict(),train(plain).model.state_dict()
    assert not dual_bns(baseline) and list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)

def test_same_views_at_every_eps(digits_dir, quiet):
    "The attack draws from its own generator: the augmentations of a run do not depend on it"
    def views_seen(**kw):
        set_seed(5)
        learn = quiet(clae_learner(get_dls('digits', bs=32, limit=64), resnet8, views='digits', every=1, **kw))
        seen,make = [],learn.clae.views
        learn.clae.views = lambda x: seen.append(make(x)) or seen[-1]
        learn.clae.views.stats = make.stats
        learn.fit(1, 0.)
        return torch.cat([torch.cat(o) for o in seen if len(o[0]) == 32])
    ref = views_seen(eps=0.)
    for kw in (dict(eps=.03), dict(eps=.1), dict(attack='pgd'), dict(attack='random')):
        assert torch.equal(ref, views_seen(**kw)), kw

def test_accumulation_and_clipping(digits_dir, quiet):
    "A step is made of the gradients of two batches, which the attacks between them leave alone, and clipped"
    class Gradients(Callback):
        order = GradientAccumulation.order - 1 # before it cancels the step
        def before_fit(self): self.added,self.last = [],0.
        def after_backward(self):
            now = self.model.encoder.conv1.weight.grad.clone()
            own, = torch.autograd.grad(self.loss_again(), self.model.encoder.conv1.weight)
            self.added.append(torch.allclose(now, self.last + own/2, atol=1e-6))
            self.last = now
        def loss_again(self): return self.loss_func(self.learn.model(*self.xb))
        def after_step(self): self.last = 0.
    class Steps(Callback):
        order = GradientClip.order + 1
        def before_fit(self): self.norms = []
        def before_step(self):
            self.norms.append(float(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()))
    cbs = [GradientAccumulation(64), GradientClip(.1), Gradients(), Steps()]
    learn = quiet(clae_learner(make_dls(digits_dir, True, 1), resnet8, views='digits', every=1, cbs=cbs))
    learn.fit(1, 1e-3)
    assert learn.gradients.added == [True]*6 and len(learn.steps.norms) == 3
    assert learn.steps.norms == pytest.approx([.1]*3, rel=1e-3)

def test_validation_batch_of_one(digits_dir, quiet):
    dls = get_dls('digits', bs=32, limit=64)
    dls.loaders[1] = dls.valid.new(dls.valid_ds.take(slice(0,33)))
    learn = quiet(clae_learner(dls, resnet8, views='digits', every=1))
    assert [len(b[0]) for b in learn.dls.valid] == [32,1]
    learn.fit(1)
    assert np.isfinite(learn.recorder.final_record[0])

def test_no_validation_set(digits_dir, quiet):
    learn = quiet(clae_learner(get_dls('folder', digits_dir/'flat', bs=32, valid_pct=0), resnet8))
    learn.fit(1)
    assert learn.recorder.final_record[1] is None and np.isfinite(learn.recorder.final_record[2])

def test_training_batch_of_one(digits_dir, quiet):
    dls = get_dls('digits', bs=32, limit=65, drop_last=False)
    dls.loaders[0] = dls.train.new(drop_last=False)
    with pytest.raises(ValueError, match='leave one alone'): clae_learner(dls, resnet8)

def test_encoder_without_batch_norm(digits_dir, quiet, capsys):
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))
    learn = quiet(clae_learner(make_dls(digits_dir, False, 1), net, views='digits', every=1))
    assert 'nothing to split' in capsys.readouterr().out
    learn.fit(1)
    assert np.isfinite(learn.recorder.final_record[0])

def test_non_finite_loss_names_epoch_and_batch(digits_dir, quiet):
    learn = quiet(clae_learner(make_dls(digits_dir, False, 1), resnet8, views='digits', every=1))
    base = learn.loss_func.base
    learn.loss_func = CLAELoss(
        lambda a,b: base(a, b)*(float('nan') if (learn.epoch,learn.iter,learn.training) == (1,2,True) else 1))
    with pytest.raises(FloatingPointError, match='epoch 1, batch 2'): learn.fit(2)

def test_attack_instance_keeps_its_settings(digits_dir, quiet):
    attack = FGSM(.2, norm='l2', space='pixel')
    learn = quiet(clae_learner(make_dls(digits_dir, False, 3), resnet8, attack=attack, every=1))
    learn.fit(1)
    assert repr(learn.clae.attack) == repr(attack) and attack.stats is None # others may have it, too
    assert [o.item() for o in learn.clae.attack.stats[0]] == pytest.approx(imagenet_stats[0])

def test_own_modules_are_trained_without_a_trace_of_before(quiet):
    "A module is used as it is; what an attack did to it is undone where there is none"
    net = nn.Sequential(nn.Conv2d(1,8,3,2), nn.BatchNorm2d(8), nn.ReLU())
    dls = get_dls('digits', bs=32, limit=128)
    assert dual_bns(clae_learner(dls, net, views='digits', every=1).model)
    learn = quiet(clae_learner(dls, net, views='digits', every=1, eps=0))
    assert not dual_bns(learn.model)
    learn.fit(1, 1e-3)

def test_mistakes_with_weights_and_sizes():
    dls = get_dls('digits', bs=32, limit=128)
    other = resnet8().state_dict()
    with pytest.raises(FileNotFoundError, match='no file x.pth'): clae_learner(dls, resnet18, weights='x.pth')
    for kw,words in ((dict(weights={}), 'misses'), (dict(weights=other), 'misses .* in another shape')):
        with pytest.raises(ValueError, match=words): clae_learner(dls, resnet18, **kw)
    for kw in (dict(pretrained=True), dict(weights='DEFAULT')):
        with pytest.raises(ValueError, match='resnet8 has no trained weights'): clae_learner(dls, resnet8, **kw)
    with pytest.raises(ValueError, match=r'16, 16\) .* another size or architecture'): clae_learner(dls, 'vit_b_16')
    with pytest.raises(ValueError, match='no view preset .*simclr'): clae_learner(dls, resnet8, views=3)
    with pytest.raises(ValueError, match='attack=None has none'): clae_learner(dls, resnet8, attack=None, eps=.1)

def test_weights_of_a_parallel_model():
    state = {f'module.{k}': v for k,v in resnet8(n_in=1).state_dict().items() if not k.startswith('fc.')}
    learn = clae_learner(get_dls('digits', bs=32, limit=128), resnet8, weights=state)
    own = strip_dual_bn(learn.model.encoder).state_dict()
    assert (own.keys() == {k.removeprefix('module.') for k in state} and
            all(torch.equal(v, state[f'module.{k}']) for k,v in own.items()))

def test_weights_bring_their_normalisation(tmp_path):
    "As in vision_learner; the DataLoaders' own goes before"
    images = MemoryImages(torch.randint(0, 256, (8,3,32,32), dtype=torch.uint8))
    dls = DataLoaders(MemoryDL(images, bs=4, after_batch=[IntToFloatTensor()]))
    def mean(**kw): return [round(float(o), 3) for o in clae_learner(dls, resnet18, **kw).clae.views.stats[0]]
    assert mean() == [.5]*3
    with patch('torchvision.models.resnet.ResNet18_Weights.get_state_dict',
               lambda self, **_: torchvision.models.resnet18().state_dict()):
        assert (mean(pretrained=True, stem='imagenet') == imagenet_stats[0] ==
                mean(weights='IMAGENET1K_V1', stem='imagenet'))
    assert mean(weights=torchvision.models.resnet18().state_dict(), stem='imagenet') == [.5]*3 # nobody knows
    own = clae_learner(dls, 'resnet8', views=TwoViews.from_preset('simclr', 32, stats=([.1]*3,[.2]*3)))
    again = clae_learner(dls, 'resnet8', weights=own.export_encoder(tmp_path/'e.safetensors'))
    assert again.clae.views.stats[0].tolist() == pytest.approx([.1]*3)

def test_gradient_checkpointing_is_refused():
    "The second forward, inside the backward, would go through the wrong batch norm"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1,8,3), nn.BatchNorm2d(8), nn.ReLU())
        def forward(self, x): return checkpoint(self.body, x, use_reentrant=False)
    model = convert_dual_bn(ContrastiveModel(Net(), projection_head(8)))
    x = torch.randn(4,1,8,8)
    loss = CLAELoss(NTXentLoss())(model(x, x+.1, x-.1))
    with pytest.raises(ValueError, match='Gradient checkpointing'): loss.backward()

def test_float16_elsewhere_is_fastais(quiet):
    "Learners without CLAECallback keep fastai's own mixed precision"
    dls = get_dls('digits', bs=32, limit=32)
    learn = quiet(vision_learner(dls, resnet18, pretrained=False, n_in=1, normalize=False)).to_fp16()
    kinds = set()
    learn.model[0][0].register_forward_hook(lambda m,i,o: kinds.add(o.dtype))
    learn.fit(1)
    assert kinds == {torch.float16 if dls.device.type == 'cuda' else torch.float32}

def test_to_bf16_later_is_bf16_on_every_device(quiet):
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=32), resnet8, views='digits', every=1)).to_bf16()
    kinds = set()
    learn.model.encoder.conv1.register_forward_hook(lambda m,i,o: kinds.add(o.dtype))
    learn.fit(1)
    assert kinds == {torch.bfloat16}

@pytest.mark.parametrize('attack', ['fgsm','rfgsm','ffgsm','pgd','random'])
def test_every_attack_in_low_precision_leaves_all_gradients(quiet, attack):
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=32), resnet8, views='digits', every=1,
                               attack=attack, precision='bf16'))
    class Seen(Callback):
        order = 1000
        def after_backward(self): self.missing = [n for n,p in self.model.named_parameters() if p.grad is None]
    learn.fit(1, 1e-3, cbs=(seen := Seen()))
    assert seen.missing == []

def test_another_device_after_loading(tmp_path, quiet):
    "The generator of an attack is saved as its state, which a machine without the device leaves out"
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=64), resnet8, views='digits', every=1,
                               attack='rfgsm', path=tmp_path))
    learn.fit(1, 1e-3)
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    assert torch.equal(again.clae.attack.generator.get_state(), learn.clae.attack.generator.get_state())

class Flags(Callback):
    "What PyTorch may do while it trains; with `fails`, the fit does not end well"
    def __init__(self, fails=None): self.fails,self.seen = fails,set()
    def after_batch(self):
        self.seen.add((torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic,
                       torch.backends.cudnn.benchmark))
        if self.fails: self.fails()

def test_deterministic(tmp_path, quiet, monkeypatch):
    """On a CPU: nothing that adds up in a changing order is allowed in a fit, and all is as before after it,
    also after one that fails"""
    def now():
        return torch.get_deterministic_debug_mode(),torch.backends.cudnn.deterministic,torch.backends.cudnn.benchmark
    def fit(fails=None, **kwargs):
        set_seed(0)
        learn = quiet(clae_learner(get_dls('digits', bs=32, limit=64), resnet8, views='digits', every=1,
                                   cbs=Flags(fails), **kwargs))
        learn.fit_one_cycle(1, 1e-3)
        return learn
    def boom(): raise InterruptedError('stopped')
    def without_order(): torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.]))
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    before = now()
    a,b,c = fit(deterministic=True),fit(deterministic=True),fit()
    assert a.flags.seen == {(2,True,False)} and c.flags.seen == {before} and now() == before
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    with pytest.raises(InterruptedError): fit(boom, deterministic=True)
    with pytest.raises(ValueError, match='leave out deterministic=True.*put_'): fit(without_order, deterministic=True)
    fit(without_order)
    assert now() == before
    a.path = tmp_path
    a.export('learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    assert type(again) is type(a)
