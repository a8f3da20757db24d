#!/usr/bin/env python3
"What the paper says, and what was measured here: `python benchmarks/claims.py` makes results/claims.md of the other files of results/."
from collections import namedtuple

import pandas as pd

from clae_fastai.all import confidence_interval
from report import interval, root

results,points = root/'results',1.
rules = {'reproduced': 'the interval lies above zero (of "as good as", "near" and "stable": within a point of zero)', 'not reproduced': 'it lies below zero (beyond a point)',
         'within noise': 'neither: these seeds cannot tell', 'not tested': 'there are no such trials'}
Claim = namedtuple('Claim', 'text paper where measured verdict')

def rows(name, scale='small'):
    file = results/f'{name}-{scale}.csv'
    return pd.read_csv(file) if file.exists() else pd.DataFrame(dict(seed=[]))

def cell(df, metric, **labels):
    "Accuracy in percent by seed, of one cell"
    for k,v in labels.items(): df = df[df[k] == v] if k in df else df[:0]
    return 100*df.dropna(subset=[metric]).set_index('seed')[metric] if metric in df else pd.Series(dtype=float)

def difference(df, metric, high, low): return (cell(df, metric, **high) - cell(df, metric, **low)).dropna()

def above(low, high): return 'reproduced' if low > 0 else 'not reproduced' if high < 0 else 'within noise'
def as_good(low, high): return 'reproduced' if low > -points else 'not reproduced' if high < -points else 'within noise'

def claim(text, paper, where, name, high, low, rule=above, scale='small'):
    "One row for each way to measure: kNN and linear probe"
    res,df = [],rows(name, scale)
    for metric,title in (('knn','kNN'), ('linear','LR')):
        d = difference(df, metric, high, low)
        if len(d) < 2: continue
        said,a,b = interval(d)
        res.append((f"{title}: {cell(df, metric, **high).mean():.1f} against {cell(df, metric, **low).mean():.1f}, difference {said}, n = {len(d)}", rule(a, b)))
    return Claim(text, paper, where if res else '', '<br>'.join(o for o,_ in res), '<br>'.join(f'{o.split(":")[0]}: {v}' for o,v in res) or 'not tested')

photos,digits = '5,000 photographs of CIFAR-10, 10 epochs, ResNet-18 of width 16','handwritten digits'
fast = '5,000 photographs of CIFAR-10 at 16 pixels, ResNet-10 of width 16, equal compute (9,360 forwards of a batch), temperature'

def figure3a():
    file = results/'fig3a-small.csv'
    text,paper = 'Adversarial perturbations raise the contrastive loss more than random ones of the same size','Fig. 3a: at every eps'
    if not file.exists(): return Claim(text, paper, '', '', 'not tested')
    df = pd.read_csv(file)
    wide = df[df.eps > 0].pivot(index=['trial','batch'], columns=['kind','eps'], values='loss')
    d = (wide['adversarial'] - wide['random']).groupby('trial')
    bounds = {e: [confidence_interval(g) for _,g in d[e]] for e in wide['adversarial']} # over batches, for each encoder
    said = '; '.join(f'eps {e:g}: {sum(m for m,_,_ in b)/len(b):+.3f} (lowest bound {min(l for _,l,_ in b):+.3f})' for e,b in bounds.items())
    return Claim(text, paper, photos, f'{len(d)} encoder{"s"*(len(d) > 1)}, 30 batches each; adversarial less random: {said}', above(min(l for b in bounds.values() for _,l,_ in b), max(h for b in bounds.values() for _,_,h in b)))

def figure3b():
    file = results/'fig3b-small.csv'
    text,paper = "The downstream classifier's accuracy falls under the attack, though it never saw the classifier",'sec. 4.2: by about 20 points'
    if not file.exists(): return Claim(text, paper, '', '', 'not tested')
    df = pd.read_csv(file)
    acc = 100*df.pivot(index='trial', columns=['kind','eps'], values=['mean_accuracy','low_accuracy','high_accuracy'])
    mean,low,high = (acc[f'{o}_accuracy'] for o in ('mean','low','high'))
    falls = [f'eps {e:g}: by {(mean["adversarial",0.] - mean["adversarial",e]).mean():z.1f}, under random signs by {(mean["random",0.] - mean["random",e]).mean():z.1f}' for e in mean['adversarial'] if e > 0]
    below = above((low['random',.03] - high['adversarial',.03]).min(), (high['random',.03] - low['adversarial',.03]).max())
    return Claim(text, paper, photos, f'{len(acc)} encoder{"s"*(len(acc) > 1)}; points: {"; ".join(falls)}', f'that it falls more than under random signs (eps .03, intervals over images): {below}')

def spread():
    "Figure 6a: from alpha .2 on it does not matter"
    df,text,paper = rows('fig6a'),'Stable from alpha = .2 on','Fig. 6a'
    out,verdicts = [],[]
    for metric,title in (('knn','kNN'), ('linear','LR')):
        for a in (.2,.5,2.):
            d = difference(df, metric, dict(data='digits', alpha=a), dict(data='digits', alpha=1.))
            if len(d) < 2: continue
            said,low,high = interval(d)
            out.append(f'{title}, alpha {a:g} less alpha 1: {said}')
            verdicts.append('reproduced' if -points < low and high < points else 'not reproduced' if low > points or high < -points else 'within noise')
    if not out: return Claim(text, paper, '', '', 'not tested')
    worst = next(o for o in ('not reproduced','within noise','reproduced') if o in verdicts)
    return Claim(text, paper, f'{digits}, 10 epochs', '<br>'.join(out), worst)

def claims():
    names = dict(plain='Plain', uel='UEL', simclr='SimCLR')
    yield from (claim(f'CLAE (eps .03) above its baseline: {n}', 'Table 1', photos, 'table1', dict(method=m, eps=.03), dict(method=m, eps=0)) for m,n in names.items())
    yield claim('CLAE with batches of 64 as good as the baseline with 256, or better', 'Fig. 5a, CIFAR-100', f'{digits}, 10 epochs', 'fig5a', dict(bs=64, eps=.03), dict(bs=256, eps=0), as_good)
    yield claim('CLAE with a small encoder above the baseline with a deep one', 'Fig. 5c: ResNet-18 against ResNet-101', f'{digits}, 10 epochs, ResNet-8 against ResNet-20', 'fig5c', dict(arch='resnet8', eps=.03), dict(arch='resnet20', eps=0))
    yield claim('CLAE for three quarters of the epochs near the baseline for all of them', 'Fig. 6c: 300 against 400', f'{digits}, 15 against 20 epochs', 'fig6c', dict(epochs=15, eps=.03), dict(epochs=20, eps=0), as_good)
    yield spread()
    for a,n in (('fgsm','FGSM'), ('rfgsm','R-FGSM'), ('ffgsm','F-FGSM')): yield claim(f'PGD is the weakest of the attacks to train with: below {n}', 'Fig. 7', f'{digits}, 10 epochs', 'fig7', dict(data='digits', attack=a), dict(data='digits', attack='pgd'))
    yield figure3a()
    yield figure3b()
    yield claim('Not in the paper: an adversarial view is better than one with random signs of the same size', '', photos, 'random', {'third view': 'adversarial'}, {'third view': 'random signs'})
    yield claim('Not in the paper: CLAE is better than SimCLR for as much compute, 11/6 of the epochs', '', photos, 'compute', dict(trained='CLAE, 10 epochs'), dict(trained='SimCLR, 18 epochs'))
    views = {k: f'{kind}, eps 0.03, {when}' for k,(kind,when) in dict(each=('adversarial','each step'), fourth=('adversarial','each step of 4'), signs=('random signs','each step of 4')).items()}
    for said,t,high,low in (("the paper's temperature, .5: above SimCLR", .5, 'each', None), ('a tuned temperature: above SimCLR', .1, 'each', None),
                            ('a tuned temperature, in each fourth step: above SimCLR', .1, 'fourth', None), ('a tuned temperature, in each fourth step: above random signs in its place', .1, 'fourth', 'signs')):
        third = [{'temperature': t, 'third view': views.get(o, 'none')} for o in (high,low)]
        yield claim(f'Not in the paper: CLAE at {said}, for as much compute', '', f'{fast} {t:g}', 'temperature', *third, scale='fast')
    for said,low in (('above SimCLR', 'none'), ('above random signs in its place', views['signs']), ('above SimCLR for as many seconds', 'none, for as many seconds as adversarial')):
        yield claim(f'Not in the paper: CLAE in each fourth step with a linear head: {said}', '', f'{fast} .1; tested on 10,000 images', 'headline', {'third view': views['fourth']}, {'third view': low}, scale='fast')


def text():
    "The page"
    lines = ['# What the paper claims, and what was measured here', '', "A verdict is a rule, not a taste. What a claim says is higher, less what it says is lower, seed by seed, has a 95 % interval (Student's t over the seeds):", '']
    lines += [f'- **{k}**: {v}' for k,v in rules.items()]
    lines += ['', "Differences in points of accuracy. Transfer (Table 2) and the paper's own scale are not tested: they take GPUs and data that are not downloaded automatically.", '', '| claim | the paper | here | measured | verdict |', '|---|---|---|---|---|']
    return '\n'.join(lines + ['| ' + ' | '.join(c) + ' |' for c in claims()]) + '\n'

if __name__ == '__main__':
    (results/'claims.md').write_text(text())
    print(text())
