"""Images and folders as people have them: each case is built from small files, and comes out right,
or ends in a message. Sets in memory and in files, without and with processes that load them."""
import json
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zlib

import kornia.augmentation as K
import numpy as np
import pytest
import tifffile
import torch
import torchvision.transforms as T
from fastai.vision.all import (
    DataLoader, DataLoaders, FlipItem, Normalize, PILImage, RandomErasing, RandomResizedCropGPU, RandTransform,
    TensorImage, aug_transforms)
from PIL import Image
from torchvision.transforms import v2

from clae_fastai.all import (
    ImageReader, KNNCallback, TwoViews, clae_learner, evaluate, extract_features, find_images, get_dls, knn_predict,
    load_learner, read_encoder, resnet8, same_for_all)

def save(file, image, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **kwargs)

def noise(seed, side=32, mode='RGB'):
    pixels = np.random.default_rng(seed).integers(0, 256, (side,side,3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)

def classes(root, *names, n=5, side=32):
    "`n` images in each of the class folders"
    for k,name in enumerate(names):
        for i in range(n): save(root/name/f'{i}.png', noise(17*k+i, side))

def said(capsys): return capsys.readouterr().out
def message(path, **kwargs):
    "What it says to a folder that it cannot take: one paragraph"
    with pytest.raises((ValueError, FileNotFoundError)) as e: get_dls(path, bs=2, num_workers=0, **kwargs)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)

# side in pixels, and processes: 32 pixels live in memory, 72 in files
sets = pytest.mark.parametrize('side,workers', [(32,0), (32,2), (72,0), (72,2)], ids=lambda o: str(o))

def pixels(dls):
    "All training images (N,C,H,W), 0 to 255, in the order of their files, as batches give them"
    x = torch.cat([b[0] for b in dls.train.new(shuffle=False, drop_last=False)])
    return (x.as_subclass(torch.Tensor)*255).numpy()

# 1. Split folders

@pytest.mark.parametrize('train,test', [
    ('train','test'), ('train','validation'), ('train','dev'), ('train','eval'), ('train','val'),
    ('training','valid'), ('Train','Test'), ('Training','Testing'), ('TRAIN','VALIDATION')])
def test_split_folders(tmp_path, train, test):
    for part,n in ((train,4),(test,2)): classes(tmp_path/part, 'cat', 'dog', n=n)
    dls = get_dls(tmp_path, bs=2)
    assert list(dls.vocab) == ['cat','dog'] and (len(dls.train_ds),len(dls.valid_ds)) == (8,4)

def test_test_before_validation(tmp_path, capsys):
    for part,n in (('train',4),('Val',3),('Test',2)): classes(tmp_path/part, 'cat', 'dog', n=n)
    assert len(get_dls(tmp_path, bs=2).valid_ds) == 4
    assert re.search(r'Left out: \S*Val,', said(capsys))

@pytest.mark.parametrize('below', ['train', 'archive', 'archive/photos', 'Test'])
def test_a_folder_in_a_folder(tmp_path, below):
    classes(tmp_path/below, 'cat', 'dog')
    dls = get_dls(tmp_path, bs=2)
    assert list(dls.vocab) == ['cat','dog'] and len(dls.train_ds) + len(dls.valid_ds) == 10

def test_trains_are_a_class(tmp_path):
    "`train` is a class of CIFAR-100"
    classes(tmp_path, 'bus', 'train', 'tram')
    assert list(get_dls(tmp_path, bs=2).vocab) == ['bus','train','tram']

@pytest.mark.parametrize('folders,words', [
    (['train/a','train/b','Training/a','Training/b','test/a','test/b'], 'two folders to train on'),
    (['test/a','test/b','valid/a','valid/b'], 'no folder to train on'),
    (['a/train','a/test','b/train','b/test'], 'put these first')])
def test_unclear_splits(tmp_path, folders, words):
    for o in folders: classes(tmp_path, o)
    assert words in message(tmp_path)

@pytest.mark.parametrize('beside', ['test','models','annotations/a.xml','labels/1.txt'])
def test_folders_without_images(tmp_path, beside):
    "They are none: neither parts, nor classes, nor what a learner has saved"
    classes(tmp_path/'photos'/'train', 'a', 'b')
    other = tmp_path/'photos'/beside
    if other.suffix:
        other.parent.mkdir()
        other.write_text('x')
    else: other.mkdir()
    dls = get_dls(tmp_path, bs=2)
    assert list(dls.vocab) == ['a','b'] and len(dls.valid_ds) == 2
    clae_learner(dls, resnet8).save('x')
    assert list(get_dls(tmp_path, bs=2).vocab) == ['a','b']

# 2. Stray files

def test_stray_images(tmp_path):
    classes(tmp_path, 'cat', 'dog', n=10)
    save(tmp_path/'cover.png', noise(0))
    text = message(tmp_path)
    assert 'cover.png' in text and '1 of the 21' in text and '--unlabelled' in text and 'out of the folder' in text
    dls = get_dls(tmp_path, bs=2, unlabelled=True)
    assert len(dls.train_ds) + len(dls.valid_ds) == 21 and len(dls.one_batch()) == 1

def test_a_stray_image_beside_the_only_folder(tmp_path):
    classes(tmp_path/'photos', 'cat', 'dog')
    save(tmp_path/'cover.png', noise(0))
    assert 'cover.png' in message(tmp_path)

def test_stray_images_in_the_test_part(tmp_path):
    for part in ('train','test'): classes(tmp_path/part, 'cat', 'dog')
    save(tmp_path/'test'/'cover.png', noise(0))
    assert 'cover.png' in message(tmp_path)

def test_folders_of_other_programs(tmp_path):
    classes(tmp_path, 'cat', 'dog')
    for o in ('@eaDir','.ipynb_checkpoints','__MACOSX','$RECYCLE.BIN'): save(tmp_path/o/'x.png', noise(0))
    save(tmp_path/'cat'/'@eaDir'/'x.png', noise(0))
    (tmp_path/'cat'/'._0.png').write_bytes(b'of a Mac')
    dls = get_dls(tmp_path, bs=2)
    assert list(dls.vocab) == ['cat','dog'] and len(dls.train_ds) + len(dls.valid_ds) == 10

def test_names_that_only_look_odd(tmp_path):
    "Names with @, and the two ways to write an accent"
    for part,name in (('train','caf\u00e9'), ('test','cafe\u0301')): classes(tmp_path/part, '@nasa', name)
    dls = get_dls(tmp_path, bs=2)
    assert list(dls.vocab) == ['@nasa','caf\u00e9'] and len(dls.valid_ds) == 10

def test_links_that_lead_back(tmp_path):
    classes(tmp_path, 'cat', 'dog')
    for name,to in (('self','.'), ('up','..')): (tmp_path/'cat'/name).symlink_to(to)
    dls = get_dls(tmp_path, bs=2)
    assert list(dls.vocab) == ['cat','dog'] and len(dls.train_ds) + len(dls.valid_ds) == 10
    assert any('2 names of files or folders that are there already' in o and 'cat/self' in o for o in dls.notes)

def test_a_third_folder(tmp_path, capsys):
    for part in ('train','test','extra'): classes(tmp_path/part, 'cat', 'dog')
    save(tmp_path/'cover.png', noise(0))
    assert len(get_dls(tmp_path, bs=2).train_ds) == 10
    out = said(capsys)
    assert re.search(r'Left out: \S*extra, \S*cover.png', out)

def test_a_test_part_of_one_class(tmp_path):
    classes(tmp_path/'train', 'cat', 'dog')
    classes(tmp_path/'test', 'dog')
    dls = get_dls(tmp_path, bs=2)
    assert dls.valid_ds.labels.tolist() == [1]*5

def test_other_classes_in_the_test_part(tmp_path):
    classes(tmp_path/'train', 'cat', 'dog')
    classes(tmp_path/'test', 'cat', 'cow')
    assert 'cow' in message(tmp_path)

# 3. Bit depth

def ramp(high, side, dtype=np.uint16, low=0):
    return np.linspace(low, high, side*side).round().astype(dtype).reshape(side, side)

depths = {
    '10 bits': (1023, 'png', lambda s: ramp(1023, s), {}),
    '12 bits': (4095, 'png', lambda s: ramp(4095, s), {}),
    '12 bits in TIFF': (4095, 'tif', lambda s: ramp(4095, s), {}),
    '16 bits': (65535, 'png', lambda s: ramp(65535, s), {}),
    'big-endian': (4095, 'tif', lambda s: ramp(4095, s).astype('>u2'), {}),
    'I': (2**20-1, 'tif', lambda s: ramp(2**20-1, s, np.int32), {}),
    '16 bits in I': (65535, 'pgm', lambda s: ramp(65535, s, np.int32), {}),
    'F': ((-1.5,2.5), 'tif', lambda s: np.linspace(-1.5, 2.5, s*s).astype(np.float32).reshape(s, s),
          dict(value_range=(-1.5,2.5))),
    'negative': ((-1000,400), 'tif', lambda s: ramp(400, s, np.int32, -1000), dict(value_range=(-1000,400))),
    '8 of 16 bits': (255, 'png', lambda s: ramp(255, s), {})}

@sets
@pytest.mark.parametrize('depth', depths)
def test_bit_depth(tmp_path, side, workers, depth, capsys):
    "Within half a grey level, in a folder of which only one image has the highest values"
    high,suffix,make,options = depths[depth]
    low,high = high if isinstance(high, tuple) else (0,high)
    for i in range(4):
        if depth == 'big-endian': tifffile.imwrite(tmp_path/f'{i}.tif', make(side), byteorder='>')
        else: save(tmp_path/f'{i}.{suffix}', make(side))
    dls = get_dls(tmp_path, bs=2, num_workers=workers, valid_pct=0, **options)
    right = np.linspace(0, 255, side*side).reshape(side, side)
    half = .5 + 255*.5/(high - low) # the file's own rounding
    for x in pixels(dls): assert np.abs(x[0] - right).max() <= half + 1e-3
    assert dls.reader.value_range == (low,high)
    assert re.search('Scaled from .* to 8 bits .*: 4 of 4 images', said(capsys))
    assert dls.one_batch()[0].shape[1] == 1

def test_the_range_is_the_folder_s(tmp_path):
    "And not the image's: a dark image stays dark"
    for part,high in (('train',500),('test',3000)):
        for c in 'ab':
            for i in range(3): save(tmp_path/part/c/f'{i}.png', ramp(high, 32))
    dls = get_dls(tmp_path, bs=2)
    assert dls.reader.value_range == (0,4095)
    assert ([int(o.max()) for o in (dls.train_ds.images,dls.valid_ds.images)] ==
            [round(500/4095*255),round(3000/4095*255)])

@pytest.mark.parametrize('pixels,words', [
    (np.full((32,32), .5, np.float32), 'floats or negative'), (np.full((32,32), -5, np.int32), 'floats or negative')])
def test_what_is_white(tmp_path, pixels, words):
    for i in range(3): save(tmp_path/f'{i}.tif', pixels)
    text = message(tmp_path)
    assert words in text and '0.tif' in text and 'value_range=(low, high)' in text and '--value-range' in text

def test_values_outside_the_range(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png', ramp(4095, 32))
    text = message(tmp_path, value_range=(0,1000))
    assert 'from 0 to 4095' in text and '(0, 1000)' in text

@pytest.mark.parametrize('suffix', ['png','tif','ppm'])
def test_colours_of_sixteen_bits(tmp_path, suffix):
    for i in range(3):
        file,x = tmp_path/f'{i}.{suffix}',np.random.default_rng(i).integers(0, 65536, (32,32,3), dtype=np.uint16)
        if suffix == 'ppm': file.write_bytes(b'P6 32 32 65535\n' + x.astype('>u2').tobytes())
        elif suffix == 'tif': tifffile.imwrite(file, x, photometric='rgb')
        else: write_png(file, x)
    with Image.open(tmp_path/f'0.{suffix}') as im: assert im.mode == 'RGB' # as if it had 8 bits
    text = message(tmp_path)
    assert 'more than 8 bits' in text and 'read=' in text and f'0.{suffix}' in text

def write_png(file, x):
    "A PNG of 16 bits and three channels, which Pillow cannot write"
    h,w,_ = x.shape
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in x)
    file.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0)) +
        chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))

lost = { # what Pillow would drop, and how such a file is written
    'planar': lambda f,x: tifffile.imwrite(f, x.transpose(2,0,1), planarconfig='separate', photometric='rgb'),
    'compressed': lambda f,x: tifffile.imwrite(f, x, photometric='rgb', compression='zlib'),
    'bands': lambda f,x: tifffile.imwrite(f, x[:,:,[0,1,2,0]].astype(np.uint8), photometric='rgb',
                                          extrasamples=['unspecified']),
    'white is zero': lambda f,x: tifffile.imwrite(f, x[:,:,0], photometric='miniswhite'),
    'signed bytes': lambda f,x: tifffile.imwrite(f, x[:,:,0].astype(np.int8)),
    'SGI': lambda f,x: f.with_suffix('.sgi').write_bytes(sgi(x[:,:,0])),
    'transparent': lambda f,x: save(f.with_suffix('.png'), x[:,:,0], transparency=5)}

def sgi(x):
    return (struct.pack('>HBBHHHHIIi80si404x', 474, 0, 2, 2, *x.shape[::-1], 1, 0, 65535, 0, b'', 0) +
            x.astype('>u2').tobytes())

@pytest.mark.parametrize('kind', lost)
def test_what_pillow_would_drop(tmp_path, kind):
    for i in range(3):
        lost[kind](tmp_path/f'{i}.tif', np.random.default_rng(i).integers(0, 65536, (32,32,3), dtype=np.uint16))
    text = message(tmp_path)
    assert 'read=' in text and '/0.' in text and 'it has' in text

@pytest.mark.parametrize('dtype,low,high', [(np.int16,-20000,30000), (np.float16,-60000,60000), (np.uint32,0,2**32-1)])
def test_wide_values_of_narrow_numbers(tmp_path, dtype, low, high):
    x = np.linspace(low, high, 32*32).reshape(32,32).astype(dtype)
    if dtype is np.float16: np.save(tmp_path/'0.npy', x)
    else: tifffile.imwrite(tmp_path/'0.tif', x)
    kept = ImageReader(1, (x.min(),x.max()), read=np.load if dtype is np.float16 else None)(next(tmp_path.iterdir()))
    assert np.abs(np.array(kept) - np.linspace(0, 255, 32*32).reshape(32,32)).max() < .6
    assert (pickle.loads(pickle.dumps(kept)).size == (32,32) and
            json.dumps(ImageReader(1, (x.min(),x.max())).value_range))

@pytest.mark.parametrize('wrong', [5, (0,1,2), '0 4095', (None,1), (3,1), (0,float('nan'))], ids=str)
def test_ranges_that_are_none(wrong):
    with pytest.raises(ValueError, match='value_range must be'): ImageReader(1, wrong)

def test_a_range_that_is_not_used(tmp_path, capsys):
    for i in range(4): save(tmp_path/f'{i}.png', noise(i))
    assert get_dls(tmp_path, bs=2, value_range=(50,100)).reader.value_range is None
    assert 'value_range is not used' in said(capsys)

def test_values_that_are_no_numbers(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.tif', np.full((32,32), np.nan if i == 1 else 0, np.float32))
    assert 'no numbers' in message(tmp_path, value_range=(0,1)) and '1.tif' in message(tmp_path)

def test_constant_images(tmp_path, capsys):
    for i in range(3): save(tmp_path/f'{i}.png', noise(i))
    save(tmp_path/'red.png', Image.new('RGB', (32,32), 'red'))
    get_dls(tmp_path, bs=2)
    assert re.search(r'Of one colour throughout: 1 of 4 images, \S*red.png', said(capsys))

# 4. Alpha

def drawing(side, mode):
    "A black bar on transparent ground"
    im = Image.new('RGBA', (side,side), (0,0,0,0))
    im.paste((0,0,0,255), (0,0,side//2,side))
    return im if mode == 'RGBA' else im.convert(mode) if mode == 'LA' else im.quantize(8)

@sets
@pytest.mark.parametrize('mode', ['RGBA','LA','P'])
@pytest.mark.parametrize('background,level', [(None,255), ('black',0), ('#404040',64)], ids=str)
def test_transparent_images(tmp_path, side, workers, mode, background, level, capsys):
    for i in range(4): save(tmp_path/f'{i}.png', drawing(side, mode))
    options = {} if background is None else dict(background=background)
    dls = get_dls(tmp_path, bs=2, num_workers=workers, valid_pct=0, **options)
    for x in pixels(dls):
        assert np.abs(x[:,:,:side//2]).max() < 1e-3 and np.abs(x[:,:,side//2:] - level).max() < 1e-3
    out = said(capsys)
    assert re.search(f'Laid on {background or "white"} where they are transparent .*: 4 of 4 images', out)
    assert ('one colour' in out) == (level == 0)

def test_opaque_images_with_alpha_are_not_mentioned(tmp_path, capsys):
    for i in range(3): save(tmp_path/f'{i}.png', noise(i).convert('RGBA'))
    get_dls(tmp_path, bs=2)
    assert 'ransparent' not in said(capsys)

# 5. Orientation

def turned(im, orientation):
    "The image as a camera stores it that is to be shown as `im`"
    undo = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90',
            7: 'TRANSVERSE', 8: 'ROTATE_270'}
    exif = Image.Exif()
    exif[0x112] = orientation
    return im if orientation == 1 else im.transpose(getattr(Image.Transpose, undo[orientation])),exif

@sets
@pytest.mark.parametrize('suffix', ['png','tif','jpg','webp'])
def test_orientation(tmp_path, side, workers, suffix, capsys):
    "All eight, of images that are not square; 16-bit ones, too"
    upright = noise(0, side).resize((side//4,side//4)).resize((side,side), Image.BICUBIC).crop((0,0,side-8,side))
    for i in range(1, 9):
        im,exif = turned(upright, i)
        save(tmp_path/f'{i}.{suffix}', im, exif=exif,
            **{'jpg': dict(quality=95), 'webp': dict(lossless=True)}.get(suffix, {}))
    dls = get_dls(tmp_path, bs=2, num_workers=workers, valid_pct=0)
    for x in pixels(dls):
        assert x.shape == (3,side,side-8)
        assert np.abs(x - np.array(upright).transpose(2,0,1)).mean() < (4 if suffix == 'jpg' else .01)
    assert re.search('Turned upright.*: 7 of 8 images', said(capsys))
    again = next(iter(dls.test_dl([tmp_path/f'6.{suffix}'], num_workers=0)))[0]
    assert np.abs(again[0].numpy()*255 - np.array(upright).transpose(2,0,1)).mean() < (4 if suffix == 'jpg' else .01)

def test_orientation_of_deep_images(tmp_path):
    for i in range(1, 9):
        im,exif = turned(Image.fromarray(ramp(4095, 32)[:24]), i)
        save(tmp_path/f'{i}.png', im, exif=exif)
    x = pixels(get_dls(tmp_path, bs=2, valid_pct=0))
    assert x.shape == (8,1,24,32) and np.abs(x - x[:1]).max() < 1e-3

def test_images_that_are_opened_already(tmp_path):
    im,exif = turned(noise(3).crop((0,0,24,32)), 6)
    save(tmp_path/'x.png', im, exif=exif)
    for o in (Image.open(tmp_path/'x.png'), PILImage.create(tmp_path/'x.png')):
        assert np.array_equal(np.array(ImageReader()(o)), np.array(noise(3).crop((0,0,24,32))))

# 6. Values outside [0,1]

def user_dls(*tfms, side=16, scale=1.):
    "DataLoaders of a user's own, of plain PyTorch or fastai"
    x = torch.rand(32, 3, side, side)*scale
    for t in tfms: x = t(x)
    return DataLoaders(DataLoader(list(zip(x, range(32))), bs=8, shuffle=True),
                       DataLoader(list(zip(x, range(32))), bs=8))

@pytest.mark.parametrize('dls,words', [
    (lambda: user_dls(scale=255.), ['divide them by 255', 'to 25']),
    (lambda: user_dls(T.Normalize([.5]*3, [.25]*3)), ['behind the views', 'from -'])])
def test_values_that_views_would_clip(dls, words):
    with pytest.raises(ValueError) as e: clae_learner(dls(), resnet8)
    assert all(w in str(e.value) for w in words)
    views = TwoViews.from_preset('simclr', 16)
    with pytest.raises(ValueError): views(dls().one_batch()[0])
    clae_learner(user_dls(), resnet8) # and what lies in [0,1] passes

@pytest.mark.parametrize('compose', [
    lambda n: [T.RandomResizedCrop(16), T.ToTensor(), n],
    lambda n: T.Compose([T.RandomResizedCrop(16), T.ToTensor(), n]),
    lambda n: v2.Compose([
        v2.RandomResizedCrop(16), v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), n])])])
@pytest.mark.parametrize('normalize', [
    T.Normalize([.4]*3, [.2]*3), v2.Normalize([.4]*3, [.2]*3), Normalize.from_stats([.4]*3, [.2]*3, cuda=False)],
    ids=['v1','v2','fastai'])
def test_normalize_at_the_end_of_views(compose, normalize, quiet):
    "Evaluation normalises as training does"
    dls = user_dls()
    learn = quiet(clae_learner(dls, resnet8, views=compose(normalize)))
    assert [o.tolist() for o in learn.clae.stats] == [pytest.approx([.4]*3), pytest.approx([.2]*3)]
    assert learn.encoder_info['mean'] == pytest.approx([.4]*3)
    x = dls.valid.one_batch()[0]
    torch.testing.assert_close(learn.clae.normalize(x), (x - .4)/.2)
    learn.fit(1)

@pytest.mark.parametrize('n_in', [1,3])
def test_normalize_by_one_number(tmp_path, n_in, quiet):
    x = torch.rand(16, n_in, 16, 16)
    dls = DataLoaders(*(DataLoader(list(zip(x)), bs=8) for _ in range(2)))
    learn = quiet(clae_learner(dls, resnet8, views=T.Compose([T.ToTensor(), T.Normalize(.5, .25)])))
    learn.fit(1)
    assert read_encoder(learn.export_encoder(tmp_path/'e.safetensors'))[1]['mean'] == [.5]*n_in
    with pytest.raises(ValueError, match='normalise 2 channels'):
        clae_learner(dls, resnet8, views=TwoViews(lambda x: x, ([.5]*2,[.5]*2)))

def test_two_normalisations(tmp_path):
    classes(tmp_path, 'a', 'b')
    dls = get_dls(tmp_path, bs=4, batch_tfms=[Normalize.from_stats([.4]*3, [.2]*3, cuda=False)])
    for views in (TwoViews([T.RandomCrop(32)], ([.5]*3,[.5]*3)), lambda x: (x, x)):
        with pytest.raises(ValueError, match='The DataLoaders have a Normalize'):
            clae_learner(dls, resnet8, views=views)
    clae_learner(dls, resnet8, views=TwoViews([T.RandomCrop(32)], ([.4]*3,[.2]*3)))
    with pytest.raises(ValueError, match='stats='):
        TwoViews(torch.nn.Sequential(K.RandomHorizontalFlip(), K.Normalize(.5, .5)))

def test_evaluation_looks_at_the_range_too(quiet):
    learn = quiet(clae_learner(user_dls(), resnet8))
    with pytest.raises(ValueError, match='to 25'):
        extract_features(learn, user_dls(scale=255.).valid)
    with pytest.raises(ValueError, match='behind the views'):
        extract_features(learn, user_dls(T.Normalize([.5]*3, [.25]*3)).valid)
    assert extract_features(learn, user_dls().valid)[0].shape == (32,64)

def test_what_interpolation_adds_is_cut():
    x = torch.tensor([-.03,1.05,.5]).view(1,1,1,3).expand(2,3,8,3)
    assert [round(float(o), 2) for o in TwoViews([T.RandomHorizontalFlip(0)])(x)[0][0,0,0]] == [0,1,.5]
    clae_learner(user_dls(lambda x: x*1.4 - .2), resnet8)

def test_normalize_elsewhere_in_views():
    with pytest.raises(ValueError, match='Normalize must be the last .* RandomErasing'):
        TwoViews([T.ToTensor(), T.Normalize([.5]*3, [.5]*3), T.RandomErasing()])
    with pytest.raises(ValueError, match='normalised twice'):
        TwoViews([T.ToTensor(), T.Normalize([.5]*3, [.5]*3)], ([.5]*3, [.5]*3))

def test_views_without_statistics_take_the_data_s(tmp_path):
    classes(tmp_path, 'a', 'b')
    dls = get_dls(tmp_path, bs=4, batch_tfms=[Normalize.from_stats([.4]*3, [.2]*3, cuda=False)])
    views = TwoViews([T.RandomResizedCrop(32)])
    learn = clae_learner(dls, resnet8, views=views)
    assert learn.encoder_info['std'] == pytest.approx([.2]*3) and views.stats is None

# 7. The same for all

torchvision_s = [
    T.Compose([T.RandomResizedCrop(16), T.RandomHorizontalFlip()]),
    T.Compose([T.Compose([T.RandomCrop(16)]), T.RandomErasing(1.)]),
    v2.Compose([v2.RandomResizedCrop(16), v2.RandomErasing(1.)]), torch.nn.Sequential(T.RandomResizedCrop(16)),
    T.RandomResizedCrop(16), v2.RandomAffine(45), [T.Compose([T.RandomCrop(16)]), v2.GaussianNoise(sigma=.1)]]

@pytest.mark.parametrize('aug,n_in', [*((aug,n) for aug in torchvision_s for n in (1,3,5)),
                                      (T.Compose([T.AutoAugment()]),3)],
                         ids=lambda o: type(o).__name__)
def test_torchvision_s_transforms_draw_for_each_image(aug, n_in):
    x = torch.rand(1, n_in, 20, 20).expand(8,-1,-1,-1)
    for views in TwoViews(aug)(x): assert len({o.numpy().tobytes() for o in views}) > 2
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        if n_in == 3: clae_learner(user_dls(side=20), resnet8, views=aug)

@pytest.mark.parametrize('aug', [T.RandomResizedCrop(16), T.RandomHorizontalFlip(), T.RandomErasing()],
                         ids=lambda o: type(o).__name__)
def test_a_crop_for_all_is_warned_of(aug):
    with pytest.warns(UserWarning, match='all images of a batch in the same way'):
        clae_learner(user_dls(), resnet8, views=TwoViews(lambda x: aug(x)))
    with pytest.warns(UserWarning, match='same way'):
        clae_learner(user_dls(), resnet8, views=lambda x: (aug(x), aug(x)))

def test_the_trial_draws_nothing():
    "The weights are the same, whether views are tried or not"
    def weights(views):
        torch.manual_seed(0)
        return torch.cat([p.flatten() for p in clae_learner(dls, resnet8, views=views).model.parameters()])
    dls = user_dls()
    preset = TwoViews.from_preset('simclr', 16)
    assert torch.equal(weights('simclr'), weights(preset))

@pytest.mark.parametrize('views', [
    [RandomErasing(p=1.)], [RandomResizedCropGPU(16)], aug_transforms(batch=True, max_lighting=0),
    [K.RandomResizedCrop((16,16))], [FlipItem(p=.5), RandomErasing(p=1.)]],
    ids=['erasing','crop','batch','kornia','both'])
def test_transforms_of_batches_as_views(views, quiet):
    "Where they are refused in the DataLoaders, views are the place for them: then they draw for each image"
    x = torch.rand(1, 3, 24, 24).expand(8,-1,-1,-1)
    x_q,x_p = TwoViews(views)(x)
    assert len({o.numpy().tobytes() for o in x_q}) > 4 and not torch.equal(x_q, x_p)
    quiet(clae_learner(user_dls(side=24), resnet8, views=views)).fit(1)

def test_views_that_are_none():
    with pytest.raises(ValueError, match='TwoViews'): clae_learner(user_dls(), resnet8, views=lambda x: x)
    with pytest.raises(ValueError, match='one list of transforms'): TwoViews([[T.RandomCrop(8)], [T.RandomCrop(8)]])

def test_other_sizes_and_types_are_tried_too():
    with pytest.warns(UserWarning, match='same way'):
        clae_learner(user_dls(), resnet8, views=lambda x: (T.RandomCrop(16, 4)(x), T.RandomResizedCrop(12)(x)))
    assert same_for_all(T.RandomEqualize(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8))

# 8. Transforms of batches

class Late(RandTransform):
    "Noise, behind everything else"
    order = 101
    def encodes(self, x:TensorImage): return x + .01*torch.randn_like(x)

@pytest.mark.parametrize('tfms,words', [
    ([Normalize.from_stats([.5]*3, [.5]*3, cuda=False), Late()], 'behind Normalize.*Late'),
    ([RandomErasing()], 'RandomErasing'), ([RandomResizedCropGPU(32)], 'RandomResizedCropGPU'),
    (aug_transforms(batch=True, max_lighting=0), 'same way')],
    ids=['behind','erasing','crop','batch'])
@pytest.mark.parametrize('side', [32,72])
def test_transforms_of_batches(tmp_path, tfms, words, side):
    classes(tmp_path, 'a', 'b', side=side)
    with pytest.raises(ValueError, match='views=') as e:
        clae_learner(get_dls(tmp_path, bs=4, batch_tfms=tfms, num_workers=0), resnet8)
    assert re.search(words, str(e.value))
    good = [*aug_transforms(), Late(order=50), Normalize.from_stats([.5]*3, [.5]*3, cuda=False)]
    clae_learner(get_dls(tmp_path, bs=4, batch_tfms=good, num_workers=0), resnet8)

# 9. Processes of every kind

program = '''
import sys, torch, numpy as np
from clae_fastai.all import *
def read(file): return np.load(file)
if __name__ == '__main__':
    torch.multiprocessing.set_start_method(sys.argv[1])
    for folder,options in zip(sys.argv[2:], ({}, dict(read=read))):
        dls = get_dls(folder, bs=2, num_workers=1, **options)
        print(tuple(dls.one_batch()[0].shape))
'''

@pytest.fixture
def three_sets(tmp_path):
    "Folders whose images live in memory, in files, and in arrays of five channels"
    classes(tmp_path/'memory', 'a', 'b')
    classes(tmp_path/'files', 'a', 'b', side=72)
    (tmp_path/'arrays').mkdir()
    for i in range(8):
        np.save(tmp_path/'arrays'/f'{i}.npy', np.random.default_rng(i).integers(0, 256, (72,72,5), dtype=np.uint8))
    return tmp_path

@pytest.mark.parametrize('method', ['spawn','forkserver'])
def test_workers_are_started(three_sets, method):
    "As on Windows, and on Linux from Python 3.14 on"
    (three_sets/'program.py').write_text(program)
    folders = [three_sets/o for o in ('files','arrays')]
    r = subprocess.run([sys.executable, three_sets/'program.py', method, *folders],
        capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    assert [o for o in r.stdout.splitlines() if o.startswith('(')] == ['(2, 3, 72, 72)', '(2, 5, 72, 72)']

@pytest.mark.parametrize('name', ['memory','files','arrays'])
def test_learners_are_exported(three_sets, name, quiet):
    dls = get_dls(three_sets/name, bs=2, num_workers=0, **(dict(read=read_array) if name == 'arrays' else {}))
    learn = quiet(clae_learner(dls, resnet8))
    learn.export(three_sets/'x.pkl')
    file = find_images(three_sets/name, dls.reader.read)[0][0]
    z = [o.get_preds(dl=o.dls.test_dl([file], num_workers=0))[0]
         for o in (learn,quiet(load_learner(three_sets/'x.pkl')))]
    torch.testing.assert_close(*z)

# 10. What is ignored is said

def test_what_is_no_image_by_its_name(tmp_path, capsys):
    classes(tmp_path, 'a', 'b')
    for o in ('a/x.txt','a/y.txt','b/z.CSV','b/README'): (tmp_path/o).write_text('x')
    get_dls(tmp_path, bs=2)
    out = said(capsys)
    assert 'no images by their names: .txt 2, .csv 1, without ending 1' in out

def test_webp_is_an_image(tmp_path):
    for i in range(4): save(tmp_path/f'{i}.WEBP', noise(i))
    assert len(find_images(tmp_path)[0]) == 4

def test_pages(tmp_path, capsys):
    for i in range(3): save(tmp_path/f'{i}.png', noise(i))
    save(tmp_path/'stack.tif', noise(7), save_all=True, append_images=[noise(8), noise(9)])
    x = pixels(get_dls(tmp_path, bs=2, valid_pct=0))
    assert np.abs(x[3] - np.array(noise(7)).transpose(2,0,1)).max() < 1e-3
    assert re.search(r'pages or frames behind the first: 1 of 4 images, \S*stack.tif', said(capsys))

@pytest.fixture
def heic(tmp_path, monkeypatch):
    "A folder of HEIC images, where Pillow does not know the format"
    import pillow_heif
    for i in range(4): pillow_heif.from_pillow(noise(i)).save(tmp_path/f'{i}.heic')
    for o in ('ID','OPEN','MIME'): monkeypatch.setattr(Image, o, type(getattr(Image, o))(getattr(Image, o)))
    Image.OPEN.pop('HEIF', None)
    if 'HEIF' in Image.ID: Image.ID.remove('HEIF')
    return tmp_path

def test_heic_without_its_package(heic, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    text = message(heic)
    assert ('pip install pillow-heif' in text and 'register_heif_opener' in text and '0.heic' in text and
            'skip' not in text)
    save(heic/'5.png', noise(5))
    assert '--skip-bad' in message(heic)

    for o in heic.glob('*.heic'): o.rename(o.with_suffix('.JPG')) # on its way from a phone
    assert 'pip install pillow-heif' in message(heic)

@pytest.mark.parametrize('suffix', ['.heic','.JPG'])
def test_heic_with_its_package(heic, suffix):
    for o in heic.glob('*.heic'): o.rename(o.with_suffix(suffix))
    assert len(get_dls(heic, bs=2).train_ds) == 2

def test_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)
    for i in range(3): save(tmp_path/f'{i}.png', noise(i))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        text = message(tmp_path)
        assert '--max-pixels' in text and '0.png' in text and '1024 pixels' in text and 'skip' not in text
        assert len(get_dls(tmp_path, bs=2, valid_pct=0, max_pixels=1024).train_ds) == 3

def test_a_limit_is_one_also_for_what_is_remembered(tmp_path):
    for i in range(3): save(tmp_path/f'{i}.png', noise(i))
    get_dls(tmp_path, bs=2, valid_pct=0)
    assert '1024 pixels' in message(tmp_path, max_pixels=1023)
    with pytest.raises(ValueError, match='max_pixels must be'): ImageReader(max_pixels=0)

# 11. Any reader

def read_array(file):
    "An array of a file, None for headers"
    return None if file.suffix == '.hdr' else np.load(file)

@sets
@pytest.mark.parametrize('shape,dtype,options', [
    ((),np.uint8,{}), ((1,),np.uint8,{}), ((3,),np.uint8,{}), ((4,),np.uint8,{}),
    ((2,),np.uint16,{}), ((7,),np.uint16,{}), ((5,),np.float32,dict(value_range=(0,4095))), ((),bool,{})], ids=str)
def test_any_reader(tmp_path, side, workers, shape, dtype, options, capsys, quiet):
    draw = np.random.default_rng(0)
    top = {bool: 1, np.uint8: 255}.get(dtype, 4095)
    arrays = [draw.integers(0, top, (side,side,*shape), endpoint=True).astype(dtype) for _ in range(6)]
    for i,x in enumerate(arrays):
        x.flat[0] = top
        np.save(tmp_path/f'{i}.npy', x)
    (tmp_path/'0.hdr').write_text('a header')
    dls = get_dls(tmp_path, bs=2, read=read_array, num_workers=workers, valid_pct=0, **options)
    right = np.stack([o.reshape(side,side,-1).transpose(2,0,1) for o in arrays])*(255/top)
    assert np.abs(pixels(dls) - right).max() <= .5 + 1e-3
    assert 'as the function that reads them says: 1 of 7 files' in said(capsys)
    dls.show_batch(max_n=2)
    learn = quiet(clae_learner(dls, resnet8))
    learn.fit(1)
    learn.show_views(2)
    assert extract_features(learn, dls.test_dl([tmp_path/'1.npy'], num_workers=0))[0].shape == (1,64)

def test_readers_that_fail(tmp_path):
    for i in range(3): np.save(tmp_path/f'{i}.npy', np.zeros((32,32,i+2), np.uint8))
    assert "0.npy ('of no use')" in message(tmp_path, read=lambda f: {}['of no use'])
    assert 'different numbers of channels' in message(tmp_path, read=read_array)
    assert 'its shape is (2, 3, 4, 5)' in message(tmp_path, read=lambda f: np.zeros((2,3,4,5)))
    assert 'not numbers' in message(tmp_path, read=lambda f: np.full((4,4), 'x'))
    assert 'looks like (C,H,W)' in message(tmp_path, read=lambda f: np.zeros((3,32,40), np.uint8))
    assert 'no image in' in message(tmp_path, read=lambda f: None)

def test_readers_of_other_kinds(tmp_path):
    "Tensors, and images of Pillow, which pass the same door; files that are none beside class folders"
    classes(tmp_path/'photos', 'a', 'b')
    (tmp_path/'README.md').write_text('x')
    def tensor(file): return None if file.suffix == '.md' else torch.from_numpy(np.array(Image.open(file)))
    def opened(file): return None if file.suffix == '.md' else Image.open(file)
    for read in (tensor,opened):
        dls = get_dls(tmp_path, bs=2, read=read)
        assert list(dls.vocab) == ['a','b'] and dls.one_batch()[0].shape == (2,3,32,32)

# 12. Held-out images

def test_each_class_is_held_out(tmp_path, capsys):
    for c,n in dict(a=50, b=10, c=3, d=1).items(): classes(tmp_path, c, n=n)
    for seed in range(3):
        dls = get_dls(tmp_path, bs=2, seed=seed)
        assert dls.valid_ds.labels.bincount(minlength=4).tolist() == [10,2,1,0]
        assert dls.train_ds.labels.bincount().tolist() == [40,8,2,1]
    assert re.search('Held out 20 % of each class.*: 13 of 64 images', said(capsys))
    assert get_dls(tmp_path, bs=2, valid_pct=.5).valid_ds.labels.bincount().tolist() == [25,5,2]
    assert len(get_dls(tmp_path, bs=2, valid_pct=0).valid_ds) == 0
    assert 'valid_pct' in message(tmp_path, valid_pct=1.)
    assert get_dls(tmp_path, bs=2, valid_pct=.99).train_ds.labels.bincount().tolist() == [1,1,1,1] # never all

def test_who_is_held_out_stays(tmp_path):
    "Where an image is added, and where the folder is moved"
    classes(tmp_path/'x', 'a', 'b', n=20)
    def held_out(root): return {o.numpy().tobytes() for o in get_dls(root, bs=2).valid_ds.images}
    before = held_out(tmp_path/'x')
    save(tmp_path/'x'/'a'/'new.png', noise(999))
    assert len(before - held_out(tmp_path/'x')) <= 1
    (tmp_path/'x'/'a'/'new.png').unlink()
    assert held_out((tmp_path/'x').rename(tmp_path/'y')) == before

def test_a_share_that_is_not_used(tmp_path, capsys):
    for part in ('train','test'): classes(tmp_path/part, 'a', 'b')
    get_dls(tmp_path, bs=2, valid_pct=.3)
    assert 'valid_pct is not used' in said(capsys)

@sets
def test_without_labels_too(tmp_path, side, workers, quiet):
    "`valid_loss` is measured on images that were not trained on, and fastai's trackers have something to track"
    from fastai.callback.tracker import EarlyStoppingCallback
    for i in range(60): save(tmp_path/f'{i}.png', noise(i, side))
    dls = get_dls(tmp_path, bs=8, num_workers=workers)
    assert (len(dls.train_ds),len(dls.valid_ds)) == (57,3)
    assert len(get_dls(tmp_path, bs=8, valid_pct=.5).valid_ds) == 30
    learn = quiet(clae_learner(dls, resnet8, cbs=EarlyStoppingCallback()))
    learn.fit(1)
    assert learn.recorder.values[-1][1] > 0

def test_the_smallest_class_is_named(cli, tmp_path):
    for part,n in (('train',8),('test',4)):
        classes(tmp_path/'photos'/part, 'a', n=n)
        classes(tmp_path/'photos'/part, 'b', n=n//2)
    r = cli('clae_train', '--path', 'photos', '--arch', 'resnet8', '--epochs', 1, '--bs', 4)
    assert r.returncode == 0, r.stderr
    assert '6 held-out images, 2 of the smallest class' in r.stdout

def test_accuracy_of_the_mean_class(tmp_path):
    from sklearn.metrics import balanced_accuracy_score
    for part in ('train','test'):
        for c,n in dict(a=12, b=5, c=2).items(): classes(tmp_path/part, c, n=n)
    dls = get_dls(tmp_path, bs=4, drop_last=False)
    e = evaluate(torch.nn.Flatten(), dls, k=5)
    (x,y),(test_x,test_y) = (extract_features(torch.nn.Flatten(), o) for o in dls.loaders)
    assert e.knn_mean_per_class == pytest.approx(balanced_accuracy_score(test_y, knn_predict(x, y, test_x, 5)))
    assert 'mean per class' in str(e).splitlines()[4]

# 13. Messages

def test_sizes_of_two_sides(tmp_path):
    for i in range(4): save(tmp_path/f'{i}.png', noise(i))
    assert get_dls(tmp_path, bs=2, size=(32,48)).one_batch()[0].shape == (2,3,32,48)
    assert get_dls('digits', bs=2, size=(12,16)).one_batch()[0].shape == (2,1,12,16)
    assert 'size' in message(tmp_path, size=(2,48))

@pytest.mark.parametrize('width,height', [(48,32), (100,70), (300,200), (100,100)])
def test_images_of_one_size(tmp_path, width, height):
    for i in range(4): save(tmp_path/f'{i}.png', noise(i).resize((width,height)))
    assert get_dls(tmp_path, bs=2, num_workers=0).one_batch()[0].shape == (2,3,height,width)

def test_evaluation_without_labels(tmp_path, command, cli):
    from clae_fastai.cli import clae_eval
    for i in range(8): save(tmp_path/'flat'/f'{i}.png', noise(i))
    assert cli('clae_train', '--path', 'flat', '--arch', 'resnet8', '--epochs', 1, '--bs', 2).returncode == 0
    text = command(clae_eval, 'flat-simclr-1')
    assert 'no labels' in text and 'class folders' in text

def test_names_that_are_nearly_right(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="perhaps 'cifar10'"): get_dls('CIFAR10')
    with pytest.raises(ValueError, match="perhaps 'fashion_mnist'"): get_dls('Fashion-MNIST')
    monkeypatch.setenv('HOME', str(tmp_path))
    classes(tmp_path/'photos', 'a', 'b')
    for args in (('~/photos',), ('folder','~/photos')): assert list(get_dls(*args, bs=2).vocab) == ['a','b']

def test_neighbours_of_small_sets(tmp_path, quiet, capsys):
    classes(tmp_path, 'a', 'b')
    learn = quiet(clae_learner(get_dls(tmp_path, bs=4), resnet8, cbs=KNNCallback()))
    learn.fit(1)
    assert 'takes the 8 training images' in said(capsys)

@pytest.mark.parametrize('side', [32,72])
def test_damaged_images_are_named(tmp_path, side):
    "Also those that are damaged after they were checked, wherever they are opened"
    for i in range(4): save(tmp_path/f'{i}.png', noise(i, side))
    bad = tmp_path/'1.png'
    dls = get_dls(tmp_path, bs=2, num_workers=2, valid_pct=0)
    bad.write_bytes(bad.read_bytes()[:-900])
    assert '1.png' in message(tmp_path)
    opens = [lambda: dls.test_dl([bad], num_workers=0).one_batch(), lambda: ImageReader()(bad)]
    if side == 72: opens.append(lambda: list(dls.train))
    for open_ in opens:
        with pytest.raises((ValueError, RuntimeError), match='1.png'): open_()

# All at once

def test_all_good_cases_at_once(cli):
    "The command trains, its first lines say what was done, and the run remembers it"
    root = cli.cwd/'all'
    for c in ('cat','dog'):
        for i in range(12): save(root/'Train'/c/f'{i}.png', ramp(4000, 32) if i%2 else noise(i, mode='L'))
        for i in range(4): save(root/'validation'/c/f'{i}.png', noise(20+i, mode='L'))
    im,exif = turned(noise(3, mode='L'), 6)
    save(root/'Train'/'cat'/'turned.jpg', im, exif=exif)
    save(root/'Train'/'dog'/'clear.png', drawing(32, 'LA'))
    save(root/'Train'/'dog'/'stack.tif', noise(5, mode='L'), save_all=True, append_images=[noise(6, mode='L')])
    save(root/'Train'/'dog'/'white.png', Image.new('L', (32,32), 255))
    save(root/'Train'/'@eaDir'/'x.png', noise(0))
    (root/'Train'/'cat'/'notes.txt').write_text('x')
    save(root/'extra'/'x.png', noise(0))
    r = cli('clae_train', '--path', 'all', '--arch', 'resnet8', '--epochs', 1, '--bs', 8)
    assert r.returncode == 0, r.stderr
    head = r.stdout[:r.stdout.index('28 training images')]
    for words in ('all/extra, as Train', '.txt 1', 'Turned upright', 'transparent', '0 to 4095', 'pages', 'one colour'):
        assert words in head, head
    run = cli.cwd/'runs'/'all-simclr-1'
    settings = json.loads((run/'summary.json').read_text())['settings']
    assert settings['value_range'] == [0,4095] and any('Turned upright' in o for o in settings['images'])
    assert read_encoder(run/'encoder.safetensors')[1]['value_range'] == [0,4095]
    assert cli('clae_eval', 'all-simclr-1').returncode == 0
    other = cli.cwd/'other'
    for c in ('cat','dog'):
        for i in range(5): save(other/c/f'{i}.png', ramp(3000, 32))
    assert cli('clae_eval', 'all-simclr-1', '--path', 'other').returncode == 0
    save(other/'cat'/'9.png', ramp(60000, 32))
    r = cli('clae_eval', 'all-simclr-1', '--path', 'other')
    assert r.returncode == 2 and '(0, 4095)' in r.stderr and '60000' in r.stderr and len(r.stderr.splitlines()) == 1
    for i in range(4): save(cli.cwd/'floats'/f'{i}.tif', np.full((32,32), i/2, np.float32))
    r = cli('clae_train', '--path', 'floats')
    assert r.returncode == 2 and '--value-range' in r.stderr and len(r.stderr.splitlines()) == 1
    assert cli('clae_train', '--path', 'floats', '--value-range', -1, 2, '--bs', 2, '--arch', 'resnet8',
               '--epochs', 1).returncode == 0
