"ONNX files give what the encoder gives, from normalised images and from bytes, of its own size and others."
import warnings

import numpy as np
import pytest
import torch
from fastai.vision.all import Normalize

from clae_fastai.all import MemoryImages, clae_learner, export_onnx, extract_features, memory_dls

ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

def images(size):
    return MemoryImages(torch.randint(256, (5,3,*size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))

@pytest.fixture(scope='module', params=['resnet8','resnet18','mobilenet_v3_small','vit_tiny_patch16_224'])
def trained(request, tmp_path_factory):
    if request.param[:3] == 'vit': pytest.importorskip('timm')
    size = (224,224) if request.param[:3] == 'vit' else (32,48)
    torch.manual_seed(0)
    data = images(size)
    dls = memory_dls(data, data.take([]), bs=2, batch_tfms=Normalize.from_stats([.4]*3, [.2]*3, cuda=False))
    learn = clae_learner(dls, request.param)
    file = tmp_path_factory.mktemp('onnx')/'x.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning) # such as that the model is in training mode
        export_onnx(learn, file, with_preprocessing=True)
    return request.param,learn,size,ort.InferenceSession(file)

def test_from_bytes(trained):
    arch,learn,size,session = trained
    for size in (size,) if arch[:3] == 'vit' else (size, (64,40)):
        data = images(size)
        x = data.images.permute(0,2,3,1).numpy()
        right = extract_features(learn, memory_dls(data, data.take([]), bs=2).train)[0]
        for n in (1,5):
            np.testing.assert_allclose(session.run(None, dict(images=x[:n]))[0], right[:n], rtol=0, atol=1e-4)

def test_on_the_command_line(cli, digits_dir):
    r = cli('clae_train', '--path', digits_dir/'rgb', '--arch', 'resnet8', '--bs', 8, '--limit', 16, '--epochs', 1,
            '--name', 'x')
    assert r.returncode == 0, r.stderr
    r = cli('clae_export', 'x', '--format', 'onnx', '--with-preprocessing', '--out', 'x.onnx')
    assert r.returncode == 0, r.stderr
    session = ort.InferenceSession(cli.cwd/'x.onnx')
    assert session.get_inputs()[0].type == 'tensor(uint8)'
    assert session.run(None, dict(images=np.zeros((3,16,16,3), np.uint8)))[0].shape == (3,64)
    r = cli('clae_export', 'x', '--with-preprocessing', '--out', 'y.safetensors')
    assert r.returncode == 2 and 'Only ONNX' in r.stderr and not (cli.cwd/'y.safetensors').exists()
