#!/usr/bin/env python3
"""The digits demonstration over several seeds, with and without adversarial examples: `python benchmarks/digits.py`.
Writes results/digits.csv (every accuracy, as they come: a run with rows there is not done again) and
results/digits.md (the tables)."""
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from report import interval

out = Path(__file__).parent.parent/'results'
seeds = range(5)
default = '--temperature .5 --every 4 --head linear'
before = '--temperature .5 --every 1 --head mlp' # as 0.1.0 did it
variants = {'CLAE': default, 'SimCLR': '--temperature .5 --eps 0 --head linear', 'CLAE of 0.1.0': before,
    'CLAE of 0.1.0, attack through the clean batch norm': before + ' --attack-bn clean',
    'CLAE, head of two layers': '--temperature .5 --every 4 --head mlp',
    'CLAE, temperature .1': '--temperature .1 --every 4 --head linear'}
rows_of = dict(raw='raw pixels', untrained='untrained encoder')
labels = {'1': '1 label a class', '5': '5 labels a class', 'all': 'all labels'}

def run(seed, options):
    with tempfile.TemporaryDirectory() as cwd:
        subprocess.run([Path(sys.executable).with_name('clae_train'), '--seed', str(seed), *options.split(),
                        '--name', 'one'], cwd=cwd, check=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        return json.loads((Path(cwd)/'runs'/'one'/'summary.json').read_text())

def rows(seed, variant, options, summary):
    about = json.dumps({k: summary['settings'][k] for k in ('epochs','arch')} | summary['versions'])
    return [dict(encoder=rows_of.get(e, variant), options=options, seed=seed, labels=n, accuracy=v['mean'], about=about)
            for e,knn in summary['metrics']['knn'].items() if e == 'encoder' or options == default
            for n,v in knn.items()]

def markdown(df):
    pct = 100*df.pivot_table(index='encoder', columns=['labels','seed'], values='accuracy', sort=False)
    def cell(v): return f"{v.mean():.1f} ({', '.join(f'{o:.1f}' for o in v)})"
    lines = ['| encoder | ' + ' | '.join(labels.values()) + ' |', '|---|---|---|---|']
    lines += [f'| {e} | ' + ' | '.join(cell(pct.loc[e, n].sort_index()) for n in labels) + ' |' for e in pct.index]
    new,plain,old,clean,two_layers,cold = variants
    pairs = (new, plain), (new, old), (clean, old), (new, two_layers), (cold, new)
    lines += ['', '| paired by seed | ' + ' | '.join(labels.values()) + ' |', '|---|---|---|---|']
    lines += [f'| {a}, less {b} | ' + ' | '.join(interval(pct.loc[a, n] - pct.loc[b, n])[0] for n in labels) + ' |'
              for a,b in pairs if {a,b} <= {*pct.index}]
    about = json.loads(df['about'].iloc[-1])
    return '\n'.join([*lines, '',
        f"kNN accuracy on 450 held-out digits in percent: mean over {df['seed'].nunique()} seeds (each seed's value; "
        "with few labels itself a mean over 20 draws), and differences with their 95 % intervals. "
        "`clae_train --seed S` with " + ', '.join(f'`{o}` ({v})' for v,o in variants.items() if v in pct.index)
        + f"; {about.pop('epochs')} epochs, {about.pop('arch')}, on a CPU ({platform.machine()}) with one thread "
        "(`OMP_NUM_THREADS=1`: more of them add in another order, and give other numbers), "
        + ', '.join(f'{k} {v}' for k,v in about.items()) + '.']) + '\n'

def main():
    file = out/'digits.csv'
    df = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['options','seed'])
    for variant,options in variants.items():
        for seed in seeds:
            if 'options' in df and ((df['options'] == options) & (df['seed'] == seed)).any(): continue
            df = pd.concat([df, pd.DataFrame(rows(seed, variant, options, run(seed, options)))])
            df.to_csv(file, index=False)
    (out/'digits.md').write_text(text := markdown(df))
    print(text)

if __name__ == '__main__': main()
