#!/usr/bin/env python3
"""What kNN and the linear probe take beyond the features:
`python benchmarks/bench_memory.py [IMAGES] [NUMBERS] [CLASSES]`.

By default 130,000 x 2,048 features of 100 classes, those of a ResNet-50 on ImageNet-100, and a test image for 50 of
these: that writes results/memory.md. Of the probe's L-BFGS one penalty and two steps are enough: all need the same
memory."""
import json
import sys
import time
from pathlib import Path

import scipy.optimize
import torch

import report
from clae_fastai.all import knn_predict, linear_probe

minimize = scipy.optimize.minimize

def two_steps(*args, options, **kwargs): return minimize(*args, options={**options, 'maxiter': 2}, **kwargs)

def measure(call):
    "Seconds, and MiB that the process grows by at its largest"
    Path('/proc/self/clear_refs').write_text('5') # the largest size so far is the present one
    before,start = report.peak_memory(),time.perf_counter()
    call()
    return time.perf_counter() - start,(report.peak_memory() - before)/2**20

def main(n=130_000, d=2048, n_classes=100):
    def _data(m): return torch.randn(m, d).relu_(),torch.arange(m)%n_classes
    train,test,small = _data(n),_data(n//50),_data(4*n_classes)
    scipy.optimize.minimize = two_steps
    calls = dict(kNN  =lambda train, test: knn_predict(*train, test[0], k=min(200, len(train[0]))),
                 probe=lambda train, test: linear_probe(train, test, l2s=[1.], device='cpu'))
    rows = []
    for name,call in calls.items():
        call(small, small) # libraries that are loaded at their first use are no matter of the features
        seconds,extra = measure(lambda: call(train, test))
        rows.append(f'| {name} | {extra:,.0f} |')
        print(json.dumps({'what': name, 'seconds': round(seconds, 1), 'MiB': round(extra),
                          'MiB of the features': round(n*d*4/2**20)}))

    return rows

if __name__ == '__main__':
    rows = main(*map(int, sys.argv[1:]))
    if len(sys.argv) == 1:
        head = ['| beyond 130,000 x 2,048 features in float32 (1,016 MiB) | MiB |', '|---|---|']
        report.write('memory', 'python benchmarks/bench_memory.py',
                     [*head, *rows, '', f'One run, {torch.get_num_threads()} threads.'])
