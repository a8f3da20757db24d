"Images in memory are what fastai expects; the cache is never wrong; files that could be read are remembered."
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import RandTransform, TensorImageBase
from PIL import Image
from safetensors import SafetensorError

from clae_fastai.all import (
    MemoryImages, Normalize, TensorCategory, accuracy, cached_images, check_images, check_regular, clae_learner,
    extract_features, get_dls, get_image_files, load_learner, resnet8, resnet18, vision_learner)

from layouts import cifar10, image

def test_fastai_finds_what_it_expects(tmp_path, quiet):
    dls = get_dls('digits', bs=64, limit=256)
    dls.show_batch(max_n=4)
    dls.show_batch(unique=True)
    learn = quiet(clae_learner(dls, resnet8, views='digits'))
    learn.fit(1)
    learn.validate()
    learn.show_views(2)
    z,y = learn.get_preds()
    assert torch.equal(y.as_subclass(torch.Tensor), dls.valid_ds.labels)
    assert learn.predict(dls.valid_ds[0][0])[2].shape == (64,) # the embedding
    dls.add_tfms([Normalize.from_stats([.5],[.5], cuda=False)], 'after_batch')
    sup = quiet(vision_learner(dls, resnet18, n_in=1, pretrained=False, metrics=accuracy, normalize=False))
    sup.fit(1)
    sup.export(tmp_path/'x.pkl')
    assert (tmp_path/'x.pkl').stat().st_size < 60e6
    assert len(pickle.dumps(dls.new_empty())) < 20_000 < dls.train_ds.images.nbytes, 'the images are in the pickle'
    im = dls.valid_ds.images[0]
    name,i,p = sup.predict(im)
    assert name == dls.vocab[i]
    assert quiet(load_learner(tmp_path/'x.pkl')).predict(Image.fromarray(im[0].numpy()))[0] == name
    assert isinstance(dls.one_batch()[1], TensorCategory)

def test_validation_sees_no_augmentation():
    "Images in memory: random transforms act in training and not in validation, wherever the images come from"
    class Shift(RandTransform):
        order = 20 # after the images have become floats
        def encodes(self, x:TensorImageBase): return x + 1.
    dls = get_dls('digits', bs=32, limit=128, batch_tfms=Shift())
    raw = get_dls('digits', bs=32, limit=128)
    assert dls.train.one_batch()[0].min() >= 1
    assert torch.equal(dls.valid.one_batch()[0], raw.valid.one_batch()[0])
    assert torch.equal(dls.test_dl([dls.valid_ds.images[0]]).one_batch()[0][0], raw.valid_ds.images[0]/255)
    model = torch.nn.Flatten()
    assert torch.equal(extract_features(model, dls.train)[0], extract_features(model, raw.train)[0])
    assert dls.train_ds.split_idx == 0 # as it was

# the cache

def test_a_cache_that_cannot_be_kept(tmp_path, capsys, monkeypatch):
    "As on a read-only disk"
    cifar10(tmp_path)
    def _refuse(*_, **__): raise SafetensorError('Read-only file system (os error 30)')
    monkeypatch.setattr('safetensors.torch.save_file', _refuse)
    assert len(get_dls('cifar10', tmp_path, bs=2, download=False).train_ds) == 20
    out = capsys.readouterr().out
    assert 'could not be kept' in out and '.clae-images.safetensors' in out and 'os error 30' in out

def test_damaged_caches_are_read_anew(tmp_path):
    "A bit changed at a random place, or the end cut off: never other images, never an error"
    source,cache,draw = tmp_path/'a.bin',tmp_path/'.clae-images.safetensors',np.random.default_rng(3)
    source.write_bytes(b'pixels')
    def make(n): return MemoryImages(torch.randint(256, (n,3,8,8), dtype=torch.uint8), torch.arange(n)%2, ['a','b'])
    train,valid = make(6),make(4)
    reads = []
    def read():
        reads.append(1)
        return train,valid
    def check(expected_reads):
        a,b = cached_images(tmp_path, [source], read)
        assert torch.equal(a.images, train.images) and torch.equal(b.images, valid.images)
        assert torch.equal(a.labels, train.labels) and list(b.vocab) == ['a','b']
        assert len(reads) == expected_reads
    for _ in range(2): check(1)
    whole = cache.read_bytes()
    for n in range(5):
        bad = bytearray(whole)
        if n == 0: bad = bad[:-10]
        else: bad[draw.integers(len(bad))] ^= 1 << int(draw.integers(8))
        cache.write_bytes(bad)
        check(n+2)
        check(n+2)
    source.write_bytes(b'others')
    check(7)

# what was readable is remembered

@pytest.fixture
def opened(monkeypatch):
    "Names of the images that PIL opens, as it does"
    names,open_ = [],Image.open
    def _open(f, *args, **kwargs):
        names.append(Path(f).name)
        return open_(f, *args, **kwargs)
    monkeypatch.setattr(Image, 'open', _open)
    return names

def check(folder, **kwargs): return check_images(get_image_files(folder).sorted(), folder, **kwargs)

def test_readable_images_are_remembered(tmp_path, opened):
    "Only what is new, has changed, or could not be read is decoded when a folder is used again"
    def decoded(**kwargs):
        opened.clear()
        files,infos,_ = check(tmp_path, **kwargs)
        names = sorted(set(opened))
        for f,o in zip(files, infos):
            with Image.open(f) as im: assert (im.size,len(im.getbands())) == ((o.width,o.height),o.channels)
        return names,len(files)
    for i in range(6): image(tmp_path/f'{i}.png', i)
    assert decoded() == ([f'{i}.png' for i in range(6)], 6)
    assert decoded() == ([], 6)
    image(tmp_path/'6.png', 6)
    image(tmp_path/'2.png', 7, (50,30))
    assert decoded() == (['2.png','6.png'], 7)
    (tmp_path/'3.png').write_bytes((tmp_path/'3.png').read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(ValueError, match='3.png'): decoded()
        assert opened == ['3.png']
    assert decoded(skip_bad=True) == (['3.png'], 6)
    (tmp_path/'3.png').unlink()
    assert decoded() == ([], 6)
    memo = json.loads((tmp_path/'.clae-checked.json').read_text())
    assert sorted(memo['images']) == [f'{i}.png' for i in (0,1,2,4,5,6)]

@pytest.mark.parametrize('memo', [b'', b'\xff', b'[]', b'{}', b'[' * 100_000, b'{"format": "clae-checked-3"}',
                                  b'{"format": "clae-checked-3", "background": "white", "images": [1]}',
                                  b'{"format": "clae-checked-1", "images": {}}'])
def test_a_damaged_memory_is_none(tmp_path, opened, memo):
    for i in range(3): image(tmp_path/f'{i}.png', i)
    (tmp_path/'.clae-checked.json').write_bytes(memo)
    for _ in range(2): assert len(check(tmp_path)[0]) == len(set(opened)) == 3

def test_damaged_entries_are_none(tmp_path, opened):
    "Entries with the right stamp, and nonsense behind it"
    file = tmp_path/'0.png'
    image(file, 0)
    stamp = [*check_regular(file)]
    right = [40,30,3,'uint8',0.,255.,False,False,False,1]
    def found(entry, background='white'):
        "Sizes and whether the image is opened, where `entry` is remembered"
        opened.clear()
        memo = dict(format='clae-checked-3', background=background, images={'0.png': entry})
        (tmp_path/'.clae-checked.json').write_text(json.dumps(memo))
        return [(o.width,o.height) for _ in range(2) for o in check(tmp_path)[1]],bool(opened)
    for rest in ([], right[:-1], [*right, 1], [*right[:-1], True], [[], *right[1:]], [40., *right[1:]],
                 [*right[:4], 0, *right[5:]]):
        assert found(stamp + rest) == ([(40,30)]*2, True), rest
    assert found(1) == ([(40,30)]*2, True)
    assert found([*stamp, 7, 8, *right[2:]], 'black') == ([(40,30)]*2, True) # seen on another ground
    assert found([*stamp, 7, 8, *right[2:]]) == ([(7,8)]*2, False) # a whole one is believed
