#!/usr/bin/env python3
"""What might make a CLAE step faster, tried: `python benchmarks/bench_tried.py [--rounds 7]`.
ResNet-18, 32x32, batch 64, each against the step as it is."""
import argparse
import os
import subprocess
import sys
import time

import numpy as np
import torch

import report
from bench_step import kinds, learner_step, sync, usable
from clae_fastai.all import Adam, set_seed

def compile_encoder(learn): learn.model.encoder = torch.compile(learn.model.encoder)

def no_weight_gradients(learn):
    "The attack with `requires_grad` off for all parameters"
    attack,params = learn.clae.attack,list(learn.model.parameters())
    def _attack(*args):
        for p in params: p.requires_grad_(False)
        try: return attack(*args)
        finally:
            for p in params: p.requires_grad_(True)
    learn.clae.attack = _attack

tried = {
    "fastai's `Adam`, a loop over the parameters": dict(opt_func=Adam),
    '`torch.compile` of the encoder, which fuses batch norm, ReLU and sums': dict(change=compile_encoder),
    '`requires_grad_(False)` for the parameters during the attack': dict(change=no_weight_gradients)}
allocator = dict(MALLOC_MMAP_THRESHOLD_=str(2**32), MALLOC_TRIM_THRESHOLD_=str(2**33))

def timed(step):
    sync(); start = time.perf_counter()
    step()
    sync()
    return time.perf_counter() - start

def process(kind, steps=6):
    "Median seconds of a step in this process"
    step = learner_step(.03, *kinds[kind])
    step()
    print(np.median([timed(step) for _ in range(steps)]))

def fresh(kind, **env):
    return float(subprocess.run([sys.executable, __file__, '--process', kind], env={**os.environ, **env},
                                capture_output=True, text=True, check=True).stdout.split()[-1])

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--process')
    args = parser.parse_args()
    set_seed(0)
    if args.process: return process(args.process)
    lines = ['| tried | precision | as it is / tried |', '|---|---|---|']
    for kind in usable()[1:]:
        steps,t = {'as it is': learner_step(.03, *kinds[kind])},{}
        for name,kw in tried.items(): steps[name] = learner_step(.03, *kinds[kind], **kw)
        for name,s in steps.items():
            for _ in range(2): s()
            t[name] = []
        for r in range(args.rounds):
            for name in list(steps)[::1 if r % 2 else -1]: t[name].append(timed(steps[name]))
        lines += [f"| {name} | {kind} | {report.ratio(t['as it is'], t[name])} |" for name in tried]
        del steps
    for kind in usable()[1:]:
        pairs = [(fresh(kind), fresh(kind, **allocator)) for _ in range(max(3, args.rounds//2))]
        lines.append(f"| allocator that keeps freed memory, `{' '.join(f'{k}={v}' for k,v in allocator.items())}` "
                     f"| {kind} | {report.ratio(*zip(*pairs))} |")
    lines += ['', 'ResNet-18, 3x3 stem, 32x32 images, batch 64. '
              f'Geometric means of pairs with 95 % intervals, {args.rounds} rounds in one process; '
              f'the allocator: {max(3, args.rounds//2)} pairs of fresh processes. Above 1: it helps.']
    report.write('tried', 'python benchmarks/bench_tried.py', lines)

if __name__ == '__main__': main()
