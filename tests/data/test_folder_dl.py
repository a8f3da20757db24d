"All images of a folder in one loader: their order, and the pixels that `folder_dls` gives in validation."
import shutil

import numpy as np
import pytest
import torch
from fastai.vision.all import tuplify
from PIL import Image

from clae_fastai.all import MemoryImages, folder_dl, folder_dls, get_dls

from layouts import image

def pixels(*dls):
    "`{name: pixels}` as in validation"
    out = {}
    for dl in dls:
        dl = dl.new(shuffle=False, drop_last=False)
        dl.dataset.split_idx = 1
        x = torch.cat([b[0].as_subclass(torch.Tensor) for b in dl])
        assert len(x) == len(dl.dataset.files)
        out |= dict(zip(dl.dataset.files, x))
    return out

def deep(file, seed, size):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 4000, size[::-1], dtype=np.uint16)).save(file)

def turned(file, seed, size):
    exif = Image.Exif()
    exif[0x112] = 1 + seed%8
    image(file, seed, size)
    Image.open(file).save(file, exif=exif)

kinds = {
    'small': ('png', image, (20,12), {}),
    'small, resized': ('png', image, (20,12), dict(size=(24,30))),
    'small, as grey': ('jpg', image, (20,12), dict(channels=1, size=32)),
    'small, 16 bits': ('png', deep, (16,16), dict(value_range=(0,5000))),
    'photographs': ('jpg', image, (150,90), dict(size=32)),
    'photographs, as grey': ('jpg', image, (150,90), dict(size=(40,32), channels=1)),
    'photographs, turned': ('jpg', turned, (150,90), dict(size=32)),
    '16 bits': ('png', deep, (100,100), dict(size=40)),
    'transparent': ('png', lambda f, i, s: image(f, i, s, 'RGBA') or Image.open(f).putalpha(9*i), (20,12),
                    dict(background='navy'))}

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('layout', ['{i}','{c}/{i}','{part}/{c}/{i}'], ids=['flat','classes','parts'])
def test_pixels_of_validation(tmp_path, kind, layout):
    suffix,write,size,kwargs = kinds[kind]
    for i in range(20):
        write(tmp_path/f"{layout.format(i=i, c='ab'[i%2], part=('train','test')[i%5 == 0])}.{suffix}", i, size)
    want = pixels(*folder_dls(tmp_path, bs=4, num_workers=0, **kwargs).loaders)
    dl = folder_dl(tmp_path, bs=7, num_workers=0, **kwargs)
    got = pixels(dl)
    assert len(want) == 20 and got.keys() == want.keys() and all(torch.equal(got[f], want[f]) for f in want)
    assert all(b[0].device.type == 'cpu' and len(b) == 1 for b in dl)

@pytest.mark.parametrize('sides,size,middle', [
    ((20,12), 16, (4,0,16,12)), ((12,20), (10,24), (0,7,12,12)), ((18,18), (9,12), (0,2,18,16))])
def test_other_images_change_none(tmp_path, sides, size, middle):
    "A small image of another shape than is asked for is cropped: alone, among others, and by a loader of other files"
    for i in range(3): image(tmp_path/'a'/f'{i}.png', i, sides)
    alone = pixels(folder_dl(tmp_path/'a', size=size))
    image(tmp_path/'b'/'z.png', 9, (40,40))
    for o in alone: shutil.copy(o, tmp_path/'b')
    among = pixels(folder_dl(tmp_path/'b', size=size))
    assert all(torch.equal(x, among[tmp_path/'b'/f.name]) for f,x in alone.items())
    h,w = tuplify(size, match=(0,0))
    small = MemoryImages(torch.zeros(4, 3, h, w, dtype=torch.uint8))
    cut = [Image.open(o).crop(middle) for o in alone]
    assert torch.equal(small.like([*alone]).images, small.like(cut).images)

def test_order_of_names(tmp_path):
    "That of the whole name as text, links and folders in folders, too"
    names = 'a-b/1.png', 'a/10.png', 'a/9.png', 'a.png', 'A/z.png', 'test/1.png', 'train/x/y/1.png', 'é.png'
    for i,name in enumerate(names): image(tmp_path/name, i, (8,8))
    dl = folder_dl(tmp_path)
    assert [f.relative_to(tmp_path).as_posix() for f in dl.files] == sorted(names)
    assert torch.equal(next(iter(dl))[0][0], torch.tensor(np.array(Image.open(dl.files[0]))).permute(2,0,1)/255)

def test_what_is_said(tmp_path):
    "As `folder_dls` says it; damaged files are an error, or are left out"
    for i in range(6): image(tmp_path/f'{i}.png', i, (8,8))
    deep(tmp_path/'7.png', 0, (8,8))
    (tmp_path/'notes.txt').write_text('x')
    ways = [lambda **k: folder_dls(tmp_path, bs=2, **k).notes, lambda **k: folder_dl(tmp_path, **k).notes]
    for value_range,words in ((None, 'Scaled from the range 0 to 4095'), ((0,5000), 'Left out, as no images')):
        a,b = (way(channels=3, value_range=value_range) for way in ways)
        assert words in ' '.join(b) and b[0] == f'{tmp_path}: 7 images.'
        assert set(b[1:]) == {o for o in a[1:] if not o.startswith('Held out')}
    (tmp_path/'bad.png').write_text('x')
    bad = ({}, dict(channels=3, value_range=(0,9), skip_bad=True), dict(skip_bad=True),
           dict(channels=3, background='none'))
    for kwargs in bad:
        errors = []
        for way in ways:
            with pytest.raises(ValueError) as e: way(**kwargs)
            errors.append(str(e.value))
        assert errors[0] == errors[1]
    assert any('bad.png' in o for o in ways[1](channels=3, skip_bad=True))
    for path,error in ((tmp_path/'none', FileNotFoundError), (tmp_path/'1.png', ValueError),
                       (tmp_path/'empty', FileNotFoundError)):
        (tmp_path/'empty').mkdir(exist_ok=True)
        messages = []
        for f in (folder_dls, folder_dl):
            with pytest.raises(error) as e: f(path)
            messages.append(str(e.value))
        assert messages[0] == messages[1]

def read(file): return np.load(file) if file.suffix == '.npy' else None

def test_a_function_that_reads(tmp_path):
    for i in range(4): np.save(tmp_path/f'{i}.npy', np.full((8,8,5), i, np.uint8))
    (tmp_path/'about.txt').write_text('x')
    dl = folder_dl(tmp_path, read=read)
    assert ([f.name for f in dl.files] == ['0.npy','1.npy','2.npy','3.npy'] and
            (next(iter(dl))[0][:,0,0,0]*255).tolist() == [0,1,2,3])
    assert any('1 of 5 files' in o for o in dl.notes)

def test_few_in_memory(tmp_path):
    "Images are read when they are asked for, and no file is written but that of what was checked"
    for i in range(1100): image(tmp_path/f'{i}.png', i, (8,8))
    folder_dl(tmp_path)
    assert {f.name for f in tmp_path.iterdir() if f.suffix != '.png'} == {'.clae-checked.json'}
    a,b = (dict(zip(dl.dataset.files, dl.dataset)) for dl in (folder_dl(tmp_path), get_dls(tmp_path, bs=2).train))
    assert all(torch.equal(a[f][0], b[f][0]) for f in b)
