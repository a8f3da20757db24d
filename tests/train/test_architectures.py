"""Encoders of every architecture of torchvision, and of every family of timm, as files: written, read back,
and the same features. Those of more than 50 million parameters have names and shapes alone, as those are what could
be wrong."""
import pytest
import torch
import torchvision
from torchvision.models import get_model_weights, list_models

from clae_fastai.all import (
    MemoryImages, clae_learner, create_encoder, key_difference, load_encoder, memory_dls, plain_state)

timm = pytest.importorskip('timm')
pytestmark = pytest.mark.slow
families = { # the smallest model of each, by the size of its images
    128: '''
        convnext_atto cpubone_nano cspnext_tiny darknet17 dla34 dpn68 edgenext_xx_small efficientvim_m1 efficientvit_b0
        fasternet_t0 fastvit_t8 ghostnet_050 hardcorenas_b hgnetv2_b0 inception_next_atto lcnet_035 lcnetv2_small
        legacy_seresnet18 legacy_xception lowformer_b0 mobilevit_xxs pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m1
        resnest14d resnet18 resnetv2_18 rexnet_100 shvit_s1 skresnet18 starnet_s1 test_byobnet test_mambaout test_nfnet
        tinynet_d vovnet39a tresnet_m csatv2 densenet121 selecsls42 xception41p rdnet_tiny res2next50 hrnet_w18_small
        poolformerv2_s12 iformer_t nextvit_small convmixer_768_32''',
    160: '''
        test_coatnet test_vit test_vit_relpos''',
    224: '''
        coat_tiny convit_tiny deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0
        eva02_tiny_patch14_224 gcvit_xxtiny gmixer_12_224 levit_128 pit_xs_224 swiftformer_xs visformer_tiny
        vit_tiny_r_s16_p8_224 xcit_nano_12_p8_224 cait_xxs24_224 davit_tiny focalnet_tiny_srf hiera_tiny_224
        mvitv2_tiny nest_tiny sequencer2d_s swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tiny_vit_5m_224
        tnt_s_legacy_patch16_224 twins_svt_small vitamin_small_224 volo_d1_224''',
    240: '''
        crossvit_tiny_240''',
    256: '''
        eca_halonext26ts hieradet_small swinv2_tiny_window8_256''',
    299: '''
        inception_v4'''}
large_families = '''
    beit_base_patch16_224 deepseek_vit_412m gemma4_vit_167m inception_resnet_v2 mobilenetv5_base
    naflexvit_base_patch16_parfac_gap nasnetalarge pnasnet5large qwen3_vit_88m samvit_base_patch16_224
    vgg11'''.split() # whose smallest model is large

names = list_models(module=torchvision.models)
n_params = {o: get_model_weights(o).DEFAULT.meta['num_params'] for o in names}
# with values, when built; as the smaller ones
computing = 'regnet_x_16gf regnet_x_32gf regnet_y_16gf regnet_y_32gf regnet_y_128gf'.split()
sizes = dict(maxvit_t=224, inception_v3=96)

def same_features(arch, size, folder):
    images = MemoryImages(torch.randint(256, (4,3,size,size), dtype=torch.uint8))
    learn = clae_learner(memory_dls(images, images.take([]), bs=2), arch, views='plain', eps=0)
    encoder = learn.model.encoder.eval()
    with torch.no_grad():
        for p in encoder.parameters(): p.add_(torch.randn_like(p)*1e-3) # no number is what a new encoder has
    again,x = load_encoder(learn.export_encoder(folder/'e.safetensors')),torch.rand(2, 3, size, size)
    with torch.no_grad(): torch.testing.assert_close(again(x), encoder(x), rtol=0, atol=0)

@pytest.mark.parametrize('name', [o for o in names if n_params[o] <= 50e6])
def test_torchvision(name, tmp_path): same_features(name, sizes.get(name, 64), tmp_path)

def same_keys(name):
    with torch.device('meta'): a,b = create_encoder(name, n_in=3),create_encoder(name, n_in=3)
    assert not key_difference(plain_state(a), b)
    return sum(p.numel() for p in a.parameters())

@pytest.mark.parametrize('name', [o for o in names if n_params[o] > 50e6 and o not in computing])
def test_large_ones(name): assert same_keys(name) < n_params[name] # the classifier is gone

def in_this_timm(name):
    if name not in timm.list_models(): pytest.skip(f'this timm has no {name}')

@pytest.mark.parametrize('name,size', [(o,size) for size,some in families.items() for o in some.split()])
def test_timm(name, size, tmp_path):
    in_this_timm(name)
    same_features(name, size, tmp_path)

@pytest.mark.parametrize('name', large_families)
def test_large_ones_of_timm(name):
    in_this_timm(name)
    assert same_keys(name) > 50e6

@pytest.mark.skipif(timm.__version__ != '1.0.31', reason='the families of another timm')
def test_no_family_of_timm_is_missing():
    "Each module that defines models has one above; inception_v3 is torchvision's"
    module_of = timm.models._registry._model_to_module
    tested = {module_of.get(o) for some in (*map(str.split, families.values()), large_families) for o in some}
    assert {module_of[o] for o in timm.list_models()} - tested == {'inception_v3'}
