"""The library on a device made of paper (`paper_device.py`), as on a GPU: nothing is mixed with the CPU's tensors,
nothing waits that need not, little crosses, and the numbers are the CPU's."""
import contextlib
import io
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from fastai.vision.all import (
    Callback, IntToFloatTensor, L, MixedPrecision, TensorCategory, TensorImage, accuracy, load_learner, nn, partial,
    set_seed)
from PIL import Image

from clae_fastai.all import (
    FGSM, PGD, Checkpoint, CLAECallback, CollapseMonitor, FileImages, KNNCallback, MemoryDL, MemoryImages, NTXentLoss,
    Resume, TwoViews, adversarial_images, bn_statistics, clae_learner, classifier_vs_eps, encoder_learner, evaluate,
    extract_features, few_label_knn, file_dls, knn_predict, linear_probe, load_encoder, loss_vs_eps, memory_dls,
    resnet8)
from clae_fastai.data.images import ImageItem
from paper_device import DEVICE, PaperTensor, missing, paper_device

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or 'there is a paper device')

@pytest.fixture
def paper():
    with paper_device() as device: yield device

n_train,n_valid,bs,size = 16,8,8,16

def images(n):
    "Images of two classes, dark and bright"
    draw = np.random.default_rng(n)
    labels = torch.arange(n)%2
    pixels = torch.from_numpy(draw.integers(0, 128, (n,3,size,size), dtype=np.uint8))
    return MemoryImages(pixels + 100*labels.byte()[:,None,None,None], labels, ['dark','bright'])

def data(device, **kwargs): return memory_dls(images(n_train), images(n_valid), bs=bs, device=device, **kwargs)

class Watch(Callback):
    "Waits of each training batch, its loading included, and of each epoch outside of them"
    order,run_valid = 10**6,True
    def __init__(self, device): self.device = device

    def _since(self):
        "What was counted since the last call"
        now = Counter(self.device.waits)
        res,self.last = now - self.last,now
        return res

    def before_fit(self): self.last,self.batches,self.epochs = Counter(self.device.waits),[],[]
    def before_epoch(self):
        self._since()
        self.epochs.append(Counter())
    def before_train(self): self.epochs[-1] += self._since()
    def after_epoch(self): self.epochs[-1] += self._since()
    def after_batch(self):
        if self.training: self.batches.append(self._since())

def fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        learn.fit(epochs, 1e-3, **kwargs)
    return learn

def make(device, dls=None, **kwargs):
    set_seed(0)
    return clae_learner(dls or data(device), resnet8, **dict(every=1) | kwargs)

recorder = 'copy to the CPU','fastai/torch_core.py _inner' # the loss
skip = '_local_scalar_dense','train/finite.py before_step'
scaler = '_local_scalar_dense','callback/fp16.py before_step'
means = '_local_scalar_dense','method/callback.py mean'

def by_function(waits):
    "Counted by function instead of line"
    res = Counter()
    for (what,where),n in waits.items():
        places = [' '.join([p.partition(':')[0], p.rpartition(' ')[2]]) for p in where.split(' <- ')]
        res[what, places[-1]] += n
    return res

def check_batches(watch, *expected):
    "Every training batch waits for the copy of its loss, and for no more than is `expected`"
    for i,waits in enumerate(watch.batches):
        assert by_function(waits) == Counter([recorder, *expected]), f'batch {i} waits: {dict(waits)}'
    assert watch.batches

def watched(paper, *expected, epochs=1, dls=None, **kwargs):
    "A learner that was trained on paper without a wait too many"
    cbs = L(kwargs.pop('cbs', None))
    learn = make(DEVICE, dls, cbs=[*cbs, watch := Watch(paper)], **kwargs)
    fit(learn, epochs)
    check_batches(watch, *expected)
    return learn

def numbers(learn): return {k: v.cpu() for k,v in learn.model.state_dict().items()}

def assert_equal(a, b):
    assert a.keys() == b.keys()
    wrong = [k for k in a if not torch.equal(a[k], b[k])]
    assert not wrong, wrong

# the device itself

def test_it_is_like_a_gpu(paper):
    x = torch.rand(4,3).to(DEVICE)
    assert x.device.type == 'paper' and x.tolist() == x.cpu().tolist() and len(x) == 4
    cpu = torch.rand(4,3)
    for f in (lambda: x + cpu, lambda: torch.cat([x, cpu]), lambda: cpu[x > 0], lambda: cpu.T @ x, lambda: x.add_(cpu)):
        with pytest.raises(RuntimeError, match='same device'): f()
    for f in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="can't convert paper"): f()
    assert torch.equal((x + torch.tensor(1.)).cpu(), x.cpu() + 1), 'a number may come from the CPU'
    assert f'{x.mean():.3f}' == f'{x.cpu().mean():.3f}' and 'paper' in repr(x)
    g = torch.Generator(DEVICE).manual_seed(0)
    assert g.device == x.device and str(torch.Generator().device) == 'cpu'
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3, generator=g, device=DEVICE).cpu(), expected)

def test_waits_are_counted(paper):
    x,square = torch.rand(4,3).to(DEVICE),torch.eye(3).to(DEVICE)
    waiting = dict(
        item=lambda: x.sum().item(), float=lambda: float(x[0,0]), int=lambda: int(x[0,0]),
        bool=lambda: bool(x[0,0] > 0), tolist=x.tolist, cpu=x.cpu, print=lambda: repr(x),
        format=lambda: f'{x.sum():.3f}',
        nonzero=x.nonzero, mask=lambda: x[x > .5], set_mask=lambda: x.__setitem__(x > .5, x[0,0]),
        index=lambda: x[torch.tensor([0,1])], unique=x.unique, equal=lambda: torch.equal(x, x),
        bincount=lambda: (x > .5).int().flatten().bincount(),
        inverse=lambda: torch.linalg.inv(square), to=lambda: torch.rand(2).to(DEVICE),
        tensor=lambda: torch.tensor([1.], device=DEVICE), copy=lambda: x.copy_(torch.rand(4,3)))
    free = dict(
        add=lambda: x + 1, index=lambda: x[x.argmax(0)], slice=lambda: x[1:,:2],
        where=lambda: torch.where(x > .5, x, 0.),
        to=lambda: torch.rand(2).to(DEVICE, non_blocking=True), same=lambda: x.to(DEVICE), new=lambda: x.new_zeros(3),
        rand=lambda: torch.rand(3, device=DEVICE), shape=lambda: x.shape, len=lambda: len(x), iter=lambda: list(x),
        fill=lambda: x.fill_(0.))
    for name,f in waiting.items():
        paper.clear()
        f()
        assert paper.waits, name
    for name,f in free.items():
        paper.clear()
        f()
        assert not paper.waits, (name, paper.waits)

def test_bytes_are_counted(paper):
    paper.clear()
    torch.zeros(10, dtype=torch.float64).to(DEVICE, non_blocking=True)
    torch.empty(5, device=DEVICE).copy_(torch.ones(5))
    assert sum(paper.bytes.values()) == 80 + 20

def test_fastais_kinds_stay(paper):
    x,y = TensorImage(torch.rand(4,3,2,2)).to(DEVICE),TensorCategory(torch.arange(4)).to(DEVICE)
    ims = x,x*2,x[0],TensorImage(x + 1)
    for t,kind in (*((o,TensorImage) for o in ims), (y,TensorCategory)):
        assert isinstance(t, kind) and isinstance(t, PaperTensor) and t.device.type == 'paper'
    assert type(x.cpu()) is TensorImage and type(x.as_subclass(torch.Tensor)) is PaperTensor
    assert isinstance(IntToFloatTensor()(TensorImage(torch.zeros(1,3,2,2, dtype=torch.uint8)).to(DEVICE)), TensorImage)
    again = pickle.loads(pickle.dumps(x))
    assert type(again) is type(x) and torch.equal(again.cpu(), x.cpu())

def test_autocast_and_modules(paper):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(DEVICE)
    x = torch.rand(2,3,3,3, device=DEVICE)
    with torch.autocast('paper', dtype=torch.bfloat16): y = net(x)
    assert y.dtype == torch.bfloat16 and net(x).dtype == torch.float32
    y.float().sum().backward()
    assert all(isinstance(p, nn.Parameter) and p.grad.dtype == torch.float32 for p in net.parameters())
    net.to(memory_format=torch.channels_last)
    assert net[0].weight.raw.is_contiguous(memory_format=torch.channels_last)
    assert not any(isinstance(p, PaperTensor) for p in net.cpu().parameters())

def test_nothing_is_left_behind():
    "Of a device that was there: other tests of this process notice nothing"
    generator = type(torch.default_generator)
    with paper_device(): assert torch.accelerator.is_available() and torch.Generator is not generator
    assert not torch.accelerator.is_available() and torch.accelerator.device_count() == 0
    assert torch.Generator is generator
    x = torch.rand(6,3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=3, pin_memory=True)
    with pytest.warns(UserWarning, match='no accelerator'): assert torch.equal(torch.cat([b for b, in loader]), x)
    w = torch.rand(3, requires_grad=True)
    (x @ w).sum().backward()
    assert torch.allclose(w.grad, x.sum(0))
    child = os.fork() # autograd has made no thread, which no forked process could have
    if child == 0:
        try: w.sum().backward()
        except RuntimeError: os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

# training

@pytest.mark.parametrize('attack', 'fgsm rfgsm ffgsm pgd random'.split())
@pytest.mark.parametrize('method', 'plain uel simclr'.split())
def test_methods_and_attacks(paper, method, attack):
    attack = PGD(.03, steps=2) if attack == 'pgd' else attack
    on_paper = watched(paper, method=method, attack=attack)
    assert_equal(numbers(on_paper), numbers(fit(make('cpu', method=method, attack=attack))))

ways = dict(
    pixels=dict(attack=FGSM(.03, space='pixel')), l2=dict(attack=PGD(.5, steps=2, norm='l2', space='pixel')),
    baseline=dict(eps=0), channels_last=dict(channels_last=True), clean=dict(attack_bn='clean'),
    digits=dict(views='digits'), imagenet=dict(views='imagenet'), small=dict(size=12))

@pytest.mark.parametrize('way', ways)
def test_ways_to_train(paper, way):
    on_paper = watched(paper, **ways[way])
    assert_equal(numbers(on_paper), numbers(fit(make('cpu', **ways[way]))))

@pytest.mark.parametrize('precision', ['bf16','fp16'])
def test_half_precision(paper, precision):
    """float16's scaler, which is PyTorch's, waits twice besides: did the gradients overflow,
    and is the scale another now?"""
    # no overflow at first
    learn = watched(paper, *2*[scaler]*(precision == 'fp16'), precision=precision, temperature=.5)
    assert isinstance(learn.mixed_precision, MixedPrecision)
    assert all(v.isfinite().all() for v in numbers(learn).values())

def test_skip_waits_once_more(paper):
    learn = watched(paper, skip, on_nonfinite='skip')
    assert_equal(numbers(learn), numbers(fit(make('cpu'))))
    class Boom(NTXentLoss):
        def forward(self, z_q, z_p): return super().forward(z_q, z_p)*(float('nan') if learn.train_iter == 1 else 1)
    learn = make(DEVICE, method=Boom(), on_nonfinite='skip')
    fit(learn)
    assert learn.check_finite.n_skipped == 1 and all(v.isfinite().all() for v in numbers(learn).values())

def test_monitors_and_epochs(paper):
    "Outside of the training batches an epoch waits for a fixed number of results"
    cbs = [CollapseMonitor(), KNNCallback(k=5)]
    learn = watched(paper, epochs=2, cbs=cbs)
    on_cpu = fit(make('cpu', cbs=[CollapseMonitor(), KNNCallback(k=5)]), 2)
    assert learn.recorder.values == on_cpu.recorder.values
    first,second = [by_function(o) for o in learn.watch.epochs]
    n_batches = n_valid//bs # of validation
    assert first == second == Counter({recorder: n_batches, means: 2,
        ('copy to the CPU','measure/monitors.py after_train'): 1, # all that it has seen
        ('copy to the CPU','measure/features.py move'): 2, # features and labels for the effective rank
        # least and greatest value, of two sets for kNN, one for the rank
        ('_local_scalar_dense','method/views.py check_pixels'): 6,
        ('nonzero','measure/features.py check_data'): 4, ('copy to the CPU','measure/features.py check_data'): 2,
        ('_unique2','measure/features.py knn_predict'): 1,
        ('_local_scalar_dense','measure/features.py share_correct'): 1})
    plain = watched(paper, epochs=2)
    assert [by_function(o) for o in plain.watch.epochs] == 2*[Counter({recorder: n_batches, means: 2})]

# the data's way

def batches(dl): return [tuple(o.cpu() for o in b) for b in dl]

def same_batches(a, b):
    return len(a) == len(b) and all(type(x) is type(y) and torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))

def epochs(device, n=2, **kwargs):
    set_seed(1)
    dls = data(device, **kwargs)
    return [o for _ in range(n) for dl in dls.loaders for o in batches(dl)]

def test_images_live_on_the_device(paper):
    dls = data(DEVICE)
    paper.clear()
    for b in dls.train: assert all(o.device.type == 'paper' for o in b)
    once = n_train*(3*size*size + 8) # images and labels
    assert sum(paper.bytes.values()) == once + 8*n_train and not paper.waits
    paper.clear()
    for _ in dls.train: pass
    assert sum(paper.bytes.values()) == 8*n_train and not paper.waits # the indices
    assert same_batches(epochs(DEVICE), epochs('cpu'))

def test_images_that_are_there_already(paper):
    "Their labels come to them"
    there = [MemoryImages(o.images.to(DEVICE), o.labels, o.vocab) for o in (images(n_train), images(n_valid))]
    dls = memory_dls(*there, bs=bs, device=DEVICE)
    x,y = dls.valid.one_batch()
    a,b = data('cpu').valid.one_batch()
    assert torch.equal(x.cpu(), a) and torch.equal(y.cpu(), b)
    learn = clae_learner(dls, resnet8)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_a_batch_of_training_brings_no_images(paper):
    "What crosses are the indices, and kornia's parameters: much less than an image for each"
    learn = watched(paper, views='digits')
    paper.clear()
    fit(learn)
    n_batches = (n_train + n_valid)//bs
    ours = {place: n for place,n in paper.bytes.items() if 'kornia' not in place and 'core/utils.py' not in place}
    assert sum(ours.values()) == 8*(n_train + n_valid), ours
    assert sum(paper.bytes.values())/n_batches < bs*3*size*size*4/2, paper.bytes

gathered = dict(pinned=dict(pin_memory=True), item_tfms=dict(after_item=[lambda o: o]), process=dict(num_workers=1))

@pytest.mark.parametrize('way', gathered)
def test_gathered_on_the_cpu(paper, way):
    "By loaders that cannot leave it to the device: copied without waiting, in the same order"
    kwargs = gathered[way]
    dls = data(DEVICE, **kwargs)
    paper.clear()
    for b in dls.train: assert all(o.device.type == 'paper' for o in b)
    assert sum(paper.bytes.values()) == n_train*(3*size*size + 8) and not paper.waits
    assert same_batches(epochs(DEVICE, **kwargs), epochs('cpu'))

def test_too_large_for_the_device(paper):
    n,side = 2**18 + 1,64 # a byte more than 1 GiB is enough
    large = MemoryImages(torch.zeros(1,1,side,side, dtype=torch.uint8).expand(n,-1,-1,-1))
    dl = MemoryDL(large, bs=4, device=DEVICE)
    paper.clear()
    for _,(x,) in zip(range(3), dl): assert x.device.type == 'paper'
    assert sum(paper.bytes.values()) == 3*4*side*side and not paper.waits
    assert large.on(DEVICE) is large

def test_a_quarter_of_what_is_free(monkeypatch):
    "Of a GPU's memory, asked once"
    n_bytes,asked = images(4).images.nbytes + 4*8,[]
    def mem_get_info(device):
        asked.append(device)
        return 4*n_bytes - 1,10**12 # free, and in all
    monkeypatch.setattr('torch.cuda.mem_get_info', mem_get_info)
    data = images(4)
    assert data.on('cuda:1') is data and data.on('cuda:1') is data and asked == [torch.device('cuda:1')]

def test_loaders_move(paper):
    "To the CPU and back, to other sets and sizes, through pickles: the same images everywhere"
    dls,plain = data(DEVICE),data('cpu')
    expected = batches(plain.valid)
    assert same_batches(batches(dls.valid), expected) and dls.valid_ds.elsewhere
    dls.to('cpu')
    assert same_batches(list(dls.valid), expected) and not dls.valid_ds.elsewhere
    assert all(not isinstance(o, PaperTensor) for b in dls.valid for o in b)
    dls.to(DEVICE)
    assert same_batches(batches(dls.valid), expected)
    assert same_batches(batches(dls.valid.new(bs=3)), batches(plain.valid.new(bs=3)))
    taken = [batches(o.valid.new(o.valid_ds.take([3,1]))) for o in (dls,plain)]
    assert same_batches(*taken) and len(taken[0][0][0]) == 2
    files = [plain.valid_ds.images[0], Image.new('RGB', (5,9))]
    assert same_batches(batches(dls.test_dl(files)), batches(plain.test_dl(files)))
    again = pickle.loads(pickle.dumps(dls.valid_ds))
    assert not again.elsewhere and torch.equal(again.images, dls.valid_ds.images) and dls.valid_ds.elsewhere
    assert len(pickle.dumps(dls.new_empty())) < 20_000
    labels = dls.valid_ds[2][1]
    assert int(labels) == 0 and not isinstance(labels, PaperTensor) # one by one they are the CPU's

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root,draw = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for i in range(n_train): Image.fromarray(draw.integers(0, 256, (40,50,3), dtype=np.uint8)).save(root/f'{i}.jpg')
    return [ImageItem(root/f'{i}.jpg', 'ab'[i%2]) for i in range(n_train)]

@pytest.mark.parametrize('workers', [0,1])
def test_photographs(paper, photos, workers):
    "Files come as uint8 crops, five-dimensional, without waiting"
    def dls(device):
        return file_dls(photos, photos[:n_valid], ['a','b'], size, bs=bs, num_workers=workers, device=device)
    learn = watched(paper, dls=dls(DEVICE))
    assert learn.dls.one_batch()[0].shape == (bs,2,3,size,size) and isinstance(learn.dls.train_ds, FileImages)
    if not workers: assert_equal(numbers(learn), numbers(fit(make('cpu', dls('cpu')))))
    paper.clear()
    for _ in learn.dls.train: pass
    assert sum(paper.bytes.values()) == n_train*(2*3*size*size + 8) and not paper.waits

# after training

@pytest.fixture(scope='module')
def trained():
    with paper_device(): return fit(make(DEVICE, method='plain', attack='rfgsm'), 2)

@pytest.fixture(scope='module')
def on_cpu(): return fit(make('cpu', method='plain', attack='rfgsm'), 2)

def test_evaluation(paper, trained, on_cpu):
    for kwargs in (dict(k=3), dict(k=3, protocol='authors', epochs=2)):
        a,b = (evaluate(o, o.dls, **kwargs) for o in (trained,on_cpu))
        assert ([a.knn, a.knn_mean_per_class, a.result, *a.probe.curve] ==
                [b.knn, b.knn_mean_per_class, b.result, *b.probe.curve])
    waits = []
    for n in (2,12): # images a batch
        paper.clear()
        h,z,y = extract_features(trained, trained.dls.train.new(bs=n), 'both', device=None)
        assert {o.device.type for o in (h,z,y)} == {'paper'}
        waits.append(by_function(paper.waits))
    assert waits[0] == waits[1] == Counter({('_local_scalar_dense','method/views.py check_pixels'): 2})
    paper.clear()
    on_host = extract_features(trained, trained.dls.train.new(bs=2), 'both')
    assert by_function(paper.waits)['copy to the CPU','measure/features.py move'] == 3 # features, embeddings, labels
    assert all(torch.allclose(a, b.cpu(), atol=1e-5) for a,b in zip(on_host, (h,z,y)))
    assert torch.equal(knn_predict(h, y, h, 3).cpu(), knn_predict(on_host[0], on_host[2], on_host[0], 3))
    together = few_label_knn(on_host[0], on_host[2], on_host[0], on_host[2], ns=[2], draws=3)
    for features,labels in ((h,y.cpu()), (h.cpu(),y)): # of which one may be elsewhere
        assert knn_predict(features, labels, features, 3).device == labels.device
        assert few_label_knn(features, labels, features, labels, ns=[2], draws=3) == together
    probes = [linear_probe(o, o, l2s=[1.], device=device) for o,device in (((h,y),DEVICE), ((h.cpu(),y.cpu()),'cpu'))]
    weights = [o.linear.weight.cpu() for o in probes]
    assert torch.equal(*weights)

def test_analysis(paper, trained, on_cpu):
    small = dict(eps=(0,.05), n_batches=2)
    measured = [partial(loss_vs_eps, **small), partial(classifier_vs_eps, **small, l2s=[1.]), bn_statistics,
        partial(bn_statistics, reestimate=True, n_batches=2)]
    for f in measured:
        a,b = f(trained),f(on_cpu)
        assert a.equals(b), f
    a,b = (adversarial_images(o, n=3) for o in (trained,on_cpu))
    assert np.array_equal(np.stack(a.x_adv), np.stack(b.x_adv)) and a.cos_adv.tolist() == b.cos_adv.tolist()
    trained.show_views(2)

class Stop(Callback):
    "Ends the process, as it were, after a batch"
    order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter == self.at: raise KeyboardInterrupt

def test_resume(paper, tmp_path):
    "What was interrupted inside an epoch ends as what was not"
    def learner(): return make(DEVICE, attack='rfgsm', views='digits', cbs=[CollapseMonitor()])
    whole = fit(learner(), 2)
    with pytest.raises(KeyboardInterrupt): fit(learner(), 2, cbs=[Checkpoint(tmp_path, every_batches=1), Stop(3)])
    resumed = fit(learner(), 2, cbs=[Checkpoint(tmp_path), Resume(tmp_path)])
    assert_equal(numbers(whole), numbers(resumed))
    assert [list(o) for o in whole.recorder.values] == [list(o) for o in resumed.recorder.values]
    assert next(resumed.model.parameters()).device.type == 'paper'

def test_encoder_file(paper, trained, on_cpu, tmp_path):
    file = trained.export_encoder(tmp_path/'encoder.safetensors')
    other = on_cpu.export_encoder(tmp_path/'cpu.safetensors')
    assert_equal(load_encoder(file).state_dict(), load_encoder(other).state_dict())
    h = extract_features(file, trained.dls.valid)[0]
    assert torch.equal(h, extract_features(trained, trained.dls.valid)[0])

def test_life_of_a_learner(paper, trained, on_cpu, tmp_path):
    "What fastai's learners do, on the device"
    def look(learn):
        x = images(1).images[0]
        with learn.no_bar(), learn.no_logging():
            z,loss = learn.get_preds()[0],learn.validate()[0]
            learn.lr_find(num_it=2, show_plot=False, suggest_funcs=())
            learn.summary()
            return z,loss,learn.predict(x)[2]
    for learn in (trained,on_cpu): learn.path = tmp_path
    set_seed(3)
    a = look(trained)
    set_seed(3)
    b = look(on_cpu)
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and torch.equal(a[2], b[2])
    trained.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    assert not isinstance(next(again.model.parameters()), PaperTensor) # wherever it was trained
    with again.no_bar(): assert torch.allclose(again.predict(images(1).images[0])[2], a[2], atol=1e-6)

def test_fine_tuning(paper, trained, on_cpu, tmp_path):
    def tune(learn):
        set_seed(2)
        tuned = encoder_learner(learn.dls, learn, metrics=accuracy)
        with tuned.no_bar(), tuned.no_logging(): tuned.fine_tune(1)
        return tuned
    a,b = tune(trained),tune(on_cpu)
    assert_equal(numbers(a), numbers(b))
    with a.no_bar(): assert a.predict(images(1).images[0])[0] == b.predict(images(1).images[0])[0]

# it is red when it should be

faults = dict(item=lambda x: x.sum().item(), cpu=lambda x: x + torch.zeros(x.shape), mask=lambda x: x[x > 0])
places = dict(views=(TwoViews, 'to_pixels'), attack=(FGSM, 'delta'), loss=(NTXentLoss, 'rows'),
    callback=(CLAECallback, 'adversarial_views'))

@pytest.mark.parametrize('fault', faults)
@pytest.mark.parametrize('place', places)
def test_a_fault_is_noticed(paper, monkeypatch, place, fault):
    "One `.item()`, one tensor of the CPU's, or one mask as index, in views, attack, loss or callback"
    owner,name = places[place]
    sound = getattr(owner, name)
    def faulty(self, x, *args):
        faults[fault](x.detach().float())
        return sound(self, x, *args)
    one_batch = memory_dls(images(bs), images(0), bs=bs, device=DEVICE)
    learn = make(DEVICE, one_batch, cbs=(watch := Watch(paper)))
    monkeypatch.setattr(owner, name, faulty)
    if fault == 'cpu':
        with pytest.raises(RuntimeError, match='same device'): fit(learn)
    else:
        fit(learn)
        with pytest.raises(AssertionError, match='batch 0 waits.*test_paper_device'): check_batches(watch)
