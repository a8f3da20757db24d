"""Encoder files and checkpoints that are damaged, made up, or of a training that went wrong:
refused, and nothing is built or changed."""
import json
import resource

import pytest
import safetensors.torch
import torch
from fastai.vision.all import Callback, CancelFitException, nn

from clae_fastai.all import (
    Checkpoint, Resume, checkpoints, clae_learner, create_encoder, get_dls, load_checkpoint, load_encoder, plain_state,
    read_encoder, read_weights, resnet8, save_checkpoint, write_safetensors)

def learner(limit=64): return clae_learner(get_dls('digits', bs=32, limit=limit), resnet8, views='digits')

@pytest.fixture(scope='module')
def encoder_file(tmp_path_factory):
    return learner().export_encoder(tmp_path_factory.mktemp('encoder')/'encoder.safetensors')

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(b[k], v) for k,v in a.items())

# one bit

@pytest.mark.parametrize('where', ['anywhere','header'])
def test_any_bit(encoder_file, tmp_path, where):
    "200 random ones, and as many of the header: refused, or it was one that nothing hangs on"
    whole,state = encoder_file.read_bytes(),read_encoder(encoder_file)[0]
    n = len(whole) if where == 'anywhere' else 8 + int.from_bytes(whole[:8], 'little')
    (f := tmp_path/'e.safetensors').write_bytes(whole)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        at,bit = (int(torch.randint(k, (), generator=draw)) for k in (n,8))
        f.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at+1:])
        for read in (load_encoder, lambda f: read_encoder(f)[0], read_weights):
            try: got = read(f)
            except ValueError as e: assert f.name in str(e)
            else: assert equal(state, plain_state(got) if isinstance(got, nn.Module) else got), (at,bit)

def test_every_bit_of_the_checksum_s_name(encoder_file, tmp_path):
    whole = encoder_file.read_bytes()
    at = whole.index(b'"digest"') + 1
    f = tmp_path/'e.safetensors'
    for byte in range(6):
        for bit in range(8):
            f.write_bytes(whole[:at+byte] + bytes([whole[at+byte] ^ 1 << bit]) + whole[at+byte+1:])
            with pytest.raises(ValueError, match=f.name): load_encoder(f)

# what it says

def write(file, state, **header):
    "As version 0.1.0 did, without a checksum"
    header = dict(dict(format='clae-encoder-1', version='0.1.0', arch='resnet8', stem='cifar', channels=1,
                       size=[16,16]), **header)
    safetensors.torch.save_file(state, file, {k: v if isinstance(v, str) else json.dumps(v) for k,v in header.items()})
    return file

def test_a_checksum_is_missed(tmp_path):
    state = plain_state(create_encoder('resnet8', 'cifar', 1))
    load_encoder(write(tmp_path/'e.safetensors', state))
    for version in ('0.2.0', '0.10.0', '1.0.1', ''):
        with pytest.raises(ValueError, match='checksum'):
            load_encoder(write(tmp_path/'e.safetensors', state, version=version))

@pytest.mark.parametrize('arch', ['vit_h_14','regnet_y_128gf','vit_giant_patch14_clip_224','swinv2_cr_giant_384',
                                  'convnext_xxlarge'])
def test_giants(tmp_path, arch):
    "A few bytes that name an architecture of gigabytes"
    if arch not in ('vit_h_14','regnet_y_128gf'): pytest.importorskip('timm')
    f = write(tmp_path/'e.safetensors', {'conv1.weight': torch.zeros(4,3,3,3)}, arch=arch)
    # all is imported
    load_encoder(write(tmp_path/'small.safetensors', plain_state(create_encoder('resnet8', 'cifar', 1))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match='e.safetensors cannot be loaded. .*far more weights'): load_encoder(f)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 # kB

def test_many_channels(tmp_path):
    "The first layer of a network for 9,999 channels is large, too"
    f = write(tmp_path/'e.safetensors', {'conv1.weight': torch.zeros(4,3,3,3)}, arch='resnet18', stem='imagenet',
              channels=9999)
    with pytest.raises(ValueError, match='far more weights'): load_encoder(f)

archs = ['resnet8','resnet18','googlenet','inception_v3','mobilenet_v3_small','regnet_y_400mf','shufflenet_v2_x0_5',
         'squeezenet1_1','swin_t','mnasnet0_5','efficientnet_b0','convnext_tiny','densenet121','vit_b_32','maxvit_t']
timms = ['vit_tiny_patch16_224','resnet10t','efficientvit_b0','swinv2_cr_tiny_224','levit_128s',
         'mobilenetv4_conv_small','xcit_nano_12_p16_224']

@pytest.mark.parametrize('arch', archs + timms)
def test_all_kinds_are_built(tmp_path, arch):
    "What is counted while they are built does not keep them from it"
    if arch in timms: pytest.importorskip('timm')
    encoder = create_encoder(arch, 'cifar' if arch == 'resnet8' else 'imagenet', 2)
    f = write(tmp_path/'e.safetensors', plain_state(encoder), arch=arch, channels=2,
              stem='cifar' if arch == 'resnet8' else 'imagenet')
    assert equal(plain_state(encoder), plain_state(load_encoder(f)))

# what it holds

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers(encoder_file, tmp_path, value):
    "Neither written nor read; the tensor is named"
    learn,(state,info) = learner(),read_encoder(encoder_file)
    with torch.no_grad(): learn.model.encoder.layer1[0].conv1.weight[0,0,0,0] = value
    with pytest.raises(ValueError, match='layer1.0.conv1.weight.*lower learning rate'):
        learn.export_encoder(tmp_path/'e.safetensors')
    assert not list(tmp_path.iterdir())
    state['bn1.running_var'][3] = value
    header = {k: v if isinstance(v, str) else json.dumps(v) for k,v in info.items()}
    write_safetensors(f := tmp_path/'e.safetensors', state, 'clae-encoder-1', **header)
    for read in (read_encoder, load_encoder, lambda f: clae_learner(learn.dls, resnet8, views='digits', weights=f)):
        with pytest.raises(ValueError, match='e.safetensors has weights that are not finite, .* bn1.running_var'):
            read(f)

# checkpoints

class Counter(Callback):
    checkpoint_attrs = 'n',
    n,secret = 0,'own'
    def after_batch(self): self.n += 1

class Stop(Callback):
    order = Checkpoint.order + 1
    def after_epoch(self): raise CancelFitException

def saved(tmp_path, quiet):
    quiet(learner()).fit(2, cbs=[Checkpoint(tmp_path/'c'), Counter(), Stop()])
    return checkpoints(tmp_path/'c')[-1]

@pytest.mark.parametrize('name,attr', [('Counter','secret'), ('Counter','after_batch'), ('Counter','learn'),
                                       ('Recorder','after_batch'), ('CLAECallback','attack'),
                                       ('TrainEvalCallback','run'), ('Checkpoint','folder')])
def test_callbacks_get_what_they_declare(tmp_path, quiet, name, attr):
    "And nothing else that a file may hold"
    file = saved(tmp_path, quiet)
    state = load_checkpoint(file)
    memory = next(memory for n,memory in state['callbacks'] if n == name)
    memory[attr] = 'other'
    save_checkpoint(file, state)
    with pytest.raises(ValueError, match=f'would set {attr} of {name}'):
        quiet(learner()).fit(2, cbs=[Resume(tmp_path/'c'), Checkpoint(tmp_path/'c'), Counter()])

def test_callbacks_get_all_that_they_declare(tmp_path, quiet):
    saved(tmp_path, quiet)
    learn = quiet(learner())
    learn.fit(2, cbs=[Resume(tmp_path/'c'), Checkpoint(tmp_path/'c'), counter := Counter()])
    assert counter.n == 2*sum(map(len, learn.dls.loaders)) and len(learn.recorder.values) == 2
