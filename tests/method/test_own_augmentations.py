"""Other libraries' augmentations as views: each image its own random numbers, which follow from the seed,
and one way to normalise."""
import random

import kornia.augmentation as K
import numpy as np
import pytest
from lightly.transforms.simclr_transform import SimCLRViewTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
import torch
from fastai.vision.all import Callback, FlipItem, aug_transforms, imagenet_stats, set_seed
from torch import nn
from torchvision.transforms import v2

from clae_fastai.all import Checkpoint, MemoryImages, Resume, TwoViews, clae_learner, memory_dls, resnet8, same_for_all

try:
    import albumentations as A
    from albumentations.pytorch import ToTensorV2
except ImportError: A = None
needs_albumentations = pytest.mark.skipif(A is None, reason='needs albumentations')

def crops(n_in=3):
    return [A.RandomResizedCrop((24,24)), A.HorizontalFlip()] + ([A.ColorJitter(p=.8)] if n_in == 3 else [])

augmentations = dict(
    torchvision=lambda: v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(),
                                    v2.ColorJitter(.4, .4, .4, .1)]),
    kornia=lambda: TwoViews(nn.Sequential(K.RandomResizedCrop((24,24)), K.RandomHorizontalFlip(),
                                          K.ColorJitter(.4, .4, .4, .1))),
    kornia_list=lambda: [K.RandomResizedCrop((24,24)), K.RandomSolarize()],
    fastai=lambda: [*aug_transforms(size=24, max_rotate=20)],
    mixed=lambda: [v2.RandomCrop(28), FlipItem(.5), *aug_transforms(size=24)])
if A: augmentations |= dict(
    albumentations=crops,
    albumentations_composed=lambda: A.Compose([*crops(), ToTensorV2()]),
    albumentations_sometimes=lambda: [crops()[0], A.Compose(crops()[1:], p=.5),
                                      A.OneOf([A.GaussianBlur(), A.GaussNoise()])],
    albumentations_and_torchvision=lambda: [*crops(), v2.RandomGrayscale(), A.ToFloat(), v2.RandomErasing(p=1)])

def dls(n=16, n_in=3):
    torch.manual_seed(0)
    images = MemoryImages(torch.randint(256, (n,n_in,32,32), dtype=torch.uint8))
    return memory_dls(images, images.take([]), bs=8)

class Stop(Callback):
    order,run_valid = 2000,False
    def after_batch(self):
        if self.train_iter == 3: raise InterruptedError('stopped')

@pytest.mark.parametrize('name', augmentations)
def test_as_views(name, quiet, tmp_path):
    make = augmentations[name]
    views = make() if name == 'kornia' else TwoViews(make())
    x = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    set_seed(1)
    a = views(x)
    assert all(o.shape == (8,3,24,24) and o.dtype == torch.float32 and 0 <= o.min() and o.max() <= 1 for o in a)
    assert all(len(o.flatten(1).unique(dim=0)) > 5 for o in a) and not torch.equal(*a) # every image and view is another
    assert not same_for_all(views, x)
    set_seed(1)
    assert all(torch.equal(p, q) for p,q in zip(a, views(x)))
    def fit(*cbs):
        set_seed(2)
        learn = quiet(clae_learner(dls(), resnet8, views=make()))
        learn.fit(2, cbs=cbs)
        return learn.model.state_dict()
    with pytest.raises(InterruptedError): fit(Checkpoint(tmp_path, every_batches=1), Stop())
    whole,resumed = fit(),fit(Resume(tmp_path))
    assert all(torch.equal(whole[k], v) for k,v in resumed.items())

@needs_albumentations
@pytest.mark.parametrize('n_in', [1,3,7])
def test_numbers_of_channels(n_in): assert TwoViews(crops(n_in))(torch.rand(4, n_in, 32, 32))[0].shape == (4,n_in,24,24)

@needs_albumentations
def test_pixels_stay_what_they_are():
    x = torch.rand(4, 3, 32, 32)
    for aug in ([A.NoOp()], [A.NoOp(), ToTensorV2()], [A.ToFloat()]):
        torch.testing.assert_close(TwoViews(aug)(x)[0], x, rtol=0, atol=.5/255 + 1e-6)

@needs_albumentations
def test_own_transform():
    "A class of the user's, in a module of his own"
    class Half(A.ImageOnlyTransform):
        def apply(self, img, **params): return img//2
    class Halved(v2.Transform):
        def transform(self, inpt, params): return v2.functional.adjust_brightness(inpt, .5)
    x = torch.rand(4, 3, 32, 32)
    for tfm in (Half(p=1), Halved()): torch.testing.assert_close(TwoViews(tfm)(x)[0], x/2, rtol=0, atol=1.1/255)

@needs_albumentations
def test_normalize_is_taken_over():
    learn = clae_learner(dls(), resnet8, views=A.Compose([*crops(), A.Normalize(), ToTensorV2()]))
    for own,stats in zip(learn.clae.stats, imagenet_stats): torch.testing.assert_close(own, torch.tensor(stats))
    x = torch.rand(2, 3, 32, 32)
    expected = np.stack([A.Normalize()(image=(o*255).round().byte().permute(1,2,0).numpy())['image']
                         for o in x]).transpose(0,3,1,2)
    torch.testing.assert_close(learn.clae.normalize((x*255).round().byte()), torch.from_numpy(expected),
                               rtol=0, atol=1e-5)

refused = {
    'in the middle': lambda: TwoViews([v2.Normalize([.5],[.5]), v2.RandomCrop(24)]),
    'inside': lambda: TwoViews(nn.Sequential(K.RandomHorizontalFlip(), K.Normalize(.5, .5)))}
if A: refused |= {
    'before an albumentation': lambda: TwoViews([A.Normalize(), *crops()]),
    "each image's own": lambda: TwoViews([*crops(), A.Normalize(normalization='image')]),
    'now and then': lambda: TwoViews([A.Compose([*crops(), A.Normalize()], p=.5)])}

@pytest.mark.parametrize('case', refused)
def test_other_normalize_is_refused(case):
    with pytest.raises(ValueError, match='Normalize.*as evaluation normalises, too'): refused[case]()

@needs_albumentations
def test_the_seed_is_pythons():
    "Also in processes, and where others draw in between"
    views,x = TwoViews(crops()),torch.rand(2, 3, 32, 32)
    random.seed(3)
    a = views(x)
    np.random.rand(5)
    A.HorizontalFlip()(image=np.zeros((8,8,3), np.uint8))
    random.seed(3)
    assert all(torch.equal(p, q) for p,q in zip(a, views(x)))

def test_a_normalisation_that_hides_in_lightlys_transform_is_seen():
    "It would go unnoticed in training, and be missing in evaluation"
    hidden = SimCLRViewTransform(input_size=16)
    with pytest.raises(ValueError, match='Normalize must be the last'): TwoViews([hidden])
    assert TwoViews([hidden.transform]).stats[0].tolist() == pytest.approx(IMAGENET_NORMALIZE['mean'])
    assert TwoViews([SimCLRViewTransform(input_size=16, normalize=None)]).stats is None
