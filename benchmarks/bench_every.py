#!/usr/bin/env python3
"""Mean seconds of a step where the adversary comes rarely: `python benchmarks/bench_every.py [--rounds 15]` writes
results/every.md. A round is a fit of each learner in turn: eight steps, two whole cycles of `every=4`, of the
ResNet-18 that other tables are of, and forty, about an epoch of its trials, of the encoder and images of the scale
`fast`, by whose ratios trials of equal units become trials of equal seconds."""
import argparse
import time

import torch
from fastai.vision.all import set_seed

import report
from bench_step import learner_of, sync
from clae_fastai.all import resnet10_w16, resnet18

kinds = {'SimCLR': dict(eps=0.), 'CLAE': {}, 'CLAE, every=4': dict(every=4), 'random signs': dict(attack='random'),
    'random signs, every=4': dict(attack='random', every=4)}
settings = {'ResNet-18, 32 pixels, batch 64': (8, 64, dict(arch=resnet18)),
    'ResNet-10 of width 16, 16 pixels out of 32, batch 128': (40, 128, dict(arch=resnet10_w16, size=16))}

def learner(steps, bs, options):
    learn = learner_of(torch.randint(0, 256, (steps*bs,3,32,32), dtype=torch.uint8), bs, channels_last=True, **options)
    learn.dls.loaders[1:] = [learn.dls.valid.new([])] # steps of training alone
    return learn

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args()
    set_seed(0)
    lines = ['| encoder | step | units | seconds of a step, median (range) | this / SimCLR | in units |',
             '|---|---|---|---|---|---|']
    for name,(steps,bs,own) in settings.items():
        learners = {k: learner(steps, bs, own | options) for k,options in kinds.items()}
        times = {k: [] for k in kinds}
        for r in range(args.rounds + 1): # the first one warms up
            for k in list(kinds)[::1 if r % 2 else -1]:
                with learners[k].no_bar():
                    sync()
                    start = time.perf_counter()
                    learners[k].fit(1, 3e-4)
                    sync()
                if r: times[k].append((time.perf_counter() - start)/steps)
        units = {k: l.clae.units for k,l in learners.items()}
        lines += [f"| {name} | {k} | {units[k]:g} | {report.spread(t, '.3f')} | {report.ratio(t, times['SimCLR'])} "
                  f"| {units[k]/6:.2f} |" for k,t in times.items()]
    lines += ['', "Means over fits of 8 (ResNet-18) and 40 steps, whole cycles of four, views, loss, optimiser "
              f"and logging with them; {args.rounds} rounds, ratios are geometric means of pairs with 95 % intervals; "
              "fp32, channels_last."]
    report.write('every', f'python benchmarks/bench_every.py --rounds {args.rounds}', lines)

if __name__ == '__main__': main()
