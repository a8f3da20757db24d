#!/usr/bin/env python3
"""How fast photographs are read: `python benchmarks/bench_photos.py [DIR] [--n N] [--rounds R]` writes
results/photos.md.

Two random crops of 224 pixels of each photograph, from the file to the batch that a loader hands over: ours, a bare
loop of Pillow over the same boxes, torchvision's two crops of the whole picture, lightly's `SimCLRTransform` (complete
views) in PyTorch's loader; and what version 0.1.0 did, one image shrunk to 224 through a `DataBlock`. With one thread
and no further process, and ours with 1 and 2 processes, too. All take turns; a ratio is the geometric mean over the
rounds, with its 95 % interval. Then how long `clae_train` on 3,000 photographs of 640x480 takes from its start, imports
left out, to its first step.

DIR holds photographs; without it they are mosaics of CIFAR-10 images (../shared/data), of 640x480 pixels, and of
4000x3000 in JPEG files of about 1, 3 and 5 MB."""
import argparse
import contextlib
import functools
import io
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import (
    DataBlock, IndexSplitter, IntToFloatTensor, ItemGetter, PILBase, PILImage, Resize, TransformBlock, get_image_files)
from lightly.transforms import SimCLRTransform
from PIL import Image
from torchvision import transforms as T

import report
from clae_fastai import runs
from clae_fastai.all import clae_learner, get_dls, random_box, resnet18

side,bs = 224,8
cifar = Path(__file__).parent.parent.parent/'shared'/'data'/'cifar10_12k.npz'

@functools.cache
def cifar_images(): return np.load(cifar)['x_train']

def mosaic(width, height, seed):
    "A photograph of its size: CIFAR-10 images side by side, each enlarged eight times"
    draw,images = np.random.default_rng(seed),cifar_images()
    rows = [np.concatenate(images[draw.choice(len(images), math.ceil(width/256))], 1)
            for _ in range(math.ceil(height/256))]
    im = Image.fromarray(np.concatenate(rows)).resize(
        (256*math.ceil(width/256), 256*math.ceil(height/256)), Image.BICUBIC)
    pixels = np.asarray(im.crop((0, 0, width, height))).astype(np.int16)
    # a sensor's noise
    return Image.fromarray((pixels + draw.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8))

def save(im, file, megabytes):
    "As JPEG of about this size, or of quality 90"
    low,high = 1,100
    while megabytes and high - low > 1:
        quality = (low + high)//2
        im.save(data := io.BytesIO(), 'JPEG', quality=quality)
        low,high = (quality,high) if data.tell() < megabytes*1e6 else (low,quality)
    im.save(file, 'JPEG', quality=low if megabytes else 90)

def photographs(root, n):
    "`{what they are: folder}`"
    sets = {'640x480': (640,480,0), **{f'4000x3000, {mb} MB': (4000,3000,mb) for mb in (1,3,5)}}
    for k,(name,(w,h,mb)) in enumerate(sets.items()):
        folder = root/str(k)
        folder.mkdir()
        for i in range(n if k == 0 else max(bs, n//8)): save(mosaic(w, h, i%4), folder/f'{i:04}.jpg', mb)
    return {name: root/str(k) for k,name in enumerate(sets)}

# Each takes a folder, and gives a function that reads all its photographs once, up to the batches,
# and returns their number

def learner(folder, workers):
    with contextlib.redirect_stdout(io.StringIO()):
        return clae_learner(get_dls(folder, size=side, bs=bs, num_workers=workers, valid_pct=0, device='cpu'), resnet18)

def ours(folder, workers=0):
    dl = learner(folder, workers).dls.train
    return lambda: sum(len(b[0]) for b in dl)

def complete(folder):
    "And colour, blur and normalisation, which otherwise are the device's work"
    learn = learner(folder, 0)
    return lambda: sum(len(learn.clae.views(b[0])[0]) for b in learn.dls.train)

def pillow(folder, resample=Image.BICUBIC):
    "The same two crops: the boxes from the header, the smallest scale at which the smaller one has enough pixels"
    files,draw = get_image_files(folder),np.random.default_rng(0)
    def crops(file):
        with Image.open(file) as im:
            w,h = im.size
            boxes = [random_box(h, w, draw) for _ in range(2)]
            share = max(max(side/bw, side/bh) for _,_,bw,bh in boxes)
            im.draft('RGB', (math.ceil(w*share), math.ceil(h*share)))
            im.load()
            s,t = im.width/w,im.height/h
            for l,u,bw,bh in boxes:
                crop = im.resize((side,side), resample, (l*s,u*t,(l+bw)*s,(u+bh)*t), reducing_gap=2)
                yield crop.transpose(Image.FLIP_LEFT_RIGHT) if draw.random() < .5 else crop
    return lambda: sum(len([*crops(f)]) for f in files)//2

class Files(torch.utils.data.Dataset):
    "As in PyTorch's own examples"
    def __init__(self, folder, tfm): self.files,self.tfm = get_image_files(folder),tfm
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        with Image.open(self.files[i]) as im: return self.tfm(im.convert('RGB'))

def two(tfm): return lambda im: (tfm(im), tfm(im))

def loaded(tfm):
    def _make(folder):
        dl = torch.utils.data.DataLoader(Files(folder, tfm), bs)
        return lambda: sum(len(b[0]) for b in dl)
    return _make

def open_image(file):
    im = PILBase.create(file, mode=None)
    return PILImage(im.convert('RGB'))

def first_version(folder):
    "Its `file_dls`, word for word but for the number of channels"
    items = [(f,None) for f in get_image_files(folder)]
    images = TransformBlock(type_tfms=open_image, batch_tfms=IntToFloatTensor)
    dls = DataBlock([images], get_x=ItemGetter(0), n_inp=1, splitter=IndexSplitter([]), item_tfms=Resize(side)
        ).dataloaders(items, bs=bs, num_workers=0, device='cpu')
    return lambda: sum(len(b[0]) for b in dls.train)

ways = {
    'ours': ours, 'ours, 1 process': lambda f: ours(f, 1), 'ours, 2 processes': lambda f: ours(f, 2),
    'ours, complete views on the CPU': complete, 'Pillow, the same crops': pillow,
    'Pillow, by its fastest good filter': lambda f: pillow(f, Image.HAMMING),
    "torchvision's two crops":
        loaded(two(T.Compose([T.RandomResizedCrop(side), T.RandomHorizontalFlip(), T.PILToTensor()]))),
    "lightly's SimCLRTransform": loaded(SimCLRTransform(side)), 'version 0.1.0, one image': first_version}

def waits(folder, workers, steps=6):
    "Share of a training step in which the model waits for data"
    learn = learner(folder, workers)
    opt,waiting,start,last = torch.optim.SGD(learn.model.parameters(), 1e-3),0.,None,time.perf_counter()
    for i,b in enumerate(learn.dls.train):
        now = time.perf_counter()
        if i: waiting += now - last
        start = start or now
        z_q,z_p = learn.model(*learn.clae.views(b[0]))
        learn.loss_func.pair(z_q, z_p).backward()
        opt.step()
        opt.zero_grad()
        last = time.perf_counter()
        if i == steps: break
    return waiting/(last - start)

class FirstStep(KeyboardInterrupt): pass

def start_of_training(folder, tmp, n=3000, n_classes=10):
    "Seconds to the first step of `clae_train`, on its first start and on its second"
    files = get_image_files(folder)
    for i in range(n):
        file = tmp/'photos'/f'{i%n_classes}'/f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[i%len(files)], file)
    def _stop(self): raise FirstStep
    runs.RunLog.before_batch,seconds = _stop,[]
    for _ in range(2):
        start = time.perf_counter()
        with contextlib.suppress(FirstStep), contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(tmp):
            runs.train(path='photos', arch='resnet18', size=128, epochs=1)
        seconds.append(time.perf_counter() - start)
    return seconds

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', metavar='DIR')
    p.add_argument('--n', type=int, default=128, help='photographs of 640x480; an eighth of the large ones')
    p.add_argument('--rounds', type=int, default=7)
    a = p.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as tmp:
        sets = {Path(a.folder).name: Path(a.folder)} if a.folder else photographs(Path(tmp), a.n)
        for name,folder in sets.items():
            readers = {way: make(folder) for way,make in ways.items()}
            rates = {way: [] for way in ways}
            for read in readers.values(): read() # files come from the cache of the disk
            for _ in range(a.rounds):
                for way,read in readers.items():
                    start = time.perf_counter()
                    n = read()
                    rates[way].append(n/(time.perf_counter() - start))
            lines += [f'| {name} | images/s | ours / this |', '|---|---|---|']
            for way,r in rates.items():
                ratio = '' if way.startswith('ours') else report.ratio(rates['ours'], r)
                lines.append(f'| {way} | {np.median(r):.1f} | {ratio} |')
            lines += ['', f'A step of SimCLR with a ResNet-18, batch {bs}, waits for data '
                f'{100*waits(folder, 0):.0f} % of its time without further processes, '
                f'{100*waits(folder, 1):.0f} % with one.', '']
        first,second = start_of_training(next(iter(sets.values())), Path(tmp))
    lines += [f'`clae_train` on 3,000 photographs of {next(iter(sets))} is at its first step after '
        f'{first:.1f} seconds, on its second start after {second:.1f}; imports left out.', '']
    lines.append(f'Two crops of {side} pixels, batch {bs}, {a.rounds} rounds in turns, one thread.')
    report.write('photos', 'python benchmarks/bench_photos.py', lines)

if __name__ == '__main__': main()
