#!/usr/bin/env python3
"""How many of the attack's signs low precision changes, on a ResNet-18 and 32x32 photographs:
`python benchmarks/bench_signs.py DIR` (an image folder, CIFAR-10's for one). Writes results/signs.md: the share of
sign(g) that differs from float32, and of g that underflows to 0, after 12 training steps."""
import sys

import numpy as np
import torch

import report
from clae_fastai.all import adversarial_bn, clae_learner, frozen_bn_stats, get_dls, resnet18, set_seed

seeds,steps,bs = (0, 1, 2),12,64
kinds = {'bfloat16': (torch.bfloat16, 1.), 'float16, loss scaled by 2^16': (torch.float16, 2.**16),
         'float16, unscaled': (torch.float16, 1.)}

def gradient(learn, x, dtype, scale=1.):
    "Gradient of the batch's scaled loss at `x`, through the adversarial batch norm, as the attack takes it"
    x = x.clone().requires_grad_()
    with adversarial_bn(learn.model), frozen_bn_stats(learn.model), \
         torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        z = learn.model(x)
        return torch.autograd.grad(scale*learn.loss_func.pair(z.detach(), z), x)[0]

def shares(folder, seed):
    set_seed(seed)
    learn = clae_learner(get_dls('folder', folder, bs=bs, limit=steps*bs, seed=seed), resnet18)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-4)
    learn.model.train()
    x,_ = learn.clae.views(learn.dls.train.one_batch()[0])
    exact = gradient(learn, x, torch.float32)
    def _share(g):
        return float((g.sign() != exact.sign()).float().mean()),float(((g == 0) & (exact != 0)).float().mean())
    return {k: _share(gradient(learn, x, *v)) for k,v in kinds.items()}

def main():
    runs = [shares(sys.argv[1], s) for s in seeds]
    def _cell(k, i):
        return f"{100*np.mean([r[k][i] for r in runs]):.2f} ({', '.join(f'{100*r[k][i]:.2f}' for r in runs)})"
    lines = ['| precision of the attack | signs that differ from float32, % | gradients that underflow to 0, % |',
             '|---|---|---|', *[f'| {k} | {_cell(k, 0)} | {_cell(k, 1)} |' for k in kinds], '',
             f"Mean over {len(seeds)} seeds (each seed's value), ResNet-18, batch {bs} of 32x32 photographs, "
             f"{steps} training steps in."]
    report.write('signs', 'python benchmarks/bench_signs.py DIR', lines)

if __name__ == '__main__': main()
