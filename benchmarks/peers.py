#!/usr/bin/env python3
"""Encoders after equal seconds: `python benchmarks/peers.py DIR [--seconds 180] [--seeds 3]`, on a machine that does
nothing else. DIR is a folder of CIFAR-10 images, train/<class>/*.png and test/<class>/*.png, such as `cifar10_report`
of `split_cifar10.py`.

lightly, its settings       SimCLR as lightly's CIFAR-10 benchmark has it: its transform without blur, loader, head,
                            loss at temperature .5; batches of 128, SGD (.06, momentum .9, decay 5e-4), cosine
lightly, our settings       the same with our optimiser, schedule, temperature and head
ours, the paper's settings  the recipe `simclr-cifar10`: CLAE in each step, temperature .5, batches of 256,
                            Adam at 3e-4
ours, recommended           `clae_learner` as it comes, batches of 128, one cycle at 3e-3

All train one encoder (resnet18_w16) from random weights on the same images at 32 pixels. Seconds are of training
alone: imports, the reading of files into memory, and the evaluations on the way stand outside. Schedules run by the
clock, so that each ends when its time does. One evaluator measures all: kNN and the linear probe of `evaluate`.
Writes results/peers.csv, peers.md and peers.png."""
import argparse
import contextlib
import io
import itertools
import os
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from fastai.vision.all import (Callback, CancelFitException, ChannelsLast, Normalize, ParamScheduler, combined_cos,
    imagenet_stats, set_seed)
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn

import report
from clae_fastai.all import (clae_learner, create_encoder, evaluate, get_dls, get_recipe, knn_predict, extract_features,
    methods, num_features, projection_head)

arch,side,bs,lr = 'resnet18_w16',32,128,3e-3
marks = (.25,.5,.75) # shares of the time after which kNN is measured on the way, on every fifth test image

class Clock:
    "Seconds of training, without those of looking; `looks` are (seconds, kNN)"
    def __init__(self, seconds, knn):
        self.seconds,self.knn,self.looks,self.left,self.steps = seconds,knn,[],list(marks),0
        self.start = time.perf_counter()
    @property
    def share(self): return (time.perf_counter() - self.start)/self.seconds
    def step(self):
        "After each step of training"
        self.steps += 1
        if not self.left or self.share < self.left[0]: return
        before = time.perf_counter()
        self.looks.append((self.left.pop(0)*self.seconds, self.knn()))
        self.start += time.perf_counter() - before

class Timed(Callback):
    "A fit whose schedule runs by the clock"
    order = ParamScheduler.order-1
    def __init__(self, clock): self.clock = clock
    def before_batch(self):
        if self.clock.share >= 1: raise CancelFitException
        self.learn.pct_train = self.clock.share
    def after_batch(self): self.clock.step()

def knn_of(model, dls):
    few = dls.valid.new(dls.valid_ds.take(range(0, len(dls.valid_ds), 5)))
    (x,y),(test_x,test_y) = (extract_features(model, dl) for dl in (dls.train,few))
    return (knn_predict(x, y, test_x) == test_y).float().mean().item()

def ours(folder, seconds, recipe=None):
    with contextlib.redirect_stdout(io.StringIO()): dls = get_dls(folder, bs=recipe.bs if recipe else bs)
    learn = clae_learner(dls, **(recipe.learner_kwargs() if recipe else {}) | dict(arch=arch), cbs=[ChannelsLast()])
    learn.dls.loaders[1:] = [learn.dls.valid.new(learn.dls.valid_ds.take([0,1]))] # valid_loss is not what is asked for
    whole = get_dls_quietly(folder)
    clock = Clock(seconds, lambda: knn_of(learn, whole))
    with learn.no_bar(), learn.no_logging():
        if recipe: learn.fit(10**6, recipe.lr, cbs=Timed(clock))
        else: learn.fit_one_cycle(10**6, lr, cbs=Timed(clock))
    return learn,whole,clock

def get_dls_quietly(folder, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()): return get_dls(folder, bs=256, drop_last=False, **kwargs)

def lightly(folder, seconds, own=True):
    encoder = create_encoder(arch, size=side)
    n = num_features(encoder, 3, side)
    head = (SimCLRProjectionHead(n, n, 128) if own
            else projection_head(n, methods['simclr']['head'], methods['simclr']['n_out']))
    model = nn.Sequential(encoder, nn.Flatten(), head).to(memory_format=torch.channels_last)
    loss_func = NTXentLoss() if own else NTXentLoss(methods['simclr']['temperature'])
    images = LightlyDataset(str(folder/'train'), transform=SimCLRTransform(input_size=side, gaussian_blur=0.))
    loader = torch.utils.data.DataLoader(images, bs, shuffle=True, drop_last=True,
                                         num_workers=os.cpu_count(), persistent_workers=True)
    if own:
        opt = torch.optim.SGD(model.parameters(), lr=.06, momentum=.9, weight_decay=5e-4)
        rate,momentum = combined_cos(0, .06, .06, 0.),None
    else: # what `fit_one_cycle` does
        opt = torch.optim.AdamW(model.parameters(), lr, betas=(.9,.99), eps=1e-5, weight_decay=.01)
        rate,momentum = combined_cos(.25, lr/25, lr, lr/1e5),combined_cos(.25, .95, .85, .95)
    whole = get_dls_quietly(folder, batch_tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)])
    clock,batches = (Clock(seconds, lambda: knn_of(encoder, whole)),
                     itertools.chain.from_iterable(itertools.repeat(loader)))
    model.train()
    for (x0,x1),*_ in batches:
        if clock.share >= 1: break
        share = min(clock.share, 1.)
        for group in opt.param_groups:
            group['lr'] = rate(share)
            if momentum: group['betas'] = (momentum(share),.99)
        loss = loss_func(*(model(x.contiguous(memory_format=torch.channels_last)) for x in (x0,x1)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        clock.step()
    return encoder,whole,clock

contenders = {
    'lightly, its settings': lightly,
    'lightly, our settings': lambda folder, seconds: lightly(folder, seconds, own=False),
    "ours, the paper's settings": lambda folder, seconds: ours(folder, seconds, get_recipe('simclr-cifar10')),
    'ours, recommended': ours}

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--seconds', type=float, default=180)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    rows = []
    for seed in range(args.seeds):
        names = list(contenders)
        for name in names[seed%4:] + names[:seed%4]: # nobody is always first
            set_seed(seed)
            model,dls,clock = contenders[name](args.folder, args.seconds)
            e = evaluate(model, dls)
            looks = [*clock.looks, (args.seconds, e.knn)]
            rows += [dict(contender=name, seed=seed, seconds=s, knn=k, linear=e.result if s == args.seconds else None,
                          steps=clock.steps) for s,k in looks]
            print(f"{name}, seed {seed}: {clock.steps} steps, kNN {100*e.knn:.1f}, linear probe {100*e.result:.1f}",
                  flush=True)
    write(pd.DataFrame(rows), args)

def write(df, args):
    df.to_csv(report.root/'results'/'peers.csv', index=False)
    end = df[df.seconds == df.seconds.max()].set_index('seed')
    def cell(name, metric): return end.loc[end.contender == name, metric].sort_index()*100
    def text(v): return f"{v.mean():.1f} ({', '.join(f'{o:.1f}' for o in v)})"
    def ahead(name, metric):
        if name == 'lightly, its settings' or args.seeds < 2: return ''
        return report.interval(cell(name, metric) - cell('lightly, its settings', metric))[0]
    lines = ['| trained by | steps | kNN (each seed) | ahead of lightly, its settings '
             '| linear probe (each seed) | ahead |', '|---|---|---|---|---|---|']
    lines += [f"| {n} | {end.loc[end.contender == n, 'steps'].mean():.0f} | "
              + ' | '.join(f'{text(cell(n, m))} | {ahead(n, m)}' for m in ('knn','linear')) + ' |'
              for n in contenders]
    n_train,n_test = (len([*(args.folder/o).rglob('*.png')]) for o in ('train','test'))
    lines += ['', f"Percent on {n_test:,} test images, of {arch} after {args.seconds:g} seconds of training on "
              f"{n_train:,} images of {side} pixels, {args.seeds} seeds; "
              "differences paired by seed, with 95 % intervals. What each is: benchmarks/peers.py."]
    report.write('peers', f'python benchmarks/peers.py DIR --seconds {args.seconds:g} --seeds {args.seeds}', lines)
    draw(df)

def draw(df):
    fig,ax = plt.subplots(figsize=(6.8,4), layout='tight')
    for i,name in enumerate(contenders):
        of = 100*df[df.contender == name].groupby('seconds')['knn'].agg(['mean','min','max'])
        ax.errorbar(of.index, of['mean'], [of['mean'] - of['min'], of['max'] - of['mean']],
                    marker='o', capsize=3, color=f'C{i}')
        ax.annotate(name, (of.index[-1], of['mean'].iloc[-1]), (8,0),
                    textcoords='offset points', va='center', color=f'C{i}')
    ax.set(xlabel='seconds of training', ylabel='kNN accuracy on test images, %',
           title='Mean of the seeds; bars to the least and greatest')
    ax.spines[['top','right']].set_visible(False)
    ax.grid(alpha=.3)
    fig.savefig(report.root/'results'/'peers.png', dpi=110)

if __name__ == '__main__': main()
