#!/usr/bin/env python3
"""What it costs to evaluate an encoder.

`python benchmarks/bench_eval.py DIR [LIMIT]` (an image folder, CIFAR-10's for one; LIMIT training images, for a
quick look) writes results/eval.md: 1000 epochs of linear evaluation the authors' way, where the encoder runs on every
batch of every epoch, extrapolated from two of them, against `extract_features` and `linear_probe('adam')`, measured
whole.

`python benchmarks/bench_eval.py --knn` writes results/knn.md: kNN of 2,000 test images against 50,000 features of 512
numbers, our time over that of lightly's `knn_predict`, the normalisation of both sets included, with one thread and
two."""
import sys
import time

import torch
import torch.nn.functional as F
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn_predict
from torch import nn

import report
from clae_fastai.all import clae_learner, extract_features, get_dls, knn_predict, linear_probe, resnet18, set_seed

bs,epochs,measured = 256,1000,2
queries,bank,dim,k,rounds = 2000,50_000,512,200,9

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
    return [f'| linear evaluation, {epochs} epochs, ResNet-18, {len(train[1])} training and {len(test[1])} test images '
                f'of {learn.encoder_info["size"][0]}x{learn.encoder_info["size"][1]}, batch {bs} | seconds |',
            '|---|---|',
            f"| the authors' way, extrapolated from {measured} epochs of {', '.join(f'{t:.1f}' for t in theirs)} s "
                f"| {all_of_theirs:.0f} |",
            f'| ours, measured: features {extracted:.1f} s, {epochs} epochs {ours - extracted:.1f} s | {ours:.1f} |',
            '', f'**{all_of_theirs/ours:.0f} times faster.**']

def lightly(x, y, test_x):
    "Its prediction for features that are not normalised yet"
    return lightly_knn_predict(F.normalize(test_x, dim=1), F.normalize(x, dim=1).T, y, 10, k)[:,0]

def seconds(f, *args):
    start = time.perf_counter()
    f(*args)
    return time.perf_counter() - start

def knn():
    """Rows of a table: ours and lightly's take turns, so that other work on the machine meets both;
    the least time of each counts"""
    torch.manual_seed(0)
    data = torch.randn(bank, dim).relu_(),torch.arange(bank)%10,torch.randn(queries, dim).relu_()
    assert (knn_predict(*data, k) == lightly(*data)).float().mean() > .999
    threads,rows = torch.get_num_threads(),[]
    for n in (1,2):
        torch.set_num_threads(n)
        times = [(seconds(knn_predict, *data, k), seconds(lightly, *data)) for _ in range(rounds)]
        ours,theirs = map(min, zip(*times))
        rows.append(f'| {n} | {ours:.2f} | {theirs:.2f} | {ours/theirs:.2f} |')
    torch.set_num_threads(threads)
    return [f'| kNN, k {k}, {queries:,} against {bank:,} x {dim} features, float32: threads '
                '| ours, s | lightly, s | ours / lightly |', '|---|---|---|---|',
            *rows, '', f'Least of {rounds} rounds in turns, normalisation of both sets included.']

def main():
    if sys.argv[1] == '--knn': return report.write('knn', 'python benchmarks/bench_eval.py --knn', knn())
    lines = [*linear_evaluation(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None), '',
             f'One run, seed 0, {torch.get_num_threads()} threads.']
    if len(sys.argv) > 2: print('\n'.join(lines))
    else: report.write('eval', 'python benchmarks/bench_eval.py DIR', lines)

if __name__ == '__main__': main()
