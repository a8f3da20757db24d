"What used to go wrong without a word, in the hands of people who know fastai and PyTorch."
import pickle
from functools import partial

import kornia.augmentation as K
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.vision.all import (
    Callback, DataLoader, DataLoaders, GradientAccumulation, ImageDataLoaders, Normalize, PILImage,
    SaveModelCallback, TensorCategory, TensorImage, TfmdDL, get_image_files, imagenet_stats, no_random, set_seed)
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from clae_fastai.all import (
    FGSM, PGD, CLAELoss, CollapseMonitor, KNNCallback, NTXentLoss, TwoViews, clae_learner, dual_bns,
    encoder_learner, evaluate, export_onnx, extract_features, get_dls, has_labels, linear_probe, load_encoder,
    read_encoder, resnet8, strip_dual_bn)
from clae_fastai.cli import command

class Images:
    "A data set of noise, with labels"
    n_inp,c = 1,3
    def __init__(self, n=48, label=int):
        g = torch.Generator().manual_seed(0)
        self.x,self.y,self.label = torch.rand(n, 3, 16, 16, generator=g),torch.arange(n) % 3,label
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(self.x[i]),self.label(self.y[i])

def make_dls(n=48, bs=16, train=TfmdDL, **kwargs):
    return DataLoaders(train(Images(n), bs=bs, shuffle=True, drop_last=True, **kwargs), TfmdDL(Images(), bs=bs))

def largest_change(learn):
    "In pixels"
    with no_random(0, reproducible=False):
        x = learn.clae.views(Images().x[:16])[0]
        return float(((learn.clae.adversarial_views(x) - x)*learn.clae.stats[1].view(-1,1,1)).abs().max())

def test_a_loader_that_normalises_is_not_normalised_again(tmp_path, quiet):
    "`dls.test_dl(files)` of the DataLoaders that were given, which stay as they were"
    for i,x in enumerate(Images(24).x):
        (tmp_path/str(i % 2)).mkdir(exist_ok=True)
        PILImage.create((255*x.permute(1,2,0)).byte().numpy()).save(tmp_path/str(i % 2)/f'{i:02}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.25, seed=0, bs=6, num_workers=0,
        batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn,files = quiet(clae_learner(dls, resnet8)),get_image_files(tmp_path)
    theirs,ours = (learn.get_preds(dl=o.test_dl(files))[0] for o in (dls, learn.dls))
    torch.testing.assert_close(theirs, ours)
    assert learn.validate(dl=dls.valid)[0] < 10

@pytest.mark.parametrize('size', [None, 8])
def test_a_loader_that_normalises_otherwise(quiet, size):
    "With other numbers than the learner does, or without its size: features, embeddings and pictures are the learner's"
    normalize = Normalize.from_stats([.2]*3, [.05]*3, cuda=False)
    learn,bare = quiet(clae_learner(make_dls(), resnet8, size=size)),TfmdDL(Images(), bs=16)
    normalised = TfmdDL(Images(), bs=16, after_batch=[normalize])
    for of in (lambda dl: extract_features(learn, dl)[0], lambda dl: learn.get_preds(dl=dl)[0]):
        torch.testing.assert_close(of(normalised), of(bare), rtol=1e-3, atol=1e-4)
    low,high = (f([im.min() if f is min else im.max() for ax in learn.show_views(2, dl=normalised).axes
                   for im in (o.get_array() for o in ax.images)]) for f in (min, max))
    assert -.05 < low < high < 1.05 # adversaries reach beyond black and white

class Halved(TorchLoader):
    "Users' loaders do more than to load"
    def __iter__(self):
        for x,y in super().__iter__(): yield x/2,y

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return zip(Images().x, torch.arange(48))

def test_loaders_with_an_iter_of_their_own():
    learn,data = clae_learner(make_dls(), resnet8),TensorDataset(Images().x, torch.arange(48))
    h = extract_features(learn, TorchLoader(data, batch_size=16))[0]
    halved = extract_features(learn, TorchLoader(TensorDataset(Images().x/2, torch.arange(48)), batch_size=16))[0]
    assert torch.equal(extract_features(learn, Halved(data, batch_size=16))[0], halved)
    torch.testing.assert_close(extract_features(learn, TorchLoader(Stream(), batch_size=16))[0], h)

@pytest.mark.parametrize('make,n_batches', [
    (partial(WeightedDL, wgts=[1.]*5 + [0.]*43), 3), (partial(PartialDL, partial_n=16), 1)])
def test_loaders_that_choose_images_go_on_choosing(make, n_batches):
    dls = make_dls(train=make)
    learn = clae_learner(dls, resnet8)
    for dl in (learn.dls.train, encoder_learner(dls, learn).dls.train):
        assert len(dl) == n_batches
        if hasattr(dl, 'wgts'): assert max(dl.get_idxs()) < 5

@pytest.mark.parametrize('n', [48, 10])
def test_features_of_all_images_in_order(n):
    "Of a loader of PyTorch's that shuffles, and drops the last batch"
    learn,data = clae_learner(make_dls(), resnet8),TensorDataset(Images(n).x, torch.arange(n))
    labels = extract_features(learn, TorchLoader(data, batch_size=32, shuffle=True, drop_last=True))[1]
    assert labels.tolist() == list(range(n))

def test_all_batch_norms_are_dual_with_the_given_momentum():
    "Of a new head, too, where the encoder has been trained before"
    before = clae_learner(make_dls(), resnet8)
    head = nn.Sequential(nn.Linear(64,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,16))
    learn = clae_learner(make_dls(), before.model.encoder, head=head, adv_momentum=.5)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in learn.model.head.children())
    assert {o.adv.momentum for o in dual_bns(learn.model)} == {.5}

def test_one_attack_for_two_learners():
    attack = FGSM(.03, space='pixel')
    learn = clae_learner(make_dls(), resnet8, attack=attack, views='plain')
    clae_learner(make_dls(), resnet8, attack=attack, views='simclr')
    assert largest_change(learn) == pytest.approx(.03, rel=1e-4)
    with pytest.raises(ValueError, match='needs to know how the images were normalised'):
        clae_learner(make_dls(), resnet8, attack=attack, views=TwoViews(K.RandomHorizontalFlip()))

def test_eps_is_a_bound_beyond_black_and_white():
    noisy = TwoViews(nn.Sequential(K.RandomHorizontalFlip(), K.RandomGaussianNoise(0., .1, p=1.)), ([.5]*3,[.5]*3))
    learn = clae_learner(make_dls(), resnet8, attack=FGSM(.01, space='pixel'), views=noisy)
    assert .0099 < largest_change(learn) < .0101

def test_an_attack_may_call_backward(quiet):
    "And the training's gradients are those of the losses alone"
    def by_backward(embed, x, loss):
        x = x.detach().requires_grad_()
        z = embed(x)
        loss(z.detach(), z).backward()
        return (x + .03*x.grad.sign()).detach()
    def trained(attack):
        set_seed(0)
        learn = quiet(clae_learner(make_dls(), resnet8, attack=attack, every=1))
        set_seed(0)
        learn.fit(1)
        return learn.model.state_dict()
    a,b = trained(by_backward),trained(FGSM(.03))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_fit_too_short_for_an_adversary(capsys, quiet):
    learn = quiet(clae_learner(make_dls(), resnet8))
    learn.fit(1)
    assert 'This fit has 3 steps, and the adversary comes in each 4th' in capsys.readouterr().out
    learn.fit(2)
    assert 'This fit' not in capsys.readouterr().out
    with pytest.raises(ValueError, match="watches 'loss_adv', and some epochs have none"):
        learn.fit(2, cbs=SaveModelCallback(monitor='loss_adv'))

def test_weights_that_a_learner_has_saved(tmp_path):
    "With second batch norms, which the encoder that begins with them has not"
    learn = clae_learner(make_dls(), resnet8, path=tmp_path)
    file = learn.save('first', with_opt=False)
    again = clae_learner(make_dls(), resnet8, eps=0, weights=file)
    clean = strip_dual_bn(learn.model.encoder).state_dict()
    assert all(torch.equal(v, clean[k]) for k,v in again.model.encoder.state_dict().items())

@pytest.mark.parametrize('options,said', [
    (dict(method=NTXentLoss), 'method is the class NTXentLoss'),
    (dict(method=CLAELoss(NTXentLoss())), 'makes the CLAELoss itself'),
    (dict(attack=PGD), 'attack is the class PGD'),
    (dict(views=TwoViews), 'views is the class TwoViews'),
    (dict(views=lambda x: x.no_such_thing), 'fails on a batch'),
    (dict(views=v2.Compose([v2.ToImage(), v2.RandomCrop(16), v2.ToDtype(torch.float32), v2.Normalize([.5]*3,[.25]*3)])),
     'needs scale=True')])
def test_arguments_that_cannot_work_are_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said): clae_learner(make_dls(), resnet8, **options)

def test_views_by_name_are_no_augmentation():
    with pytest.raises(ValueError, match='from_preset'): TwoViews('simclr')

@pytest.mark.parametrize('label', [
    lambda y: TensorCategory(2*y - 1), lambda y: TensorCategory(y > 0), lambda y: TensorCategory(y*10**11)])
def test_labels_of_any_integers(label):
    dls = DataLoaders(TfmdDL(Images(label=label), bs=16), TfmdDL(Images(label=label), bs=16))
    res = evaluate(clae_learner(dls, resnet8), dls)
    assert 0 <= res.probe.final <= 1 and res.n_train == 48

def test_labels_that_are_names():
    dls = DataLoaders(*(TorchLoader(list(zip(Images().x, 'abc'*16)), batch_size=16) for _ in range(2)))
    with pytest.raises(ValueError, match='Labels must be numbers'):
        extract_features(clae_learner(make_dls(), resnet8), dls.train)

@pytest.mark.parametrize('unit', [1e-12, 1e-4, 1e4])
def test_the_probe_does_not_depend_on_the_features_unit(unit):
    x,y = (torch.tensor(o) for o in load_digits(return_X_y=True))
    def accuracy(unit): return linear_probe((unit*x[:300]/16, y[:300]), (unit*x[300:]/16, y[300:]), device='cpu').final
    assert accuracy(unit) == pytest.approx(accuracy(1.), abs=.002)

def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'digits').mkdir()
    assert len(get_dls('digits', limit=64).train_ds) == 64
    assert "not the folder ./digits, which is get_dls('./digits')" in capsys.readouterr().out

@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_too_little_memory_is_said_in_a_sentence(error, capsys):
    @command
    def clae_something(): raise error
    with pytest.raises(SystemExit) as e: clae_something()
    assert e.value.code == 2 and 'take a smaller --bs' in capsys.readouterr().err

def test_other_errors_of_pytorch_are_not_hidden():
    @command
    def clae_something(): raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
    with pytest.raises(RuntimeError, match='mat1'): clae_something()

@pytest.mark.parametrize('at', ['before_batch','after_pred'])
def test_autocast_ends_with_a_batch_that_is_interrupted(at, quiet):
    class Interrupts(Callback):
        order = 100
        def stop(self):
            if self.training and self.train_iter == 1: raise KeyboardInterrupt
    setattr(Interrupts, at, Interrupts.stop)
    def trained():
        set_seed(0)
        learn = quiet(clae_learner(make_dls(), resnet8, precision='bf16', every=1))
        learn.fit(2, 1e-2)
        return learn
    a = trained()
    with pytest.raises(KeyboardInterrupt):
        quiet(clae_learner(make_dls(), resnet8, precision='bf16', every=1)).fit(1, cbs=Interrupts())
    assert not torch.is_autocast_enabled('cpu')
    b = trained()
    for x,y in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(x, y)
    assert torch.equal(extract_features(a, a.dls.valid)[0], extract_features(b, b.dls.valid)[0])

def test_an_attack_that_is_switched_on_in_a_fit(quiet):
    "It has no batch norm of its own"
    class Warm(Callback):
        def before_epoch(self): self.learn.clae.attack.eps = .03*self.epoch
    with pytest.raises(ValueError, match='batch norm'):
        quiet(clae_learner(make_dls(), resnet8, eps=0, every=1)).fit(3, cbs=Warm())

def test_an_encoder_that_was_loaded_normalises_as_its_file(tmp_path):
    dls = make_dls()
    learn = clae_learner(dls, resnet8)
    file = learn.export_encoder(tmp_path/'e.safetensors')
    assert torch.equal(extract_features(load_encoder(file), dls.valid)[0], extract_features(file, dls.valid)[0])
    a,b = (evaluate(o, dls) for o in (file, load_encoder(file)))
    assert a.to_dict() == b.to_dict()

def test_classes_of_other_numbers(tmp_path, quiet):
    for part,classes in (('bank','abc'),('queries','bc'),('prefix','ab')):
        for k in classes:
            (tmp_path/part/k).mkdir(parents=True)
            for i in range(4):
                colour = dict(a=(255,i,0), b=(i,255,0), c=(i,0,255))[k]
                Image.new('RGB', (16,16), colour).save(tmp_path/part/k/f'{i}.png')
    bank,queries,prefix = (get_dls(tmp_path/o, bs=2, valid_pct=0., num_workers=0) for o in ('bank','queries','prefix'))
    with pytest.raises(ValueError, match='a, b, c in one .* b, c in another'):
        evaluate(nn.Flatten(), DataLoaders(bank.train, queries.train), k=1)
    assert evaluate(nn.Flatten(), DataLoaders(bank.train, prefix.train), k=1).knn == 1
    learn = quiet(clae_learner(bank, resnet8))
    with pytest.raises(ValueError, match='b, c in another'):
        learn.fit(1, cbs=KNNCallback(train_dl=bank.train, valid_dl=queries.train))

def test_tested_on_what_it_was_trained_on(tmp_path, capsys):
    for k in 'ab':
        (tmp_path/k).mkdir()
        for i in range(20): Image.new('RGB', (16,16), (100*'ab'.index(k), i, i)).save(tmp_path/k/f'{i}.png')
    learn = clae_learner(get_dls(tmp_path, unlabelled=True, bs=8, num_workers=0), resnet8)
    evaluate(learn, tmp_path, k=1, num_workers=0)
    assert 'trained on 6 of these test images' in capsys.readouterr().out
    own = get_dls(tmp_path, bs=8, num_workers=0)
    evaluate(clae_learner(own, resnet8), own, k=1)
    assert 'trained on' not in capsys.readouterr().out

def test_a_folder_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for k in 'ab':
        (tmp_path/'pictures'/k).mkdir(parents=True)
        for i in range(10): Image.new('RGB', (16,16), (100*'ab'.index(k), i, i)).save(tmp_path/'pictures'/k/f'{i}.png')
    assert evaluate(nn.Flatten(), '~/pictures', k=1, num_workers=0).n_test == 4

def test_predictions_of_batches(tmp_path, quiet):
    "Of a list of them, as `show_results` asks: normalised once"
    dls = make_dls()
    tuned = quiet(encoder_learner(dls, clae_learner(dls, resnet8), n_out=3))
    b = tuned.dls.valid.one_batch()
    torch.testing.assert_close(tuned.get_preds(dl=[b])[0], tuned.get_preds()[0][:len(b[0])])

def test_pixels_of_a_classifier(tmp_path, quiet):
    "What is normalised already is refused, and 8 bits are pixels, as in the training without labels"
    file = clae_learner(make_dls(), resnet8).export_encoder(tmp_path/'e.safetensors')
    x,y = Images().x,Images().y
    loader = TorchLoader(TensorDataset((x-.5)/.5, y), batch_size=16)
    with pytest.raises(ValueError, match=r'pixels in \[0,1\]'):
        encoder_learner(DataLoaders(loader, loader), file, n_out=3)
    class Bytes(Images):
        def __getitem__(self, i): return TensorImage((255*self.x[i]).round().byte()),int(self.y[i])
    class Floats(Images):
        def __getitem__(self, i): return TensorImage((255*self.x[i]).round()/255),int(self.y[i])
    preds = []
    for data in (Bytes(),Floats()):
        set_seed(0)
        dls = DataLoaders(TfmdDL(data, bs=16), TfmdDL(data, bs=16))
        preds.append(quiet(encoder_learner(dls, file, n_out=3)).get_preds()[0])
    torch.testing.assert_close(*preds)

def test_fastais_plain_loader(quiet):
    "All images in their order, whatever it shuffles and leaves out; training goes on as if nobody had looked"
    x = Images().x
    def loader(**kwargs): return DataLoader([(o,i) for i,o in enumerate(x)], bs=16, device='cpu', **kwargs)
    for dls in (DataLoaders(loader(shuffle=True, drop_last=True), loader()), DataLoaders(loader(shuffle=True))):
        learn = quiet(clae_learner(dls, resnet8))
        before = learn.dls.train.rng.getstate()
        assert extract_features(learn, learn.dls.train)[1].tolist() == [*range(len(x))]
        assert learn.dls.train.rng.getstate() == before
        learn.fit(1)
    dls = DataLoaders(loader(shuffle=True), loader())
    quiet(encoder_learner(dls, learn, n_out=48)).fit(1)

def test_classes_of_torchvisions_folders(tmp_path):
    for part,classes in (('bank','abc'),('queries','bc')):
        for k in classes:
            (tmp_path/part/k).mkdir(parents=True)
            for i in range(4): Image.new('RGB', (16,16), (60*'abc'.index(k), 9*i, 0)).save(tmp_path/part/k/f'{i}.png')
    a,b = (TorchLoader(ImageFolder(tmp_path/o, v2.PILToTensor()), batch_size=4) for o in ('bank','queries'))
    with pytest.raises(ValueError, match='b, c in another'): evaluate(nn.Flatten(), DataLoaders(a, b), k=1)
    for classes in (3, torch.arange(3).numpy()): # other things of that name
        a.dataset.classes = classes
        assert evaluate(nn.Flatten(), DataLoaders(a, a), k=1).knn > .5

def test_labels_stand_behind_all_inputs(quiet):
    class Two(Images):
        "With the number of its hospital"
        n_inp = 2
        def __getitem__(self, i): return TensorImage(self.x[i]),int(i % 2),int(self.y[i])
    dls = DataLoaders(*[TfmdDL(Two(), bs=16)]*2)
    assert extract_features(clae_learner(dls, resnet8), dls.valid)[1].tolist() == Images().y.tolist()
    class Unlabelled(Two):
        def __getitem__(self, i): return super().__getitem__(i)[:2]
    assert has_labels(dls.valid) and not has_labels(TfmdDL(Unlabelled(), bs=16))

def test_views_that_are_exchanged(tmp_path, quiet):
    "The encoder is normalised as it was trained last"
    learn = quiet(clae_learner(make_dls(), resnet8))
    learn.clae.views = TwoViews.from_preset('simclr', 16, stats=[torch.tensor(o) for o in imagenet_stats])
    learn.fit(1)
    valid = make_dls().valid
    want = extract_features(learn, valid)[0]
    torch.testing.assert_close(extract_features(learn.export_encoder(tmp_path/'e.safetensors'), valid)[0], want)
    torch.testing.assert_close(extract_features(encoder_learner(make_dls(), learn, n_out=3), valid)[0], want)
    learn.clae.views = TwoViews(learn.clae.views.aug, (.4,.2)) # one number for all channels
    assert read_encoder(learn.export_encoder(tmp_path/'f.safetensors'))[1]['mean'] == pytest.approx([.4]*3)

def test_monitors_in_predictions(tmp_path, quiet):
    "They neither ask for labels there, nor forget what they know, nor are images exported with them"
    learn = quiet(clae_learner(make_dls(), resnet8, cbs=[KNNCallback(), CollapseMonitor()]))
    learn.fit(1)
    verdict = str(learn.collapse_monitor.verdict)
    want = learn.get_preds(dl=TfmdDL(Images(), bs=16))[0]
    assert str(learn.collapse_monitor.verdict) == verdict
    assert not {'loaders'} & vars(pickle.loads(pickle.dumps(learn.knn))).keys()
    learn.dls = DataLoaders(*[TfmdDL([(o,) for o in Images().x], bs=16)]*2) # has no labels
    torch.testing.assert_close(learn.get_preds()[0], want)

def test_two_crops_of_ones_own(quiet):
    class Two(Images):
        def __getitem__(self, i): return TensorImage(torch.stack([self.x[i], self.x[i].flip(-1)])),int(self.y[i])
    dls = DataLoaders(*[TfmdDL(Two(), bs=16, drop_last=True)]*2)
    learn = quiet(clae_learner(dls, resnet8, cbs=[KNNCallback(), CollapseMonitor()]))
    learn.fit(1)
    torch.testing.assert_close(extract_features(learn, dls.valid)[0], extract_features(learn, make_dls().valid)[0])

class Own(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def test_an_architecture_of_ones_own(tmp_path, quiet):
    "Its file says what to give, and that is taken"
    dls = make_dls()
    learn = quiet(clae_learner(dls, Own()))
    file = learn.export_encoder(tmp_path/'e.safetensors')
    with pytest.raises(ValueError, match=r'load_encoder\(file, arch\)'): encoder_learner(dls, file)
    encoder = load_encoder(file, Own())
    tuned = quiet(encoder_learner(dls, encoder, n_out=3))
    assert tuned.model[0].encoder is not encoder
    torch.testing.assert_close(extract_features(tuned, dls.valid)[0], extract_features(learn, dls.valid)[0])
    tuned.fit(1)
    with pytest.raises(ValueError, match='size of images'): export_onnx(Own(), tmp_path/'e.onnx')

@pytest.mark.parametrize('every', [1,4])
def test_losses_of_gathered_gradients(every, quiet):
    "The monitor's are those of the table, which nobody has scaled"
    def losses(*cbs):
        set_seed(0)
        learn = quiet(clae_learner(make_dls(), resnet8, every=every))
        learn.fit(1, 0., cbs=[monitor := CollapseMonitor(), *cbs])
        return monitor.last['loss_aug'],dict(zip(learn.recorder.metric_names[1:],
            learn.recorder.values[-1]))['loss_aug']
    a,b = losses(GradientAccumulation(64)),losses()
    assert a[0] == pytest.approx(a[1]) and a == pytest.approx(b)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_encoders_of_other_precision(dtype, tmp_path):
    dls = make_dls()
    file = clae_learner(dls, resnet8).export_encoder(tmp_path/'e.safetensors')
    h,want = (extract_features(o, dls.valid)[0] for o in (load_encoder(file).to(dtype), file))
    assert h.dtype == dtype
    torch.testing.assert_close(h.float(), want, rtol=.05, atol=.02)

def test_random_numbers_of_an_apple_gpu(monkeypatch):
    "Are left alone, too: `torch.manual_seed` sets them"
    state = [torch.tensor(1)]
    dls = make_dls().cpu()
    learn = clae_learner(dls, resnet8)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: state[0])
    monkeypatch.setattr(torch.mps, 'set_rng_state', lambda o: state.__setitem__(0, o))
    monkeypatch.setattr(torch.mps, 'manual_seed', lambda o: state.__setitem__(0, torch.tensor(o)))
    extract_features(learn, learn.dls.valid)
    assert state[0] == 1
