#!/usr/bin/env python3
"""Accuracy against the number of labels: `python benchmarks/labels.py DIR`, with a folder of CIFAR-10 images,
train/<class>/*.png and test/<class>/*.png, such as `cifar10_report` of `split_cifar10.py`.

All images of `train` are trained on without labels, by SimCLR for 40 epochs, and by CLAE with an adversary in every
fourth step for 33, which costs as much. Then 1, 5, 20 and 100 labels a class, and all, are looked at, for each seed the
same ones whatever the encoder:

kNN          of raw pixels, of random weights, of ImageNet's weights where they can be fetched,
             and of the trained encoders
fine-tuned   from random weights, which is training on the labels alone, and from the trained ones,
             with mild augmentation

Random weights and ImageNet's have batch norm statistics of the training images. Writes results/labels.csv, a row as
soon as it is known, and goes on where it was stopped; at the end results/labels.md. `--tiny OUT` tries everything on
few images for an epoch or two, and writes to OUT."""
import argparse
import contextlib
import io
from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import DataLoaders, aug_transforms, set_seed
from torch.optim.swa_utils import update_bn

import report
from clae_fastai.all import (clae_learner, default_device, encoder_learner, evenly_spread, extract_features,
    few_label_knn, get_dls, label_draws)

arch,side,bs,lr,temperature = 'resnet10_w16',16,128,3e-3,.1
numbers,seeds,columns = (1, 5, 20, 100),(0, 1, 2),['measure','encoder','seed','labels','accuracy','device']
pixels,random,imagenet = 'raw pixels','random weights',"ImageNet's weights"
trainings = dict(SimCLR=(40, dict(eps=0)), CLAE=(33, dict(every=4))) # epochs, and the adversary

class Study:
    "What is measured on a folder, and where it is written"
    def __init__(self, folder, out, tiny):
        self.folder,self.out,self.tiny,self.file = folder,out,tiny,out/'labels.csv'
        self.table = (pd.read_csv(self.file, dtype=dict(labels=str)) if self.file.exists()
                      else pd.DataFrame(columns=columns))
        self.numbers = numbers[:2] if tiny else numbers

    def has(self, *key): return (self.table[columns[:len(key)]] == list(key)).all(axis=1).any()

    def add(self, measure, encoder, seed, accuracies):
        new = pd.DataFrame([(measure, encoder, seed, str(n), round(a, 5), default_device().type)
                            for n,a in accuracies.items()], columns=columns)
        self.table = pd.concat([self.table, new]) if len(self.table) else new
        self.table.to_csv(self.file, index=False)
        print(f"seed {seed}, {measure}, {encoder}: {', '.join(f'{n}: {100*a:.1f}' for n,a in accuracies.items())}",
              flush=True)

    def dls(self, size=side, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            dls = get_dls(self.folder, size=size, bs=bs, limit=400 if self.tiny else None, **kwargs)
        if self.tiny: dls.loaders[1] = dls.valid.new(dls.valid_ds.take(evenly_spread(len(dls.valid_ds), 300)))
        return dls

    def learner(self, seed, **kwargs):
        "With its weights as they are at the start"
        set_seed(seed)
        return clae_learner(self.dls(), arch, temperature=temperature, head='linear', channels_last=True, **kwargs)

    def trained(self, seed, epochs, adversary):
        learn = self.learner(seed, **adversary)
        learn.dls.loaders[1:] = [few_of(learn.dls.valid)] # valid_loss is not what is asked for
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2 if self.tiny else epochs, lr)
        return learn

    def from_imagenet(self):
        "Enlarged, as these weights know larger images"
        return clae_learner(self.dls(64), 'resnet18', stem='imagenet', pretrained=True)

    def knn(self, learn, dls, seed):
        parts = [pixels_of(dl) if learn is None else extract_features(learn, dl) for dl in in_order(dls)]
        found = few_label_knn(*parts[0], *parts[1], ns=self.numbers, draws=2 if self.tiny else 20, seed=seed)
        return {n: o['mean'] for n,o in found.items()}

    def fine_tuned(self, learn, seed, n):
        "Test accuracy after the last epoch of fine-tuning on `n` images a class"
        dls = self.dls(batch_tfms=aug_transforms(size=side, max_rotate=10, max_lighting=.1, max_warp=0.))
        data = (dls.train_ds if n == 'all'
                else dls.train_ds.take(label_draws(dls.train_ds.labels, n, draws=1, seed=seed)[0]))
        epochs,frozen = (1, 1) if self.tiny else (20 if n == 'all' else 40, 5)
        set_seed(seed)
        tuned = encoder_learner(DataLoaders(dls.train.new(data, bs=min(64, len(data))), few_of(dls.valid)), learn)
        with tuned.no_bar(), tuned.no_logging():
            tuned.fine_tune(epochs, lr, freeze_epochs=frozen)
            pred,y = tuned.get_preds(dl=tuned.dls.valid.new(dls.valid_ds))
        return (pred.argmax(1) == y).float().mean().item()

    def measure(self, seed, encoder, make, tune=True):
        "An encoder, which is made only if something of it is not known yet"
        left = [n for n in [*self.numbers,'all'] if tune and not self.has('fine-tuned', encoder, seed, str(n))]
        if self.has('kNN', encoder, seed) and not left: return
        learn = make()
        if not self.has('kNN', encoder, seed):
            self.add('kNN', encoder, seed, self.knn(learn, learn.dls if encoder == imagenet else self.dls(), seed))
        for n in left: self.add('fine-tuned', encoder, seed, {n: self.fine_tuned(learn, seed, n)})

    def run(self, seed):
        if not self.has('kNN', pixels, seed): self.add('kNN', pixels, seed, self.knn(None, self.dls(), seed))
        try: self.measure(seed, imagenet, lambda: with_statistics(self.from_imagenet()), tune=False)
        except OSError: print(f'{imagenet} cannot be fetched here, and are left out.')
        self.measure(seed, random, lambda: with_statistics(self.learner(seed, eps=0)))
        for name,(epochs,adversary) in trainings.items():
            self.measure(seed, name, lambda: self.trained(seed, epochs, adversary))

    def write(self, command):
        t,names = self.table,[*map(str, self.numbers),'all']
        lines = ['| | encoder | ' + ' | '.join(names[:-1]) + ' labels a class | all |', '|---'*(len(names)+2) + '|']
        for (measure,encoder),rows in t.groupby(['measure','encoder'], sort=False):
            values = [100*rows[rows.labels == n].accuracy for n in names]
            cells = [f"{v.mean():.1f} ({', '.join(f'{o:.1f}' for o in v)})" for v in values]
            lines.append(f"| {measure} | {encoder} | {' | '.join(cells)} |")
        dls = self.dls()
        lines += ['', f"Test accuracy in percent, mean over {t.seed.nunique()} seeds (each seed's value), "
            f"on {len(dls.valid_ds)} images; {len(dls.train_ds)} to train on, all of them without labels: "
            f"{', '.join(f'{k} {n} epochs' for k,(n,_) in trainings.items())}, "
            f"CLAE with FGSM of eps .03 in every fourth step. {arch} at {side} pixels, temperature {temperature}, "
            f"a linear head, batches of {bs}, one cycle to {lr}. "
            "kNN: on h, as many neighbours as labels a class, at most 20, mean over 20 draws of the labels. "
            f"Fine-tuned: one draw a seed, `encoder_learner(...).fine_tune(40, {lr}, freeze_epochs=5)` "
            "(with all labels 20 epochs), batches of 64, flips, small turns and zooms, last epoch. "
            f"On {' and '.join(t.device.unique())}."]
        if self.out == report.root/'results': report.write('labels', command, lines)
        else: (self.out/'labels.md').write_text('\n'.join(lines) + '\n')

def few_of(dl): return dl.new(dl.dataset.take([0,1]))
def in_order(dls): return dls.train.new(shuffle=False, drop_last=False),dls.valid

def pixels_of(dl): return torch.cat([b[0].as_subclass(torch.Tensor).flatten(1) for b in dl]),dl.dataset.labels

def with_statistics(learn):
    "Batch norm has seen the training images"
    update_bn((learn.clae.normalize(b[0]) for b in learn.dls.train), learn.model)
    return learn

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', metavar='DIR')
    p.add_argument('--tiny', metavar='OUT', type=Path)
    a = p.parse_args()
    study = Study(a.folder, a.tiny or report.root/'results', bool(a.tiny))
    for seed in seeds[:1] if a.tiny else seeds: study.run(seed)
    study.write('python benchmarks/labels.py DIR')

if __name__ == '__main__': main()
