"Weights of other tools begin a training, and give the features that they gave; what is no weights is an error."
import pytest
import torch
import torchvision
from fastai.vision.all import nn, resnet18, resnet34
from lightly.models.modules import SimCLRProjectionHead
from torchvision.models import ResNet18_Weights

from clae_fastai.all import MemoryImages, clae_learner, create_encoder, extract_features, load_encoder, memory_dls

def dls(n_in=3, size=80):
    images = MemoryImages(torch.randint(256, (8,n_in,size,size), dtype=torch.uint8))
    return memory_dls(images, images.take([]), bs=4)

@pytest.fixture(scope='module')
def original():
    "A trained-looking ResNet-18: no statistic is what it is at the start"
    torch.manual_seed(0)
    net = torchvision.models.resnet18().train()
    with torch.no_grad():
        for _ in range(3): net(torch.rand(8, 3, 64, 64))
    return net.eval()

def features(net, x):
    with torch.no_grad(): return nn.Sequential(*list(net.children())[:-1])(x).flatten(1)

class LightlySimCLR(nn.Module):
    "As in lightly's documentation"
    def __init__(self, net):
        super().__init__()
        self.backbone = nn.Sequential(*list(net.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

def moco(net, query='encoder_q', key='encoder_k'):
    both = {f'module.{p}.{k}': v for p in (query,key) for k,v in net.state_dict().items()}
    return dict(epoch=3, arch='resnet18', state_dict={**both, 'module.queue': torch.zeros(128, 16)},
                optimizer=dict(state={}))

def solo(net):
    return dict(state_dict={**{f'backbone.{k}': v for k,v in net.state_dict().items() if k[:3] != 'fc.'},
        'projector.0.weight': torch.zeros(8, 512), 'classifier.weight': torch.zeros(10, 512)}, global_step=7)

layouts = {
    'torchvision': (lambda net: net.state_dict(), "left out 2 of 122 tensors, fc.bias, fc.weight"),
    'DistributedDataParallel': (lambda net: nn.DataParallel(net).state_dict(), "taken from behind 'module.'"),
    'torch.compile': (lambda net: torch.compile(net, backend='eager').state_dict(), "taken from behind '_orig_mod.'"),
    'lightly': (lambda net: LightlySimCLR(net).state_dict(), "taken from behind 'backbone.'"),
    'lightly, by Lightning': (lambda net: dict(state_dict=LightlySimCLR(net).state_dict(), epoch=1), "projection_head"),
    'a backbone of lightly': (lambda net: LightlySimCLR(net).backbone.state_dict(), ''),
    'solo-learn': (solo, "left out 2 of 122 tensors, classifier.weight, projector.0.weight"),
    'MoCo': (moco, "taken from behind 'module.encoder_q.'"),
    'MoCo v3': (lambda net: moco(net, 'base_encoder', 'momentum_encoder'), "taken from behind 'module.base_encoder.'"),
    'a head before': (lambda net: dict(model={f'encoder.{k}': v for k,v in net.state_dict().items()}),
                      "taken from behind 'encoder.'")}

@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('suffix', ['.pth','.safetensors',''])
def test_other_tools_weights(original, layout, suffix, tmp_path, capsys):
    make,says = layouts[layout]
    state = make(original)
    if suffix == '.pth': torch.save(state, tmp_path/'x.pth')
    if suffix == '.safetensors':
        from safetensors.torch import save_file
        save_file({k: v.clone() for k,v in state.get('state_dict', state.get('model', state)).items()},
                  tmp_path/'x.safetensors')
    learn = clae_learner(dls(), resnet18, weights=tmp_path/f'x{suffix}' if suffix else state)
    out = capsys.readouterr().out
    assert says in out and bool(out) == bool(says)
    x = torch.rand(2, 3, 80, 80)
    with torch.no_grad():
        torch.testing.assert_close(learn.model.encoder.eval()(x), features(original, x), atol=1e-6, rtol=1e-6)

def test_a_stem_for_small_images_is_found(original):
    net = torchvision.models.resnet18()
    net.conv1,net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False),nn.Identity()
    # of 80 pixels, where the other stem is usual
    enc = clae_learner(dls(), resnet18, weights=solo(net)).model.encoder.eval()
    assert enc.conv1.kernel_size == (3,3) and isinstance(enc.maxpool, nn.Identity)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(enc(x), features(net.eval(), x))

def test_our_own_encoder_files_are_silent(original, tmp_path, capsys):
    learn = clae_learner(dls(), resnet18, weights=original.state_dict())
    file = learn.export_encoder(tmp_path/'e.safetensors')
    capsys.readouterr()
    again = clae_learner(dls(), resnet18, weights=file)
    assert not capsys.readouterr().out
    assert torch.equal(extract_features(again, learn.dls.train)[0], extract_features(learn, learn.dls.train)[0])

wrong = {
    'a module': (dict(weights=resnet18()), 'weights must be the name'),
    'True': (dict(weights=True), 'weights must be the name'),
    '1': (dict(weights=1), 'weights must be the name'),
    'a file that is not there': (dict(weights='mine.pth'), 'There is no file mine.pth'),
    'an unknown name': (dict(weights='IMAGENET22K'), "has no trained weights 'IMAGENET22K'"),
    'another architecture': (dict(weights=resnet34().state_dict()), 'do not fit the architecture'),
    'nothing of it': (dict(weights={'a': torch.zeros(1)}), 'do not fit the architecture'),
    'two encoders': (dict(weights={f'{p}.{k}': v for p in ('encoder','backbone')
                                   for k,v in resnet18().state_dict().items()}), 'several'),
    'two beginnings': (dict(weights={}, pretrained=True), 'two beginnings'),
    'pretrained, of a module': (dict(arch=create_encoder(resnet18), pretrained=True), 'A module is trained as it is'),
    "the library's, of a module": (dict(arch=create_encoder(resnet18), weights=ResNet18_Weights.DEFAULT),
                                   'A module is trained'),
    'pretrained by name': (dict(pretrained='mine.pth'), 'pretrained must be')}

@pytest.mark.parametrize('case', wrong)
def test_what_is_no_weights(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs,says = wrong[case]
    error = FileNotFoundError if 'no file' in says else ValueError
    with pytest.raises(error, match=says): clae_learner(dls(), **{'arch': resnet18, **kwargs})

def test_on_the_command_line(original, cli, digits_dir):
    torch.save(moco(original), cli.cwd/'moco.pth')
    args = ['--path', digits_dir/'rgb', '--arch', 'resnet18', '--bs', 8, '--limit', 16, '--epochs', 1]
    r = cli('clae_train', *args, '--weights', 'moco.pth', '--name', 'x', '--workers', 0)
    assert r.returncode == 0 and "taken from behind 'module.encoder_q.'" in r.stdout, r.stderr
    load_encoder(cli.cwd/'runs'/'x'/'encoder.safetensors')
    r = cli('clae_train', *args, '--weights', 'none.pth')
    assert r.returncode == 2 and 'There is no file' in r.stderr and 'none.pth' in r.stderr
