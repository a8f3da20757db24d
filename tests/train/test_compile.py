"`torch.compile`, around a model or its encoder: looked through wherever a model is looked into."
import pytest
import torch
from fastai.vision.all import Callback, set_seed

from clae_fastai.all import (
    Checkpoint, Resume, clae_learner, encoder_learner, evaluate, extract_features, get_dls, load_encoder, plain_model,
    plain_state, resnet8)

def whole(learn, backend): learn.model = torch.compile(learn.model, backend=backend)
def encoder(learn, backend): learn.model.encoder = torch.compile(learn.model.encoder, backend=backend)
def in_place(learn, backend): learn.model.encoder.compile(backend=backend)

def learner(quiet, compile=None, backend='eager'):
    set_seed(0)
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=96), resnet8, views='digits', every=1))
    if compile: compile(learn, backend)
    return learn

def fit(learn, *cbs, n=1):
    set_seed(1)
    learn.fit(n, 1e-3, cbs=cbs)
    return learn

def assert_equal(a, b):
    a,b = plain_state(a.model),plain_state(b.model)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()

@pytest.mark.parametrize('compile', [whole, encoder, in_place])
@pytest.mark.parametrize('backend', ['eager','aot_eager'])
def test_looked_through(compile, backend, quiet, tmp_path):
    plain,compiled = fit(learner(quiet)),fit(learner(quiet, compile, backend))
    assert_equal(plain, compiled)
    for which in ('h','z'):
        a,b = (extract_features(o, o.dls.valid, which)[0] for o in (plain,compiled))
        assert torch.equal(a, b) and a.shape[1] == 64
    assert evaluate(compiled, compiled.dls, knn_on='z').knn == evaluate(plain, plain.dls, knn_on='z').knn
    files = [o.export_encoder(tmp_path/f'{i}.safetensors') for i,o in enumerate((plain,compiled))]
    assert files[0].read_bytes() == files[1].read_bytes() # and equal encoders are equal files
    assert load_encoder(files[1]).state_dict().keys() == load_encoder(files[0]).state_dict().keys()
    tuned = encoder_learner(compiled.dls, compiled)
    assert (type(plain_model(tuned.model[0].encoder)).__name__ == 'CIFARResNet' and
            not any('_orig' in k for k in tuned.model.state_dict()))
    compiled.show_views(2)

class StopAfterFirst(Callback):
    order = 2000
    def before_epoch(self):
        if self.epoch == 1: raise InterruptedError('stopped')

@pytest.mark.parametrize('first,second', [(whole,None), (None,whole), (encoder,whole)])
def test_resumed(first, second, quiet, tmp_path):
    "Whatever is compiled, before or after: the same weights"
    with pytest.raises(InterruptedError): fit(learner(quiet, first), Checkpoint(tmp_path/'c'), StopAfterFirst(), n=2)
    assert_equal(fit(learner(quiet, second), Resume(tmp_path/'c'), n=2), fit(learner(quiet), n=2))

@pytest.mark.slow
def test_inductor(quiet):
    plain,compiled = fit(learner(quiet)),fit(learner(quiet, encoder, 'inductor'))
    h = [extract_features(o, o.dls.valid)[0] for o in (plain,compiled)]
    assert h[0].shape == h[1].shape and torch.nn.functional.cosine_similarity(*h).min() > .99
