#!/usr/bin/env python3
"""Few labels: fine-tuning with 10 labels a class from a short CLAE run on all images, against the same from random
weights: `python benchmarks/fine_tune.py DIR [EPOCHS]` (an image folder, CIFAR-10's for one; with EPOCHS of
pre-training other than 5 nothing is written). Writes results/fine_tune.csv (every accuracy) and
results/fine_tune.md."""
import sys
import time
from pathlib import Path

import pandas as pd

import report
from clae_fastai.all import (DataLoaders, accuracy, clae_learner, encoder_learner, get_dls, label_draws, resnet8,
    set_seed)

out = Path(__file__).parent.parent/'results'
seeds,labels,epochs,tune_epochs = (0, 1, 2),10,5,30

def fine_tuned(learn, dls, seed):
    """Test accuracy after the last epoch of fine-tuning the encoder of `learn` on `labels` images a class,
    the same ones for each encoder"""
    idx, = label_draws(dls.train_ds.labels, labels, draws=1, seed=seed)
    train = dls.train.new(dls.train_ds.take(idx), bs=25)
    set_seed(seed)
    tuned = encoder_learner(DataLoaders(train, dls.valid), learn, metrics=accuracy)
    with tuned.no_bar(), tuned.no_logging(): tuned.fine_tune(tune_epochs, 3e-3, freeze_epochs=5)
    return tuned.recorder.values[-1][-1]

def run(folder, seed, n):
    set_seed(seed)
    dls = get_dls('folder', folder, bs=128, device='cpu')
    learn = clae_learner(dls, resnet8, temperature=.5, head='mlp', every=1) # the paper's
    random = fine_tuned(learn, dls, seed)
    set_seed(seed)
    start = time.time()
    with learn.no_bar(): learn.fit_one_cycle(n, 3e-3)
    print(f'seed {seed}: {n} epochs of CLAE in {time.time() - start:.0f} s', flush=True)
    return {'random weights': random, 'CLAE': fine_tuned(learn, dls, seed)},len(dls.train_ds),len(dls.valid_ds)

def main():
    n = int(sys.argv[2]) if len(sys.argv) > 2 else epochs
    runs = []
    for s in seeds:
        accs,n_train,n_test = run(sys.argv[1], s, n)
        print(accs, flush=True)
        runs.append(accs)
    df = pd.DataFrame(runs, index=pd.Index(seeds, name='seed'))
    lines = ['| fine-tuned from | test accuracy, % |', '|---|---|',
             *[f"| {c} | {100*df[c].mean():.1f} ({', '.join(f'{100*o:.1f}' for o in df[c])}) |" for c in df], '',
             f"Mean over {len(seeds)} seeds (each seed's value), {labels} labels a class, "
             f"{n_test} test images, ResNet-8. "
             f"CLAE: SimCLR with FGSM, eps .03, {n} epochs on all {n_train} images without labels. "
             f"Then, from either, `encoder_learner(...).fine_tune({tune_epochs}, 3e-3, freeze_epochs=5)`, "
             "batch 25, no augmentation, last epoch. "
             f"`python benchmarks/fine_tune.py DIR` with CIFAR-10 images on {report.machine()}"]
    print('\n'.join(lines))
    if n != epochs: return
    df.to_csv(out/'fine_tune.csv')
    (out/'fine_tune.md').write_text('\n'.join(lines) + '\n')

if __name__ == '__main__': main()
