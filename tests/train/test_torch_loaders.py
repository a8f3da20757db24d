"PyTorch's own loaders: all that a learner does with fastai's, or one sentence that says what to give instead."
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, DataLoaders, first, load_learner, set_seed
from PIL import Image
from torch.utils import data

from clae_fastai.all import Checkpoint, Resume, clae_learner, encoder_learner, evaluate, extract_features, resnet8

class Labelled(data.TensorDataset): classes = ['cat','dog']

def torch_dls(labels=True, **kwargs):
    x,y = torch.rand(32, 3, 16, 16),torch.arange(32)%2
    dataset = Labelled(x, y) if labels else data.TensorDataset(x)
    kwargs = kwargs or dict(shuffle=True)
    return DataLoaders(data.DataLoader(dataset, batch_size=8, drop_last=True, **kwargs),
                       data.DataLoader(dataset, batch_size=12))

def learner(quiet, path, *args, **kwargs):
    set_seed(0)
    dls = torch_dls(*args, **kwargs)
    dls.path = path
    return quiet(clae_learner(dls, resnet8, every=1))

@pytest.mark.parametrize('labels', [True,False])
def test_life_of_a_learner(labels, quiet, tmp_path, capsys):
    learn = learner(quiet, tmp_path, labels)
    learn.fit(1)
    assert np.isfinite(learn.recorder.final_record).all()
    assert learn.lr_find(num_it=6, show_plot=False).valley > 0
    assert 'CLAECallback' in learn.summary()
    assert len(learn.show_views(3).axes) == len(learn.show_results(max_n=3).axes) == 5*3
    learn.dls.show_batch(max_n=2)
    x = learn.dls.valid_ds.tensors[0]
    z = learn.get_preds()[0] # in order
    torch.testing.assert_close(learn.get_preds(ds_idx=0)[0], z) # also of images that are shuffled
    torch.testing.assert_close(extract_features(learn, learn.dls.train, 'z')[0], z)
    torch.testing.assert_close(learn.predict(x[3])[2], z[3])
    learn.export('x.pkl')
    again = quiet(load_learner(tmp_path/'x.pkl'))
    torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(list(x)))[0], z)
    fresh = quiet(encoder_learner(torch_dls(), learn, n_out=2))
    with torch.no_grad(): p = fresh.model.eval()(learn.clae.normalize(fresh.dls.valid_ds.tensors[0])).softmax(1)
    torch.testing.assert_close(fresh.get_preds()[0], p, rtol=0, atol=1e-5) # normalised, though they are plain tensors
    tuned = (quiet(encoder_learner(torch_dls(), learn)) if labels else
             quiet(encoder_learner(torch_dls(), learn, n_out=2)))
    tuned.fine_tune(1)
    assert np.isfinite(tuned.recorder.final_record).all()
    if labels: assert evaluate(learn, learn.dls).knn >= 0
    assert not capsys.readouterr().out

@pytest.mark.parametrize('image', ['a.png', Path('a.png'), Image.new('RGB', (16,16))], ids=['name','file','image'])
def test_what_they_do_not_read(quiet, tmp_path, image):
    "Files and images, of which their data sets make tensors in a way that nobody knows"
    learn = learner(quiet, tmp_path)
    for use in learn.embed,learn.dls.test_dl(['a.png']).new:
        with pytest.raises(ValueError, match=f'this is a {type(image).__name__}.*folder_dl'): first(use([image]))
    with pytest.raises(ValueError, match='folder_dl'): learn.predict(image)
    files = data.DataLoader([(image,0)]*8, batch_size=4, collate_fn=lambda items: (torch.rand(len(items),3,16,16),))
    quiet(clae_learner(DataLoaders(files, files), resnet8)).fit(1) # its own function reads them

def test_classes_are_written_below(quiet, tmp_path):
    learn = learner(quiet, tmp_path)
    its = learn.dls.valid.show_batch(show=False, max_n=2)[2]
    assert [y for _,y in its] == ['cat','dog']

class Stop(Callback):
    order = 2000
    def after_batch(self):
        if (self.epoch,self.iter) == (1,2): raise InterruptedError('stopped')

def test_resumed(quiet, tmp_path):
    def fit(*cbs):
        learn = learner(quiet, tmp_path)
        set_seed(1)
        learn.fit(3, 1e-3, cbs=cbs)
        return learn.model.state_dict()
    with pytest.raises(InterruptedError): fit(Checkpoint(tmp_path/'c', every_batches=2), Stop())
    a,b = fit(Resume(tmp_path/'c')),fit()
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('own', [
    dict(sampler=data.WeightedRandomSampler(torch.ones(32), 32)),
    dict(sampler=data.RandomSampler(range(32), num_samples=16)),
    dict(sampler=data.RandomSampler(range(32), replacement=True)), dict(shuffle=True, worker_init_fn=print)])
def test_a_sampler_of_ones_own_is_kept(own, quiet, tmp_path, capsys):
    learn = learner(quiet, tmp_path, **own)
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'used as it is' in said and 'give a plain DataLoader' in said
    assert type(learn.dls.train) is data.DataLoader
    learn.fit(1)
    learn.show_views(2)
    alone = DataLoaders(learn.dls.train, device='cpu') # without one to validate on
    quiet(clae_learner(alone, resnet8)).fit(1)
    assert extract_features(learn, learn.dls.valid)[0].shape == (32,64)
