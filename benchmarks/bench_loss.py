#!/usr/bin/env python3
"Time and peak memory of the losses, forward and backward, over the batch size: `python benchmarks/bench_loss.py`"
import argparse
import subprocess
import sys
import time

import torch

import report
from clae_fastai.all import NTXentLoss, PlainLoss, UELLoss, default_device

losses,sizes,dim = dict(ntxent=NTXentLoss, uel=UELLoss, plain=PlainLoss),(256,1024,4096),128

def embeddings(n):
    return [torch.nn.functional.normalize(torch.randn(n, dim, device=default_device()), dim=1).requires_grad_()
            for _ in range(2)]

def process(name, n, times):
    "Peak memory in bytes of this process, after `times` forwards and backwards"
    loss = losses[name]()
    loss(*embeddings(8)).backward()
    z = embeddings(n)
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    for _ in range(times): loss(*z).backward()
    print(report.peak_memory())

def peak(name, n, times):
    return int(subprocess.run([sys.executable, __file__, '--process', name, str(n), str(times)],
                              capture_output=True, text=True, check=True).stdout.split()[-1])

def seconds(name, n, repeats=5):
    loss,z,t = losses[name](),embeddings(n),[]
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss(*z).backward()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        t.append(time.perf_counter() - start)
    return t[1:]

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--process', nargs=3)
    args = parser.parse_args()
    if args.process: return process(args.process[0], *map(int, args.process[1:]))
    lines = ['| loss | batch | seconds, median (range) | extra memory, MiB | in matrices of 2B x 2B float32 |',
             '|---|---|---|---|---|']
    for name in losses:
        for n in sizes:
            extra = peak(name, n, 2) - peak(name, n, 0)
            lines.append(f'| {name} | {n} | {report.spread(seconds(name, n), ".3f")} | {extra/2**20:,.0f} '
                         f'| {extra/(4*(2*n)**2):.1f} |')
    lines += ['', f'Forward and backward, {dim} dimensions. '
              'Extra memory: peak of a fresh process that does both, less the same process without.']
    report.write('loss', 'python benchmarks/bench_loss.py', lines)

if __name__ == '__main__': main()
