#!/usr/bin/env python3
"""The digits demonstration over several seeds, with and without adversarial examples: `python benchmarks/digits.py`.
Writes results/digits.csv (every accuracy) and results/digits.md (the table)."""
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

out = Path(__file__).parent.parent/'results'
seeds = (0, 1, 2)
variants = {'CLAE (eps .03)': [], 'CLAE, attack through the clean batch norm': ['--attack-bn', 'clean'], 'SimCLR (eps 0)': ['--eps', '0']}
rows_of = dict(raw='raw pixels', untrained='untrained encoder')
labels = {'1': '1 label a class', '5': '5 labels a class', 'all': 'all labels'}

def run(seed, options, name, cwd):
    subprocess.run([Path(sys.executable).with_name('clae_train'), '--seed', str(seed), *options, '--name', name], cwd=cwd, check=True)
    return json.loads((Path(cwd)/'runs'/name/'summary.json').read_text())

def main():
    rows = []
    with tempfile.TemporaryDirectory() as cwd:
        for seed in seeds:
            for i,(variant,options) in enumerate(variants.items()):
                s = run(seed, options, f'variant{i}-{seed}', cwd)
                for enc,knn in s['metrics']['knn'].items():
                    if enc != 'encoder' and i: continue
                    name = rows_of.get(enc, variant)
                    rows += [dict(encoder=name, seed=seed, labels=n, accuracy=v['mean']) for n,v in knn.items()]
    df = pd.DataFrame(rows)
    df.to_csv(out/'digits.csv', index=False)
    pct = 100*df.pivot_table(index='encoder', columns='labels', values='accuracy', sort=False)
    raw = df.groupby(['encoder','labels'], sort=False).accuracy.apply(lambda o: ', '.join(f'{100*x:.1f}' for x in o)).unstack()
    lines = ['| encoder | ' + ' | '.join(labels.values()) + ' |', '|---|---|---|---|']
    lines += [f'| {e} | ' + ' | '.join(f'{pct.loc[e, n]:.1f} ({raw.loc[e, n]})' for n in labels) + ' |' for e in pct.index]
    lines += ['', f"kNN accuracy on 450 held-out digits in percent: mean over {len(seeds)} seeds (each seed's value; with few labels itself a mean over 20 draws). "
              f"`clae_train --seed S`, with `--attack-bn clean` and `--eps 0` in the last two rows, {s['settings']['epochs']} epochs, {s['settings']['arch']}, on {os.cpu_count()} CPU cores ({platform.machine()}), " + ', '.join(f'{k} {v}' for k,v in s['versions'].items()) + '.']
    (out/'digits.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))

if __name__ == '__main__': main()
