#!/usr/bin/env python3
"""Milliseconds of an optimiser's step, ResNet-18 with dual batch norm:
`python benchmarks/bench_optimizer.py [--rounds 25]`"""
import argparse
import time

import torch

import report
from bench_step import bare_model, sync
from clae_fastai.all import Adam, FusedAdam, set_seed

def torchs(params, lr): return torch.optim.AdamW(params, lr, fused=True)

optimisers = {'`FusedAdam`': FusedAdam, "fastai's `Adam`": Adam, "torch's `AdamW`, fused": torchs}

def optimiser(make):
    "One that has weights of its own, which have gradients"
    params = list(bare_model(False).parameters())
    for p in params: p.grad = torch.randn_like(p)
    return make(params, lr=1e-3)

def milliseconds(opt):
    sync(); start = time.perf_counter()
    opt.step()
    sync()
    return 1000*(time.perf_counter() - start)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=25)
    rounds = parser.parse_args().rounds
    set_seed(0)
    opts = {name: optimiser(make) for name,make in optimisers.items()}
    lines = ['| threads | optimiser | ms, median (range) | this / ours |', '|---|---|---|---|']
    for n in (1,2):
        torch.set_num_threads(n)
        t = {name: [] for name in opts}
        for name in opts: milliseconds(opts[name])
        for r in range(rounds):
            for name in list(opts)[::1 if r % 2 else -1]: t[name].append(milliseconds(opts[name]))
        ours = t['`FusedAdam`']
        for name in opts:
            lines.append(f"| {n} | {name} | {report.spread(t[name])} "
                         f"| {'' if t[name] is ours else report.ratio(t[name], ours)} |")
    n_params = len(optimiser(FusedAdam).param_lists[0])
    lines += ['', f'A ResNet-18 with dual batch norm, 3x3 stem, and its head: {n_params} tensors. '
              f'{rounds} rounds in turns; ratios are geometric means of pairs with 95 % intervals.']
    report.write('optimizer', 'python benchmarks/bench_optimizer.py', lines)

if __name__ == '__main__': main()
