"fastai's callbacks beside a contrastive training: they work, or are refused before the first step."
import pytest
import torch
from fastai.vision.all import (
    Callback, CSVLogger, CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, ReduceLROnPlateau,
    SaveModelCallback, TerminateOnNaNCallback)

from clae_fastai.all import CollapseMonitor, KNNCallback, MemoryImages, clae_learner, memory_dls, resnet8

def learner(quiet, path, n_valid=8, labels=True):
    x = torch.randint(256, (32,3,16,16), dtype=torch.uint8)
    images = MemoryImages(x, torch.arange(32)%2 if labels else None, list('ab') if labels else ())
    return quiet(clae_learner(memory_dls(images, images.take(slice(0,n_valid)), bs=8, path=path), resnet8, every=1))

class Stepped(Callback):
    n = 0
    def after_step(self): self.n += 1

def refused(learn, cb, says):
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=[cb, stepped := Stepped()])
    assert stepped.n == 0

trackers = [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau]

@pytest.mark.parametrize('tracker', trackers)
@pytest.mark.parametrize('labels', [True,False])
def test_trackers(tracker, labels, quiet, tmp_path):
    without = learner(quiet, tmp_path, 0, labels)
    refused(without, tracker(),
        "'valid_loss', and there are no validation images .* one of train_loss, loss_aug, loss_adv")
    without.fit(2, cbs=tracker(monitor='train_loss'))
    without.fit(2, cbs=[CollapseMonitor(), tracker(monitor='z_std')])
    refused(without, tracker(monitor='accuracy'), "'accuracy', and the training table has no such column")
    learner(quiet, tmp_path, 8, labels).fit(2, cbs=tracker())

def test_trackers_of_knn(quiet, tmp_path):
    learn = learner(quiet, tmp_path)
    refused(learn, SaveModelCallback(monitor='knn'), 'no such column')
    learn.fit(3, cbs=[KNNCallback(every=2), SaveModelCallback(monitor='knn')])

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_labels_are_not_mixed(cb, quiet, tmp_path):
    refused(learner(quiet, tmp_path), cb(),
        f'{cb.__name__}.* no labels'.replace('MixUp', '[Mm]ix').replace('CutMix', '[Cc]ut'))

class Halves(Callback):
    "Changes the views after they were made"
    order = 500
    def before_batch(self): self.learn.xb = (self.xb[0][:4], *self.xb[1:])

class Targets(Callback):
    order = 500
    def before_batch(self): self.learn.yb = (self.yb[0].float(),)

@pytest.mark.parametrize('cb', [Halves, Targets])
def test_views_are_not_changed_later(cb, quiet, tmp_path):
    with pytest.raises((ValueError,RuntimeError)) as e: learner(quiet, tmp_path).fit(1, cbs=cb())
    assert 'has changed the views' in str(e.value) and cb.__name__.lower() in str(e.value)

@pytest.mark.parametrize('cb', [GradientClip, GradientAccumulation, TerminateOnNaNCallback, lambda: CSVLogger('x.csv')])
@pytest.mark.parametrize('n_valid', [0,8])
def test_the_others_work(cb, n_valid, quiet, tmp_path): learner(quiet, tmp_path, n_valid).fit(1, cbs=cb())
