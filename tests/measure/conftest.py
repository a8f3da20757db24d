"What the tests of measure share: made features, and a trained encoder."
import numpy as np
import pytest
import torch

@pytest.fixture(scope='session')
def blobs():
    "Makes features around a centre for each class, behind a ReLU as an encoder's are"
    def _blobs(n, d, n_classes, seed=0, spread=1.):
        g = np.random.default_rng(seed)
        centres = np.random.default_rng(9).normal(size=(n_classes, d))
        y = g.permutation(np.arange(n)%n_classes)
        x = np.maximum(centres[y] + spread*g.normal(size=(n,d)) + 1, 0)
        return torch.tensor(x, dtype=torch.float32),torch.tensor(y)
    return _blobs

@pytest.fixture(scope='module')
def trained(digits_dir, tmp_path_factory):
    "A ResNet-8 after one epoch, its data, and its file"
    from clae_fastai.data.catalogue import get_dls
    from clae_fastai.method.models import resnet8
    from clae_fastai.train.learner import clae_learner
    dls = get_dls('folder', digits_dir/'rgb', bs=32, size=16, num_workers=0)
    learn = clae_learner(dls, resnet8)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn,dls,learn.export_encoder(tmp_path_factory.mktemp('run')/'encoder.safetensors')
