#!/usr/bin/env python3
"""What it costs to watch for collapse: epochs with and without `CollapseMonitor`,
`python benchmarks/bench_monitor.py [--rounds 7]`"""
import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import report
from bench_step import sync
from clae_fastai.all import CollapseMonitor, clae_learner, get_dls, resnet8, set_seed

def write_tiles(folder, n=400, size=96):
    "Photographs to train on, cut from scikit-learn's two"
    rng,images = np.random.default_rng(0),load_sample_images().images
    for i in range(n):
        im = images[i%2]
        y,x = (int(rng.integers(o - size)) for o in im.shape[:2])
        Image.fromarray(im[y:y+size,x:x+size]).save(folder/f'{i:04}.jpg', quality=90)

def epoch_seconds(learn, *cbs):
    sync(); start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
    sync()
    return time.perf_counter() - start

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    rounds = parser.parse_args().rounds
    set_seed(0)
    torch.set_num_threads(1)
    lines = ['| | step | seconds an epoch, median (range) | watched / not |', '|---|---|---|---|']
    with tempfile.TemporaryDirectory() as tmp:
        write_tiles(Path(tmp))
        with contextlib.redirect_stdout(io.StringIO()): tiles = get_dls('folder', tmp, bs=32, size=48, num_workers=0)
        sets = {'1,347 digits in memory, ResNet-8': (get_dls('digits', bs=64), resnet8, 'digits'),
                '380 photographs of 96 pixels in files, ResNet-18 of width 16 at 48': (tiles, 'resnet18_w16', 'simclr')}
        for name,(dls,arch,views) in sets.items():
            for eps in (0,.03):
                learn,t = clae_learner(dls, arch, views=views, eps=eps, every=1),{False: [], True: []}
                epoch_seconds(learn)
                for r in range(rounds):
                    for watched in (False,True)[::1 if r % 2 else -1]:
                        t[watched].append(epoch_seconds(learn, *([CollapseMonitor()] if watched else [])))
                lines.append(f"| {name} | {'CLAE' if eps else 'SimCLR'} | {report.spread(t[False])} "
                             f"| {report.ratio(t[True], t[False])} |")
    lines += ['', f'Batches of 64 and 32, {rounds} rounds in turns, one thread; '
              'ratios are geometric means of pairs with 95 % intervals.']
    report.write('monitor', 'python benchmarks/bench_monitor.py', lines)

if __name__ == '__main__': main()
