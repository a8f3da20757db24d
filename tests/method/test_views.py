"""The distribution of each augmentation is torchvision's: mean, standard deviation and extremes over 2,000 draws
on the same image (two-sample Kolmogorov-Smirnov)."""
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image
from torch import nn

from clae_fastai.all import Normalize, TwoViews, clae_learner, get_dls, resnet8, set_seed, view_presets

n,side = 2000,32

@pytest.fixture(scope='module')
def photo():
    im = Image.fromarray(load_sample_image('china.jpg')).crop((150,60,470,380)).resize((side,side), Image.BILINEAR)
    return T.functional.to_tensor(im)

def steps(method): return {type(o).__name__: o for o in TwoViews.from_preset(method, side).aug}

theirs = dict(
    plain_crop   =('plain',  'RandomResizedCrop',    T.RandomResizedCrop(side, (.2,1.), antialias=False)),
    simclr_crop  =('simclr', 'RandomResizedCrop',    T.RandomResizedCrop(side, (.08,1.), antialias=False)),
    flip         =('simclr', 'RandomHorizontalFlip', T.RandomHorizontalFlip()),
    plain_colour =('plain',  'ColorJitter',          T.ColorJitter(.4, .4, .4, .4)),
    simclr_colour=('simclr', 'ColorJitter',          T.RandomApply([T.ColorJitter(.8, .8, .8, .2)], p=.8)),
    grey         =('simclr', 'RandomGrayscale',      T.RandomGrayscale(p=.2)),
    blur         =('imagenet','RandomGaussianBlur',  T.RandomApply([T.GaussianBlur(3, (.1,2.))], p=.5)))

def moments(x):
    """Of each draw: mean and standard deviation of its channels, smallest and largest value,
    mean of each quadrant (where things are)"""
    x = x.as_subclass(torch.Tensor)
    quadrants = nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
    return torch.cat([x.mean((2,3)), x.std((2,3)), x.amin((1,2,3))[:,None], x.amax((1,2,3))[:,None], quadrants], 1)

@pytest.mark.parametrize('name', theirs)
def test_distribution_is_torchvisions(photo, name):
    method,kind,tfm = theirs[name]
    set_seed(0)
    bs = 1 if 'colour' in name else 100 # kornia draws the order of the jitter's steps once a batch
    step = steps(method)[kind]
    ours = moments(torch.cat([step(photo.expand(bs,-1,-1,-1)) for _ in range(n//bs)]))
    ref = moments(torch.stack([tfm(photo) for _ in range(n)]))
    p = [ks_2samp(a, b).pvalue for a,b in zip(ours.round(decimals=3).T.numpy(), ref.round(decimals=3).T.numpy())]
    assert min(p) > 1e-4, p

def test_every_image_has_its_own_parameters(photo):
    for name in view_presets:
        views = TwoViews.from_preset(name, side)(photo.expand(32,-1,-1,-1))
        assert len(torch.cat(views).flatten(1).unique(dim=0)) == 64 # nor are the two views of an image the same

def test_normalize_last_and_once(quiet):
    "Whatever the DataLoaders normalise with, the encoder sees views that are normalised with it, once"
    seen = []
    for stats in (None, ([.2],[.4])):
        dls = get_dls('digits', bs=64, limit=256,
            batch_tfms=None if stats is None else Normalize.from_stats(*stats, cuda=False))
        learn = quiet(clae_learner(dls, resnet8, views='digits', eps=0.))
        learn.model.encoder.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
        learn.fit(1, 0.)
        mean,std = (o.item() for o in learn.clae.views.stats)
        x = torch.cat(seen)
        seen.clear()
        assert (mean,std) == ((.5,.5) if stats is None else (pytest.approx(.2), pytest.approx(.4)))
        pix = x*std + mean
        assert (pix.min() >= -1e-6 and pix.max() <= 1 + 1e-6 and pix.min() < .05 and pix.max() > .95 and
                x.dtype == torch.float32)
