#!/usr/bin/env python3
"""Two views of 32x32 photographs: images in memory and kornia, against PIL transforms in two worker processes:
`python benchmarks/bench_views.py DIR` (CIFAR-10's images as a folder). Writes results/views.md. Rounds alternate
between the two, so that what else the machine does meets both."""
import sys
import time

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image

import report
from clae_fastai.all import TwoViews, clae_learner, get_dls, resnet18, set_seed

bs,n_batches,rounds = 256,20,7

class TwoPILViews(torch.utils.data.Dataset):
    "Each image twice through the SimCLR transforms, one image at a time, as the published code has it"
    def __init__(self, images):
        self.images = images
        self.tfm = T.Compose([T.RandomResizedCrop(32, (.08,1.)), T.RandomHorizontalFlip(),
                              T.RandomApply([T.ColorJitter(.8, .8, .8, .2)], p=.8), T.RandomGrayscale(.2),
                              T.ToTensor(), T.Normalize([.5]*3, [.5]*3)])
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        im = Image.fromarray(self.images[i])
        return self.tfm(im),self.tfm(im)

def seconds(batches, n=n_batches):
    "Time of `n` batches, after a first one that starts workers"
    it = iter(batches)
    next(it)
    start = time.perf_counter()
    for _ in range(n): next(it)
    return (time.perf_counter() - start)/n

def share_of_step(folder, bs=64, n=8):
    "Share of a CLAE ResNet-18 step that loading and augmenting take"
    learn = clae_learner(get_dls('cifar10', folder, bs=bs, limit=bs*n), resnet18)
    views = learn.clae.views
    data = np.median([seconds((views(b[0]) for b in learn.dls.train), n-1) for _ in range(rounds)])
    with learn.no_bar(), learn.no_logging():
        learn.dls.loaders[1] = learn.dls.valid.new(learn.dls.valid_ds.new_empty())
        start = time.perf_counter()
        learn.fit(1)
        step = (time.perf_counter() - start)/n
    return data,step

def main():
    set_seed(0)
    folder = sys.argv[1]
    dls = get_dls('cifar10', folder, bs=bs)
    views = TwoViews.from_preset('simclr', 32)
    pil = torch.utils.data.DataLoader(TwoPILViews(dls.train_ds.images.permute(0,2,3,1).numpy()),
                                      batch_size=bs, shuffle=True, drop_last=True, num_workers=2)
    t = np.array([[seconds(views(b[0]) for b in dls.train), seconds(pil)] for _ in range(rounds)])
    data,step = share_of_step(folder)
    lines = ['| two views of each image | images/s, median (range) |', '|---|---|',
             f'| in memory, kornia by batch | {report.spread(bs/t[:,0], ",.0f")} |',
             f'| PIL by image, two workers | {report.spread(bs/t[:,1], ",.0f")} |', '',
             f"Ratio of paired rounds: {report.ratio(t[:,1], t[:,0])}, {rounds} rounds of {n_batches} batches of {bs}, "
                 "SimCLR's augmentations, 32x32.",
             f"Loading a batch of 64 and making its views takes {1000*data:.0f} ms, "
                 f"{data/step:.1%} of a CLAE step of a ResNet-18 ({step:.2f} s)."]
    report.write('views', 'python benchmarks/bench_views.py DIR', lines)

if __name__ == '__main__': main()
