"The encoder file loads into stock models and gives the features of the live one; nothing in a file is executed."
import json
import pickle

import pytest
import safetensors
import torch
import torchvision
from torch import nn

from clae_fastai.all import clae_learner, extract_features, get_dls, load_encoder, read_encoder, resnet8, resnet18

@pytest.fixture(scope='module')
def learn(digits_dir):
    learn = clae_learner(get_dls('folder', digits_dir/'rgb', bs=32, size=16, limit=32, num_workers=0), resnet18)
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
    assert set(head) == {'format','arch','stem','channels','size','mean','std','method','version','digest'}
    assert (head['format'],head['stem'],head['arch']) == ('clae-encoder-1','cifar','resnet18')
    again = load_encoder(f)
    with torch.no_grad(): torch.testing.assert_close(again((x - mean)/std), h, rtol=0, atol=1e-5)
    torch.testing.assert_close(extract_features(again, [(x,)])[0], h, rtol=0, atol=1e-5) # it knows how

class Bomb:
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return open, (self.file, 'w')

def test_a_pickle_is_not_executed(tmp_path):
    f,out = tmp_path/'encoder.safetensors',tmp_path/'boom'
    for dump in (lambda: f.write_bytes(pickle.dumps(Bomb(out))), lambda: torch.save(Bomb(out), f)):
        dump()
        with pytest.raises(ValueError, match='pickles'): load_encoder(f)
        assert not out.exists()
    pickle.loads(pickle.dumps(Bomb(out))).close()
    assert out.exists() # where it is executed

def test_a_changed_byte_is_seen_and_old_files_are_read(digits_dir, tmp_path):
    f = clae_learner(get_dls('digits', bs=32, limit=64), resnet8, views='digits').export_encoder(
        tmp_path/'encoder.safetensors')
    state,info = read_encoder(f)
    whole = bytearray(f.read_bytes())
    for at in (len(whole)//2, len(whole) - 1, whole.index(b'simclr')): # in a tensor, and in the header
        f.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at+1:])
        with pytest.raises(ValueError, match='checksum'): load_encoder(f)
    header = {k: v if isinstance(v, str) else json.dumps(v) for k,v in info.items()}
    safetensors.torch.save_file(state, f, dict(header, format='clae-encoder-1', version='0.1.0')) # without a checksum
    old,told = read_encoder(f)
    assert told == dict(info, version='0.1.0') and all(torch.equal(old[k], v) for k,v in state.items())
    assert load_encoder(f).info == told
