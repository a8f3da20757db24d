"The encoder file loads into stock models and gives the features of the live one; nothing in a file is executed."
import json
import pickle

import pytest
import safetensors
import torch
import torchvision
from torch import nn

from clae_fastai.all import clae_learner, extract_features, get_dls, load_encoder, resnet18

@pytest.fixture(scope='module')
def learn(digits_dir):
    learn = clae_learner(get_dls('folder', digits_dir/'rgb', bs=32, size=16, limit=64), resnet18)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def test_stock_torchvision_model(learn, tmp_path):
    f = learn.export_encoder(tmp_path/'encoder.safetensors')
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.conv1,model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False),nn.Identity()
    model.load_state_dict(safetensors.torch.load_file(f), strict=True)
    h,_ = extract_features(learn, learn.dls.valid)
    with safetensors.safe_open(f, 'pt') as s: head = s.metadata()
    mean,std = (torch.tensor(json.loads(head[k])).view(-1,1,1) for k in ('mean','std'))
    x = torch.cat([b[0] for b in learn.dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): torch.testing.assert_close(model.eval()((x - mean)/std), h, rtol=0, atol=1e-5)
    assert set(head) == {'format','arch','stem','channels','size','mean','std','method','version'} and head['stem'] == 'cifar' and head['arch'] == 'resnet18'
    torch.testing.assert_close(extract_features(load_encoder(f), [((x - mean)/std,)])[0], h, rtol=0, atol=1e-5)

class Bomb:
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return open, (self.file, 'w')

def test_a_pickle_is_not_executed(tmp_path):
    f,out = tmp_path/'encoder.safetensors',tmp_path/'boom'
    for dump in (lambda: f.write_bytes(pickle.dumps(Bomb(out))), lambda: torch.save(Bomb(out), f)):
        dump()
        with pytest.raises(ValueError, match='pickles'): load_encoder(f)
        assert not out.exists()
