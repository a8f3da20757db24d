"Photographs in files: two sharp crops of each, the same whoever cuts them, and what fastai expects of their loader."
import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from fastai.vision.all import (
    Callback, DataBlock, ImageBlock, IndexSplitter, IntToFloatTensor, Resize, TransformBlock, accuracy,
    get_image_files, load_learner, resnet18, set_seed, vision_learner)
from PIL import Image, JpegImagePlugin
from torchvision.transforms import RandomResizedCrop

from clae_fastai.all import (
    Checkpoint, FileImages, ImageReader, Resume, TwoCrops, clae_learner, cut_crops, encoder_learner,
    extract_features, get_dls, random_box, resnet8, two_crops)

def photograph(seed, w=320, h=240):
    "Smooth shapes with fine detail"
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (12,16,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)
    detail = draw.integers(-40, 41, (h,w,3))
    return Image.fromarray((np.asarray(coarse).astype(int) + detail).clip(0, 255).astype(np.uint8))

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two classes of twelve"
    root = tmp_path_factory.mktemp('photos')
    for c in 'ab':
        (root/c).mkdir()
        for i in range(12): photograph(i + 100*(c == 'b')).save(root/c/f'{i}.jpg', quality=90)
    return root

def loader(root, workers=0, **kwargs):
    "The training loader of a learner, its random numbers those of a seed"
    set_seed(0)
    dl = clae_learner(get_dls(root, bs=4, size=64, num_workers=workers, **kwargs), resnet8).dls.train
    dl.rng.seed(1)
    return dl

# The crops

@pytest.mark.parametrize('h,w', [(480,640), (300,200), (100,1000)])
def test_boxes_are_torchvision_s(h, w):
    "Areas, aspect ratios and places, by Kolmogorov and Smirnov"
    torch.manual_seed(0)
    rng,n = np.random.default_rng(0),3000
    ours = np.array([random_box(h, w, rng) for _ in range(n)])
    theirs = np.array([RandomResizedCrop.get_params(torch.empty(3, h, w), (.08,1.), (3/4,4/3))
                       for _ in range(n)])[:,[1,0,3,2]]
    def measures(boxes):
        left,top,bw,bh = boxes.T.astype(float)
        return bw*bh, bw/bh, left, top
    for a,b in zip(measures(ours), measures(theirs)): assert scipy.stats.ks_2samp(a, b).pvalue > .001

def gradient(x):
    return np.abs(np.diff(x.astype(float), axis=0)).mean() + np.abs(np.diff(x.astype(float), axis=1)).mean()

def test_crops_are_sharp(tmp_path):
    "As sharp as if they were cut from the original; a crop of the image that was shrunk first is a blur"
    big = photograph(0, 1600, 1200).resize((1600,1200))
    big.save(tmp_path/'x.jpg', quality=95)
    with Image.open(tmp_path/'x.jpg') as im: whole = im.convert('RGB')
    thumbnail,rng,ours,original,before = whole.resize((299,224)),np.random.default_rng(0),[],[],[]
    for _ in range(100):
        l,t,w,h = box = random_box(1200, 1600, rng, (.08,.08))
        ours.append(gradient(cut_crops(tmp_path/'x.jpg', ImageReader(), (224,224), lambda *_: [(*box,False)])[0]
                             .permute(1,2,0).numpy()))
        original.append(gradient(np.asarray(whole.resize((224,224), Image.BICUBIC, (l,t,l+w,t+h)))))
        s = 299/1600
        before.append(gradient(np.asarray(thumbnail.resize((224,224), Image.BICUBIC, (l*s,t*s,(l+w)*s,(t+h)*s)))))
    assert np.mean(ours) >= .95*np.mean(original) and np.mean(before) < .6*np.mean(original)

def test_no_more_is_decoded_than_is_needed(tmp_path, monkeypatch):
    photograph(0, 1600, 1200).save(tmp_path/'x.jpg')
    sizes,load = [],JpegImagePlugin.JpegImageFile.load
    def _load(self):
        sizes.append(self.size)
        return load(self)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'load', _load)
    for box,width in (((0,0,800,600), 200), ((0,0,400,300), 400), ((0,0,200,150), 800), ((5,5,199,150), 1600)):
        sizes.clear()
        cut_crops(tmp_path/'x.jpg', ImageReader(), (75,100),
            lambda h,w: [(*box,False)] if (h,w) == (1200,1600) else None)
        assert sizes[0][0] == width

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['jpg','png'])
def test_crops_of_turned_images(tmp_path, orientation, suffix):
    from test_images_of_people import turned
    upright = photograph(3)
    im,exif = turned(upright, orientation)
    im.save(tmp_path/f'x.{suffix}', exif=exif, quality=95)
    draw = two_crops(1., np.random.default_rng(5), (.3,1.))
    boxes = draw(240, 320)
    ours = cut_crops(tmp_path/f'x.{suffix}', ImageReader(), (64,64), lambda h,w: boxes if (h,w) == (240,320) else None)
    right = cut_crops(upright, ImageReader(), (64,64), lambda h,w: boxes)
    assert (ours.int() - right).abs().float().mean() < (6 if suffix == 'jpg' else .01)

@pytest.mark.parametrize('mode,channels', [('RGB',3), ('L',1)])
def test_crops_are_pillow_s(mode, channels):
    "By its bicubic filter, enlarged or made smaller, to within one of 256 levels, and flipped"
    im = photograph(2, 400, 300).convert(mode)
    for l,t,w,h in ((0,0,400,300), (37,5,120,200), (200,100,40,40)):
        ours = cut_crops(im, ImageReader(channels), (96,64), lambda *_: [(l,t,w,h,False),(l,t,w,h,True)])
        right = (torch.tensor(np.array(im.crop((l,t,l+w,t+h)).resize((64,96), Image.BICUBIC)))
                 .view(96, 64, channels).permute(2,0,1))
        assert (ours[0].int() - right).abs().max() <= 1 and torch.equal(ours[1].flip(-1), ours[0])

def test_other_images_are_cut_too(tmp_path):
    "Grey, deep, transparent, of many channels"
    x = np.random.default_rng(0).integers(0, 4096, (80,100), dtype=np.uint16)
    draw = two_crops(1., np.random.default_rng(0), (.08,1.))
    images = ((x,ImageReader(1, (0,4095))),(Image.new('RGBA', (100,80)),ImageReader()),
              (np.zeros((80,100,5), np.uint8),ImageReader(5)))
    for image,reader in images:
        assert cut_crops(image, reader, (32,48), draw).shape == (2,reader.channels,32,48)
    assert (cut_crops(Image.new('RGBA', (100,80)), ImageReader(), (32,48), draw) == 255).all()

# Whose crops they are

def test_crops_do_not_depend_on_processes(photos):
    "Nor are two epochs the same, nor the two crops of an image"
    seen = [torch.cat([b[0] for b in loader(photos, n)]) for n in (0,1,2)]
    for x in seen: assert torch.equal(x, seen[0]) and x.shape[1:] == (2,3,64,64)
    assert not torch.equal(seen[0][:,0], seen[0][:,1])
    dl = loader(photos)
    a,b = (sorted(o.numpy().tobytes() for o in torch.cat([b[0] for b in dl])) for _ in range(2))
    assert not set(a) & set(b)

@pytest.mark.parametrize('workers', [0,2])
def test_resumed_inside_an_epoch(photos, tmp_path, quiet, workers):
    "Equal weights, bit for bit"
    class StopAt(Callback):
        run_valid,order = False,2000
        def after_batch(self):
            if (self.epoch,self.iter) == (1,2): raise InterruptedError('stopped')
    def fit(*cbs):
        set_seed(7)
        learn = quiet(clae_learner(get_dls(photos, bs=4, size=48, num_workers=workers), resnet8))
        learn.fit_one_cycle(2, 1e-3, cbs=cbs)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    whole = fit()
    with pytest.raises(InterruptedError, match='stopped'): fit(Checkpoint(tmp_path/'c', 1), StopAt())
    assert torch.equal(fit(Resume(tmp_path/'c')), whole)

# What fastai expects

def test_fastai_finds_what_it_expects(photos, tmp_path, quiet):
    dls = get_dls(photos, bs=4, size=48, num_workers=0)
    learn = quiet(clae_learner(dls, resnet8))
    assert learn.dls.one_batch()[0].shape == (4,2,3,48,48) and learn.dls.valid.one_batch()[0].shape[1:] == (3,48,48)
    learn.dls.show_batch(max_n=2)
    learn.fit(1)
    learn.summary()
    with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False)
    learn.show_views(2)
    assert learn.get_preds(ds_idx=0)[0].shape == (20,64) and learn.get_preds()[0].shape == (4,64)
    file = get_image_files(photos)[0]
    z = [learn.predict(o)[2] for o in (file, str(file), Image.open(file), np.array(Image.open(file)))]
    for o in z[1:]: torch.testing.assert_close(o, z[0], rtol=0, atol=.05) # the file alone is decoded at another scale
    learn.export(tmp_path/'x.pkl')
    torch.testing.assert_close(quiet(load_learner(tmp_path/'x.pkl')).predict(file)[2], z[0])
    # the same dls, for learners of other kinds
    assert dls.one_batch()[0].shape == (4,3,48,48)
    for other in (vision_learner(dls, resnet18, pretrained=False), encoder_learner(dls, learn, metrics=accuracy)):
        quiet(other).fit(1)

def test_in_a_data_block_of_ones_own(photos, quiet):
    block = DataBlock([ImageBlock], get_items=get_image_files, item_tfms=TwoCrops(32, area=(.2,1.)))
    dls = block.dataloaders(photos, bs=4, num_workers=0)
    assert dls.one_batch()[0].shape == (4,2,3,32,32) and dls.valid.one_batch()[0].shape[1:] == (3,32,32)
    learn = quiet(clae_learner(dls, resnet8))
    learn.fit(1)
    assert learn.encoder_info['size'] == [32,32] and extract_features(learn, dls.train)[0].shape[1] == 64

def test_views_smaller_than_images(photos, quiet):
    "fastai's presizing: crops are cut on the device"
    dls = DataBlock([ImageBlock], get_items=get_image_files, item_tfms=Resize(96)).dataloaders(
        photos, bs=4, num_workers=0)
    learn = quiet(clae_learner(dls, resnet8, size=32))
    learn.fit(1)
    x = dls.one_batch()[0]
    assert learn.clae.views(x)[0].shape == (4,3,32,32) and learn.clae.normalize(x).shape == (4,3,32,32)
    assert learn.encoder_info['size'] == [32,32]
    files = quiet(clae_learner(get_dls(photos, bs=4, num_workers=0, size=96), resnet8, size=(32,48)))
    assert files.dls.one_batch()[0].shape == (4,2,3,32,48) and files.dls.valid.one_batch()[0].shape[1:] == (3,32,48)

@pytest.mark.parametrize('method,least', [('plain',.2), ('simclr',.08)])
def test_crops_are_the_method_s(photos, method, least):
    learn = clae_learner(get_dls(photos, bs=4, size=32, num_workers=0), resnet8, method=method)
    assert learn.dls.train_ds.area == (least,1.)
    x = torch.rand(4, 2, 3, 32, 32)
    torch.manual_seed(0)
    views = learn.clae.views(x)
    assert views[0].shape == (4,3,32,32) and not any(o in str(learn.clae.views.aug[2:]) for o in ('Crop','Flip'))

def test_views_of_ones_own_see_one_image(photos):
    learn = clae_learner(get_dls(photos, bs=4, size=32, num_workers=0), resnet8, views='digits')
    assert isinstance(learn.dls.train_ds, FileImages) and learn.dls.one_batch()[0].shape == (4,3,32,32)

# The first minute

program = '''
import sys, time
from clae_fastai.all import *
from pathlib import Path
n,look = 0,ImageReader.look
def counted(self, file):
    global n
    n += 1
    time.sleep(.01)
    return look(self, file)
ImageReader.look = counted
dls = get_dls(sys.argv[1], bs=4, size=32, num_workers=0)
print(n, len(dls.one_batch()))
'''

def test_two_processes_check_once(tmp_path):
    (tmp_path/'program.py').write_text(program)
    for c in 'ab':
        (tmp_path/'x'/c).mkdir(parents=True)
        for i in range(40): photograph(i, 80, 72).save(tmp_path/'x'/c/f'{i}.jpg')
    both = [subprocess.Popen([sys.executable, tmp_path/'program.py', tmp_path/'x'], stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    counts = [p.communicate(timeout=120)[0].split()[-2:] for p in both]
    assert [p.returncode for p in both] == [0,0] and sorted(int(n) for n,_ in counts) == [0,80]

def test_all_that_is_broken_is_listed(tmp_path):
    for i in range(6): (tmp_path/f'{i}.png').write_text('x')
    photograph(0, 80, 72).save(tmp_path/'7.png')
    with pytest.raises(ValueError, match='6 of 7 .* listed in .*unreadable.txt'): get_dls(tmp_path, bs=2)
    assert len((tmp_path/'.clae-unreadable.txt').read_text().splitlines()) == 6

@pytest.mark.parametrize('bs,steps', [(4,5), (20,1)])
def test_what_a_run_would_take(cli, photos, bs, steps):
    "Also where an epoch has fewer steps than are timed"
    r = cli('clae_train', '--path', photos, '--arch', 'resnet8', '--size', 32, '--bs', bs, '--epochs', 3, '--dry-run')
    assert (r.returncode == 0 and '20 training images of 2 classes' in r.stdout and
            f'{steps} steps an epoch' in r.stdout), r.stderr
    assert 'A step takes' in r.stdout and 'GiB' in r.stdout and f'3 epochs of {steps} steps take about' in r.stdout
    assert not (cli.cwd/'runs').exists()

def test_how_long_a_run_takes(cli, photos):
    r = cli('clae_train', '--path', photos, '--arch', 'resnet8', '--size', 48, '--bs', 2, '--epochs', 2)
    assert r.returncode == 0 and 'to go.' in r.stdout and 'raw pixels, at most 32x32' in r.stdout, r.stderr

@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['simclr-imagenet100','simclr-tinyimagenet'])
def test_recipes_of_photographs(cli, recipe):
    "At the recipe's own size, on made-up images in the right layout"
    import layouts
    writer = getattr(layouts, recipe.removeprefix('simclr-'))
    writer(cli.cwd/'data')
    if recipe.endswith('100'): # enough for a few batches
        for i,f in enumerate(sorted((cli.cwd/'data').glob('train/*/*.JPEG'))[:40]):
            photograph(i, 400, 300).save(f)
    else:
        for i in range(40):
            layouts.image(cli.cwd/'data'/'tiny-imagenet-200'/'train'/'n01443537'/'images'/f'x{i}.JPEG', i, (64,64))
    r = cli('clae_train', '--recipe', recipe, '--path', 'data', '--limit', 32, '--bs', 8, '--epochs', 1, '--workers', 0)
    assert r.returncode == 0, r.stderr
    assert next((cli.cwd/'runs').glob('*/summary.json')) and ' 4 steps an epoch' in r.stdout

# Memory

def family(pid):
    "A process and those that it started"
    children = [int(o) for task in Path(f'/proc/{pid}/task').glob('*/children') for o in task.read_text().split()]
    return [pid, *(o for child in children for o in family(child))]

def peak_memory(*command, cwd):
    "MiB of a command and its processes at the most; what they share is counted once (PSS)"
    p,most = subprocess.Popen(
        [*map(str, command)], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True),0
    while p.poll() is None:
        with contextlib.suppress(OSError, StopIteration): # one has ended meanwhile
            maps = [open(f'/proc/{o}/smaps_rollup').read().splitlines() for o in family(p.pid)]
            most = max(most, sum(int(next(l for l in o if l.startswith('Pss:')).split()[1]) for o in maps)/1024)
        time.sleep(.1)
    assert p.returncode == 0, p.stderr.read()
    return most

on_random_tensors = '''
from clae_fastai.all import *
images = MemoryImages(torch.randint(256, (64,3,128,128), dtype=torch.uint8))
with (learn := clae_learner(memory_dls(images, images.take([])), resnet18)).no_bar(): learn.fit_one_cycle(2)
'''

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='memory is read from /proc')
def test_memory_of_three_thousand_photographs(tmp_path):
    "Two processes that read, the final table and all: little more than the training itself"
    for i in range(3000):
        f = tmp_path/'photos'/f'{i%10}'/f'{i}.jpg'
        f.parent.mkdir(parents=True, exist_ok=True)
        if i < 20: photograph(i, 640, 480).save(f, quality=90)
        else: shutil.copyfile(tmp_path/'photos'/f'{i%20%10}'/f'{i%20}.jpg', f) # what is linked is read once
    base = peak_memory(sys.executable, '-c', on_random_tensors, cwd=tmp_path)
    train = '--arch resnet18 --size 128 --epochs 1 --limit 128 --workers 2'.split() # of 600 images the table is made
    ours = peak_memory(Path(sys.executable).with_name('clae_train'), '--path', 'photos', *train, cwd=tmp_path)
    print(f'{ours:.0f} MiB, and {base:.0f} on random tensors')
    assert ours < base + 300

@pytest.mark.parametrize('suffix', ['jpg','png','webp'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_turned_once(tmp_path, turn, suffix):
    "Whatever a reader gives can be read again, by itself or by transforms that read"
    im,exif = Image.new('RGB', (96,64), 'white'),Image.Exif()
    im.paste('red', (0,0,96,16))
    exif[0x112] = turn
    for i in range(4): im.save(tmp_path/f'{i}.{suffix}', exif=exif)
    reader = ImageReader()
    once = reader(tmp_path/f'0.{suffix}')
    assert np.array_equal(np.array(reader(once)), np.array(once)) and reader(once).size == once.size
    block = DataBlock([TransformBlock(type_tfms=reader, batch_tfms=IntToFloatTensor)], get_items=get_image_files,
        splitter=IndexSplitter([0]), item_tfms=TwoCrops(once.size[::-1]))
    x, = block.dataloaders(tmp_path, bs=1, num_workers=0, device='cpu').valid.one_batch()
    assert np.abs(255*x[0].permute(1,2,0).numpy() - np.array(once)).max() <= 1
