"Sets of images know their files: whichever way images come into a set, each is that of its file, decoded once more."
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from clae_fastai.all import ImageItem, MemoryImages, get_dls, sample_items

from layouts import image, tinyimagenet

def check(ds, n=None):
    "Does each image have the pixels of its file, and is each file there once?"
    assert len(ds.files) == len(ds) == (n or len(ds)) and len({*ds.files}) == len(ds)
    for f,x in zip(ds.files, ds): assert np.array_equal(x[0].permute(1,2,0), Image.open(f).convert('RGB')), f

def folder(root, n, size=(8,8), layout='flat'):
    for i in range(n):
        image(root/{'flat': '', 'classes': f'class{i%3}', 'parts': ('train','test')[i%4 == 0]}[layout]/f'{i}.png',
              i, size)
    return root

@pytest.mark.parametrize('layout', ['flat','classes','parts'])
@pytest.mark.parametrize('n,size', [(40,(8,8)), (1010,(8,8)), (12,(70,70))],
                         ids=['small','kept beside them','in files'])
def test_folders(tmp_path, n, size, layout):
    folder(tmp_path, n, size, layout)
    for kwargs in ({}, dict(limit=6), dict(seed=1)):
        dls = get_dls(tmp_path, bs=2, num_workers=0, **kwargs)
        for dl in dls.loaders: check(dl.dataset)
        train,valid = (set(ds.files) for ds in (dls.train_ds,dls.valid_ds))
        assert valid and not train & valid and (len(train | valid) == n or kwargs.get('limit') == len(train))

def test_ways_of_a_set(tmp_path):
    "Samples, subsets, pickles, the copy on a device, other images by their paths or as items"
    items = [ImageItem(f, 'ab'[int(f.stem)%2]) for f in sorted(folder(tmp_path, 30).iterdir())[::-1]]
    ds = MemoryImages.from_items(items, ['a','b'])
    check(ds, 30)
    check(sample_items(ds, 7, 0), 7)
    for idxs in ([3,1,2], slice(4,20,3), np.array([9,0]), torch.arange(30)%4 == 0): check(ds.take(idxs))
    check(pickle.loads(pickle.dumps(ds.take([2,1]))), 2)
    on = ds.on('meta')
    assert on is not ds and on.files == ds.files
    check(ds.like([str(tmp_path/'4.png'), tmp_path/'2.png']), 2)
    check(ds.like(items[:5]), 5)
    assert ds.like([ds.images[0]]).files is None and ds.like([tmp_path/'4.png', ds.images[0]]).files is None

def test_the_catalogue(tmp_path):
    "Read from files, and from the cache"
    tinyimagenet(tmp_path)
    for _ in range(2):
        for dl in get_dls('tinyimagenet', tmp_path, bs=2, download=False).loaders: check(dl.dataset)
    assert get_dls('digits', bs=2).train_ds.files is None
