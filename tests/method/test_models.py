"Architectures of torchvision and timm: found by name, freed of their classifier, converted and given back."
import pytest
import timm
import torch
import torchvision
from torch import nn

from clae_fastai.all import (MemoryImages, clae_learner, convert_dual_bn, create_encoder, dual_bns, memory_dls,
    num_features, strip_dual_bn)

tv_names = [o for o in torchvision.models.list_models(module=torchvision.models)
            if 'regnet' not in o or o.endswith('400mf')]
ten = ['resnet18','resnet50','resnext50_32x4d','densenet121','mobilenet_v2','mobilenet_v3_small','efficientnet_b0',
       'shufflenet_v2_x1_0','vgg11_bn','googlenet']
five = ['resnet10t','efficientnet_lite0','regnetx_002','mobilenetv3_small_050','repvgg_a0']

@pytest.mark.parametrize('name', tv_names)
def test_every_torchvision_architecture(name):
    """By name; on the meta device, where a network costs nothing (RegNets read numbers from tensors
    as they are built: the smallest of either kind are built for real)"""
    with torch.device('cpu' if 'regnet' in name else 'meta'):
        enc = create_encoder(name)
        h = enc.train()(torch.zeros(2, 3, *[299 if 'inception' in name else 224]*2))
    assert isinstance(h, torch.Tensor) and h.shape[0] == 2 and h.shape[1] != 1000

@pytest.mark.parametrize('name', ten + five)
def test_strip_undoes_convert(name):
    enc = create_encoder(name).eval()
    state,x = {k: v.clone() for k,v in enc.state_dict().items()},torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        h = enc(x)
        dual = convert_dual_bn(enc)
        assert dual_bns(dual) and torch.equal(dual.eval()(x), h)
        back = strip_dual_bn(dual)
        assert torch.equal(back(x), h)
    assert list(back.state_dict()) == list(state) and all(torch.equal(state[k], v) for k,v in back.state_dict().items())

@pytest.mark.parametrize('name', five)
def test_timm_is_timm(name):
    "The state dict is that of timm's own model without classifier"
    assert list(create_encoder(name).state_dict()) == list(timm.create_model(name, num_classes=0).state_dict())
    assert num_features(create_encoder(name, n_in=4), 4) == timm.create_model(name).get_classifier().in_features

def test_shared_weights_of_a_state_dict():
    w = create_encoder('resnet18', stem='cifar').state_dict()
    enc = create_encoder('resnet18', weights=w, size=224)
    assert isinstance(enc.maxpool, nn.Identity) and all(torch.equal(w[k], v) for k,v in enc.state_dict().items())

@pytest.mark.parametrize('name,mean,std', [
    ('resnet18', .485, .229), ('efficientnet_v2_l', .5, .5), ('googlenet', .5, .5)])
def test_weights_bring_their_normalisation(monkeypatch, name, mean, std):
    "GoogLeNet would normalise once more, in a way that its file does not say"
    builder = getattr(torchvision.models, name)
    state = builder(**({'init_weights': False} if name == 'googlenet' else {})).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, 'get_state_dict', lambda *_, **__: dict(state))
    data = MemoryImages(torch.randint(256, (8,3,64,64), dtype=torch.uint8))
    learn = clae_learner(memory_dls(data, data.take(range(4)), bs=4), name, pretrained=True)
    assert [o[0].item() for o in learn.clae.stats] == pytest.approx([mean,std])
    assert not getattr(learn.model.encoder, 'transform_input', False)
