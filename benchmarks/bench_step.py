#!/usr/bin/env python3
"""Seconds of a training step, ResNet-18, 32x32, batch 64: `python benchmarks/bench_step.py [--rounds 15]`. In one
process, everything takes its turn in every round.

published  Algorithm 1 written plainly: two forwards for the attack, its backward into all parameters and thrown away,
           three forwards and a backward: 15 forward-units
clae       ours, through fastai's Learner, with views, loss, optimiser and logging: 11 units
simclr     the same Learner with eps=0: 6 units
passes     the bare passes of a clae step, no views, no loss, no optimiser: the least it can take"""
import argparse
import subprocess
import sys
import time

import torch

import report
from clae_fastai.all import (ContrastiveModel, MemoryDL, MemoryImages, DataLoaders, IntToFloatTensor, NTXentLoss,
    TwoViews, adversarial_bn, clae_learner, convert_dual_bn, create_encoder, projection_head, default_device,
    frozen_bn_stats, has_bf16, resnet18, set_seed)

bs,side = 64,32
kinds = {'fp32': ('fp32', False), 'fp32, channels_last': ('fp32', True), 'bf16, channels_last': ('bf16', True)}

def usable():
    "The kinds that this device has units for: elsewhere bfloat16 is emulated, and its time tells nothing"
    return [k for k in kinds if 'bf16' not in k or has_bf16()]

def sync():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def images(): return torch.randint(0, 256, (bs,3,side,side), dtype=torch.uint8)

def learner_of(images, bs, arch=resnet18, **kwargs):
    "A quiet `clae_learner` on images in memory, which takes the paper's step"
    dl = MemoryDL(MemoryImages(images), bs=bs, shuffle=True, drop_last=True, after_batch=[IntToFloatTensor()],
                  device=default_device())
    learn = clae_learner(DataLoaders(dl, device=default_device()), arch, **dict(every=1, head='mlp') | kwargs)
    learn.logger = lambda *a: None
    return learn

def learner_step(eps, precision, channels_last, change=lambda learn: None, **kwargs):
    "A fit of one epoch of one batch; `change` and `kwargs` are for `bench_tried.py`"
    learn = learner_of(images(), bs, eps=eps, precision=precision, channels_last=channels_last, **kwargs)
    change(learn)
    def _step():
        with learn.no_bar(): learn.fit(1, 3e-4)
    return _step

def bare_model(channels_last):
    enc = create_encoder(resnet18, size=side)
    model = convert_dual_bn(ContrastiveModel(enc, projection_head(512))).to(default_device())
    return model.to(memory_format=torch.channels_last) if channels_last else model

def published_step(precision, channels_last):
    model,views,loss = bare_model(channels_last),TwoViews.from_preset('simclr', side),NTXentLoss()
    opt,x = torch.optim.Adam(model.parameters(), 3e-4),images().to(default_device())
    def _step():
        x_q,x_p = views(x)
        with adversarial_bn(model), frozen_bn_stats(model):
            x_var = x_q.clone().requires_grad_()
            loss(model(x_q), model(x_var)).backward()
        x_adv = x_q + .03*x_var.grad.sign()
        opt.zero_grad()
        z_q,z_p,z_adv = model(x_q, x_p, x_adv)
        (loss(z_q, z_p) + loss(z_q, z_adv)).backward()
        opt.step()
        return float(x_adv[0,0,0,0])
    return _step

def passes_step(precision, channels_last):
    model,x = bare_model(channels_last),torch.randn(bs, 3, side, side, device=default_device())
    w = torch.randn(bs, 64, device=default_device())
    def _step():
        for p in model.parameters(): p.grad = None
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == 'bf16'):
            x_var = x.clone().requires_grad_()
            torch.autograd.grad((model(x_var)*w).sum(), x_var)
            ((model(x) + model(x) + model(x))*w).sum().backward()
    return _step

def make(name, kind):
    precision,channels_last = kinds[kind]
    if name == 'published': return published_step(precision, channels_last)
    if name == 'passes': return passes_step(precision, channels_last)
    return learner_step(.03 if name == 'clae' else 0., precision, channels_last)

def peak_memory(name, kind, steps):
    "Peak memory in MiB of a fresh process that takes `steps` steps"
    return int(subprocess.run([sys.executable, __file__, '--memory', name, kind, str(steps)],
                              capture_output=True, text=True, check=True).stdout.split()[-1])/2**20

def memory_process(name, kind, steps):
    step = make(name, kind)
    for _ in range(int(steps)): step()
    print(report.peak_memory())

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--memory', nargs=3)
    args = parser.parse_args()
    set_seed(0)
    if args.memory: return memory_process(*args.memory)
    own = usable()
    cells = [('published','fp32')] + [(n,k) for k in own for n in ('clae','simclr','passes')]
    steps = {c: make(*c) for c in cells}
    for s in steps.values(): s(); s()
    t = {c: [] for c in cells}
    for r in range(args.rounds):
        for c in cells if r % 2 == 0 else cells[::-1]:
            sync(); start = time.perf_counter()
            steps[c]()
            sync(); t[c].append(time.perf_counter() - start)
    mem = {c: peak_memory(*c, 3) - peak_memory(*c, 0) for c in cells}
    lines = ['| step | precision | seconds, median (range) | published / this | peak memory, MiB |',
             '|---|---|---|---|---|']
    lines += [f"| {n} | {k} | {report.spread(t[n,k])} "
              f"| {'' if n == 'published' else report.ratio(t['published','fp32'], t[n,k])} | {mem[n,k]:,.0f} |"
              for n,k in cells]
    lines += ['', '| precision | clae / simclr | clae / passes |', '|---|---|---|']
    lines += [f"| {k} | {report.ratio(t['clae',k], t['simclr',k])} | {report.ratio(t['clae',k], t['passes',k])} |"
              for k in own]
    lines += ['', f"ResNet-18, 3x3 stem, {side}x{side} images, batch {bs}, {args.rounds} rounds; "
                  "ratios are geometric means of pairs with 95 % intervals. "
                  "Peak memory: of a fresh process after 3 steps, less the same process without a step.",
              'The theory, in units of a forward: 15/11 = 1.36 against the published step, 11/6 = 1.83 against SimCLR.']
    if len(own) < len(kinds): lines.append('This device has no units for bfloat16, which is left out.')
    report.write('step' if len(own) == len(kinds) else 'step_no_bf16', 'python benchmarks/bench_step.py', lines)

if __name__ == '__main__': main()
