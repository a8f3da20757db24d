"Features of files: each row has the name of its image, by whichever way the image was read."
import csv
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Normalize, PILImage, Resize
from fastai.vision.all import get_image_files, parent_label, vision_learner
from PIL import Image

from clae_fastai.all import clae_learner, extract_features, folder_dl, folder_dls, resnet8, write_features
from clae_fastai.measure import features

def noise(size, dtype=np.uint8, top=256): return lambda i: np.random.default_rng(i).integers(0, top, size, dtype=dtype)

kinds = { # pixels, ending, options of the training, further ones of the command
    'small': (noise((20,20,3)), 'png', {}, []),
    'small, resized': (noise((12,20,3)), 'png', dict(size=24), []),
    'photographs': (noise((90,130,3)), 'jpg', dict(size=32), ['--workers', 2]),
    'grey': (noise((20,20)), 'png', {}, ['--bs', 5]),
    'in colour, read as grey': (noise((20,20,3)), 'jpg', dict(channels=1, size=24), []),
    '16 bits': (noise((20,20), np.uint16, 3000), 'png', dict(value_range=(0,5000)), []),
    'large, 16 bits': (noise((90,90), np.uint16, 3000), 'png', dict(value_range=(0,5000), size=32), [])}
layouts = {'flat': '{i}', 'classes': '{c}/{i}', 'parts': '{part}/{c}/{i}'}

def folder(root, pixels, suffix, layout, n=30):
    for i in range(n):
        file = root/f"{layout.format(i=i, c='ab'[i%2], part=('train','test')[i%5 == 0])}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(file)
    return root

def encoder(file, root, **kwargs):
    "A learner of a folder, not trained but for the statistics of its batch norm, and its encoder's file"
    torch.manual_seed(0)
    learn = clae_learner(folder_dls(root, bs=4, num_workers=0, **kwargs), resnet8)
    with torch.no_grad(): learn.model.train()(learn.clae.normalize(learn.dls.one_batch()[0]).as_subclass(torch.Tensor))
    return learn,learn.export_encoder(file)

def read(file):
    "`{name: features}`, in their order"
    if file.suffix == '.npz':
        with np.load(file, allow_pickle=False) as z: names,x = z['files'].tolist(),z['features']
        assert x.dtype == np.float32
    else:
        with open(file, newline='', encoding='utf-8') as f: head,*rows = csv.reader(f)
        names,x = [o[0] for o in rows],np.array([o[1:] for o in rows], dtype=np.float32)
        assert head == ['file', *(f'h{i}' for i in range(x.shape[1]))]
    assert len(x) == len({*names})
    return dict(zip(names, x))

@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('kind', kinds)
def test_a_row_an_image(cli, kind, layout):
    "The features of the run's own data, held out or not, by name, from both kinds of file and from the learner"
    pixels,suffix,kwargs,args = kinds[kind]
    root = folder(cli.cwd/'images', pixels, suffix, layouts[layout])
    learn,file = encoder(cli.cwd/'e.safetensors', root, **kwargs)
    want = {}
    for dl in learn.dls.loaders:
        dl = dl.new(shuffle=False, drop_last=False)
        want |= {f.relative_to(root).as_posix(): h.numpy()
                 for f,h in zip(dl.dataset.files, extract_features(file, dl)[0])}
    assert len(want) == 30
    tables = []
    for kind in ('csv','npz'):
        r = cli('clae_embed', file, '--path', root, '--out', f'f.{kind}', *args)
        assert (r.returncode == 0 and
                r.stdout.endswith(f'Wrote the features of 30 images, 64 numbers each, to f.{kind}.\n')), r
        tables.append(read(cli.cwd/f'f.{kind}'))
    a,b = tables
    assert [*a] == [*b] == sorted(want) and all(np.array_equal(a[k], b[k]) for k in a), 'float32 comes back'
    for k in want: np.testing.assert_allclose(a[k], want[k], rtol=0, atol=1e-6)
    assert np.abs(a['1.png' if '1.png' in a else [*a][1]] - [*a.values()][0]).max() > 1e-3, 'all images look alike'
    h,files = learn.embed(root)
    assert [f.relative_to(root).as_posix() for f in files] == [*a]
    np.testing.assert_allclose(h, [*a.values()], rtol=0, atol=1e-5) # batch norm in another order
    table = pd.read_csv(cli.cwd/'f.csv', index_col='file')
    assert table.shape == (30,64) and list(table.index) == [*a]

def test_learners(tmp_path):
    """Files, images and items as given; a `DataBlock`, whose transforms act as in validation;
    training goes on as if nothing was"""
    root = folder(tmp_path/'images', noise((40,40,3)), 'png', '{c}/{i}', 12)
    learn,_ = encoder(tmp_path/'e.safetensors', root)
    files = [*learn.dls.valid.files, learn.dls.train.files[0]][::-1]
    h = learn.embed(files).features
    assert h.device.type == 'cpu' and not h.requires_grad and learn.embed(files).files is files
    for images in ([*map(str, files)], [Image.open(f) for f in files], [np.array(Image.open(f)) for f in files]):
        torch.testing.assert_close(learn.embed(images).features, h)
    torch.testing.assert_close(learn.embed(learn.dls.valid_ds.items).features,
                               extract_features(learn, learn.dls.valid)[0])
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(32),
        batch_tfms=Normalize.from_stats([.5]*3, [.2]*3))
    dls = block.dataloaders(root, bs=4, num_workers=0)
    files = list(dls.valid_ds.items)
    for learn in (clae_learner(dls, resnet8), vision_learner(dls, 'resnet18', pretrained=False)):
        learn.model.train()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        h,names = learn.embed(files)
        assert learn.model.training and torch.equal(torch.get_rng_state(), state) and names is files
        torch.testing.assert_close(h, extract_features(learn, dls.valid)[0])
        torch.testing.assert_close(learn.embed([PILImage.create(f) for f in files]).features, h)
        assert [f.name for f in learn.embed(root/'a').files] == sorted(o.name for o in (root/'a').glob('*.png'))
    for wrong,error,word in ((tmp_path/'x', FileNotFoundError, 'no folder'),
                             (tmp_path/'e.safetensors', ValueError, 'is a file')):
        with pytest.raises(error, match=word): learn.embed(wrong)
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no image in'): learn.embed(tmp_path/'empty')

hostile = ['=SUM(A1)', 'a,b', 'a"b', '"', "it's", 'two\nlines', 'a\rb', 'a\r\nb', ' spaces ', '<b>&amp;', 'größe 日本',
    '#', '-1', '\udcff\udcfe', 'tab\tx', '🦊']

def test_hostile_names(cli):
    "Both kinds of file give them back; bytes that are no text are spelt out"
    (root := cli.cwd/'images').mkdir()
    for i,name in enumerate(hostile): Image.fromarray(noise((8,8,3))(i)).save(root/f'{name}.png')
    _,file = encoder(cli.cwd/'e.safetensors', root)
    dl = folder_dl(root)
    x = {f.name: h.numpy() for f,h in zip(dl.files, extract_features(file, dl)[0])}
    assert len(x) == len(hostile)
    for kind in ('csv','npz'):
        r = cli('clae_embed', 'e.safetensors', '--path', 'images', '--out', f'f.{kind}')
        assert r.returncode == 0, r
        got = read(cli.cwd/f'f.{kind}')
        assert [*got] == [o.replace('\udcff\udcfe', '\\xff\\xfe') for o in sorted(x)]
        for a,b in zip(got.values(), (x[k] for k in sorted(x))): np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    frame = pd.read_csv(cli.cwd/'f.csv')
    assert len(frame) == len(hostile) and 'two\nlines.png' in set(frame.file)

def test_refusals(cli, command):
    "Before work starts, in one line, and nothing is written"
    from clae_fastai.cli import clae_embed
    root = folder(cli.cwd/'images', noise((20,20)), 'png', '{i}', 6)
    learn,_ = encoder(cli.cwd/'e.safetensors', root)
    (cli.cwd/'there.csv').write_text('mine')
    (cli.cwd/'link.csv').symlink_to('nowhere')
    (cli.cwd/'empty').mkdir()
    folder(cli.cwd/'deep', noise((20,20), np.uint16, 3000), 'png', '{i}', 1)
    def says(word, run='e.safetensors', path='images', out='f.csv', *more):
        args = [run, *(['--path', path] if path else []), '--out', out, *more]
        assert word in (got := command(clae_embed, *args)), got
    for out in ('there.csv','link.csv'): says(f'{out} exists, and nothing is overwritten', out=out)
    for out in ('f.txt','f','f.csv.gz'): says('The endings are .csv, .npz', out=out)
    says('no folder x', out='x/f.csv')
    says('--path FOLDER', path=None)
    says('no folder nowhere', path='nowhere')
    says('is a file', path='e.safetensors')
    says('no image in empty', path='empty')
    says('no run or encoder nothing', run='nothing')
    says('no safetensors file', run='there.csv')
    says('bs must be', 'e.safetensors', 'images', 'f.csv', '--bs', 0)
    says('max_pixels must be', 'e.safetensors', 'images', 'f.csv', '--max-pixels', 0)
    says('background must be', 'e.safetensors', 'images', 'f.csv', '--background', 'none')
    (cli.cwd/'e.safetensors').unlink()
    learn.encoder_info['value_range'] = (0,1000)
    learn.export_encoder(cli.cwd/'e.safetensors')
    learn.encoder_info.pop('value_range')
    r = cli('clae_embed', 'e.safetensors', '--path', 'deep')
    assert r.returncode == 2 and 'does not hold' in r.stderr and 'Traceback' not in r.stderr
    r = cli('clae_embed', 'e.safetensors', '--path', 'deep', '--value-range', 0, 5000)
    assert r.returncode == 2 and 'read them with the encoder' in r.stderr
    r = cli('clae_embed', 'e.safetensors', '--path', 'images', '--channels', 3)
    assert r.returncode == 2 and 'images of 1 channels' in r.stderr
    (cli.cwd/'images'/'bad.png').write_text('x')
    r = cli('clae_embed', 'e.safetensors', '--path', 'images')
    assert r.returncode == 2 and 'bad.png' in r.stderr
    assert not [o for o in os.listdir(cli.cwd) if 'features' in o]
    r = cli('clae_embed', 'e.safetensors', '--path', 'images', '--skip-bad')
    assert r.returncode == 0 and 'of 6 images' in r.stdout and len(read(cli.cwd/'features.csv')) == 6

@pytest.mark.parametrize('kind', ['csv','npz'])
@pytest.mark.parametrize('error', [OSError('disk full'), ValueError('damaged'), KeyboardInterrupt])
def test_nothing_half(tmp_path, monkeypatch, kind, error):
    "Where it ends early no file stays, and what was said is what went wrong"
    learn,_ = encoder(tmp_path/'e.safetensors', root := folder(tmp_path/'images', noise((20,20,3)), 'png', '{i}', 12))
    dl,before,n = folder_dl(root, bs=4),{*os.listdir(tmp_path)},0
    old = features.check_channels
    def _fail_later(*args):
        nonlocal n
        n += 1
        if n == 3: raise error
        old(*args)
    monkeypatch.setattr(features, 'check_channels', _fail_later)
    with pytest.raises(error if error is KeyboardInterrupt else type(error),
                       match=str(error) if isinstance(error, Exception) else None):
        write_features(learn, dl, tmp_path/f'f.{kind}', root)
    assert n == 3 and {*os.listdir(tmp_path)} == before

def test_same_again(tmp_path):
    "Two files of the same images are equal, byte for byte"
    learn,_ = encoder(tmp_path/'e.safetensors', root := folder(tmp_path/'images', noise((20,20,3)), 'png', '{i}', 12))
    for kind in ('csv','npz'):
        for name in 'ab': write_features(learn, folder_dl(root), tmp_path/f'{name}.{kind}', root)
        assert (tmp_path/f'a.{kind}').read_bytes() == (tmp_path/f'b.{kind}').read_bytes()

measured = '''
import json, sys
from clae_fastai import runs
from clae_fastai.cli import clae_embed
def memory(what): # of this process alone, unlike resource's, which begins with that of its parent
    with open('/proc/self/status') as f: return next(int(o.split()[1]) for o in f if o.startswith(what))/1024
before = memory('VmRSS')
clae_embed.main(sys.argv[1:])
print(json.dumps([before, memory('VmHWM')]))
'''

@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='only Linux says it so')
@pytest.mark.parametrize('kind', ['csv','npz'])
def test_memory(tmp_path, kind):
    "20,000 small images, each written down as soon as it is looked at"
    (tmp_path/'images').mkdir()
    g = np.random.default_rng(0)
    for i,x in enumerate(g.integers(0, 256, (20_000,32,32,3), dtype=np.uint8)):
        Image.fromarray(x).save(tmp_path/'images'/f'{i:05}.png', compress_level=0)
    torch.manual_seed(0)
    some = folder(tmp_path/'some', noise((32,32,3)), 'png', '{i}', 8)
    clae_learner(folder_dls(some, bs=4), 'resnet18', stem='imagenet').export_encoder(tmp_path/'e.safetensors')
    args = ['e.safetensors', '--path', 'images', '--out', f'f.{kind}']
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', measured, *args],
        cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    before,after = json.loads(p.stdout.splitlines()[-1])
    print(f'{kind}: {before:.0f} MB with all imports, {after:.0f} MB at the most')
    assert after - before < 500
    assert len(read(tmp_path/f'f.{kind}')) == 20_000

def test_files_that_are_no_images(tmp_path):
    "As the function that reads them says"
    def read(file): return np.load(file) if file.suffix == '.npy' else None
    for i in range(8): np.save(tmp_path/f'{i}.npy', noise((16,16,5))(i))
    (tmp_path/'about.txt').write_text('x')
    learn = clae_learner(folder_dls(tmp_path, bs=2, read=read, num_workers=0), resnet8)
    h,files = learn.embed(tmp_path)
    assert len(h) == len(files) == 8 and {f.suffix for f in files} == {'.npy'}
