#!/usr/bin/env python3
"""What it costs to evaluate an encoder: `python benchmarks/bench_eval.py DIR [LIMIT]` (an image folder, CIFAR-10's for one; LIMIT training images, for a quick look). Writes results/eval.md:

- 1000 epochs of linear evaluation the authors' way, where the encoder runs on every batch of every epoch, extrapolated from two of them, against `extract_features` and `linear_probe('adam')`, measured whole;
- kNN of 10,000 queries against 50,000 features of 512 numbers: time, and memory beyond the features (the largest resident size of a process, less that of the same process without the call)."""
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import report
from clae_fastai.all import clae_learner, extract_features, get_dls, knn_predict, linear_probe, resnet18, set_seed

bs,epochs,measured = 256,1000,2
queries,bank,dim,budget = 10_000,50_000,512,256

def authors_epochs(learn, dls):
    "Seconds of each of `measured` epochs in which the encoder runs on every training and test batch"
    encoder = learn.model.encoder.eval()
    linear = nn.Linear(512, dls.c)
    opt = torch.optim.Adam(linear.parameters(), lr=3e-4)
    def _features(b):
        with torch.no_grad(): return encoder(learn.clae.normalize(b[0]))
    times = []
    for _ in range(measured):
        start = time.perf_counter()
        for b in dls.train:
            loss = F.cross_entropy(linear(_features(b)), b[1].as_subclass(torch.Tensor))
            opt.zero_grad(); loss.backward(); opt.step()
        for b in dls.valid: (linear(_features(b)).argmax(1) == b[1]).sum()
        times.append(time.perf_counter() - start)
    return times

def linear_evaluation(folder, limit):
    set_seed(0)
    dls = get_dls('folder', folder, bs=bs, limit=limit, device='cpu')
    learn = clae_learner(dls, resnet18)
    theirs = authors_epochs(learn, dls)
    start = time.perf_counter()
    train,test = (extract_features(learn, dl) for dl in dls.loaders)
    extracted = time.perf_counter() - start
    probe = linear_probe(train, test, 'adam', epochs=epochs, bs=bs, device='cpu')
    ours,all_of_theirs = time.perf_counter() - start,epochs*sum(theirs)/measured
    assert len(probe.curve) == epochs
    return [f'| linear evaluation, {epochs} epochs, ResNet-18, {len(train[1])} training and {len(test[1])} test images of {learn.encoder_info["size"][0]}x{learn.encoder_info["size"][1]}, batch {bs} | seconds |', '|---|---|',
            f"| the authors' way, extrapolated from {measured} epochs of {', '.join(f'{t:.1f}' for t in theirs)} s | {all_of_theirs:.0f} |",
            f'| ours, measured: features {extracted:.1f} s, {epochs} epochs {ours - extracted:.1f} s | {ours:.1f} |', '', f'**{all_of_theirs/ours:.0f} times faster.**']

def knn_process(call):
    "In a process of its own: seconds of the call, and the largest resident size in MiB"
    torch.manual_seed(0)
    x,y,q = torch.randn(bank, dim).relu_(),torch.arange(bank)%10,torch.randn(queries, dim).relu_()
    start = time.perf_counter()
    if call: knn_predict(x, y, q, budget=budget)
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10)

def knn():
    def _run(call): return map(float, subprocess.run([sys.executable, __file__, '--knn', str(call)], check=True, capture_output=True, text=True).stdout.split())
    (_,without),(seconds,peak) = _run(0),_run(1)
    assert peak - without <= budget, f'{peak - without:.0f} MiB'
    return ['| kNN, k 200 | |', '|---|---|', f'| {queries:,} queries against {bank:,} x {dim} features, float32 | {seconds:.1f} s |', f'| memory beyond the features | {peak - without:.0f} MiB of a budget of {budget} |']

def main():
    neighbours = knn() # first: a process starts with the largest size of the one that starts it, which must still be small
    lines = [*linear_evaluation(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None), '', *neighbours, '', f'One run, seed 0, {torch.get_num_threads()} threads.']
    if len(sys.argv) > 2: print('\n'.join(lines))
    else: report.write('eval', 'python benchmarks/bench_eval.py DIR', lines)

if __name__ == '__main__': knn_process(int(sys.argv[2])) if sys.argv[1] == '--knn' else main()
