#!/usr/bin/env python3
"""What the paper says, and what was measured here.

`python benchmarks/claims.py` makes results/claims.md of the other files of results/.
"""
from collections import namedtuple

import pandas as pd

from clae_fastai.all import confidence_interval
from report import interval, root

results,points = root/'results',1.
rules = {
    'reproduced': 'the interval lies above zero (of "as good as", "near" and "stable": within a point of zero)',
    'not reproduced': 'it lies below zero (beyond a point)',
    'within noise': 'neither: these seeds cannot tell',
    'not tested': 'there are no such trials'}
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
    measured,verdicts,df = [],[],rows(name, scale)
    for metric,title in metrics.items():
        d = difference(df, metric, high, low)
        if len(d) < 2: continue
        said,*bounds = interval(d)
        a,b = (cell(df, metric, **labels).mean() for labels in (high,low))
        measured.append(f'{title}: {a:.1f} against {b:.1f}, difference {said}, n = {len(d)}')
        verdicts.append(f'{title}: {rule(*bounds)}')
    if not measured: return Claim(text, paper, '', '', 'not tested')
    return Claim(text, paper, where, '<br>'.join(measured), '<br>'.join(verdicts))

metrics = dict(knn='kNN', linear='LR')
photos,digits = '5,000 photographs of CIFAR-10, 10 epochs, ResNet-18 of width 16','handwritten digits'
at_16_pixels = '5,000 photographs of CIFAR-10 at 16 pixels, ResNet-10 of width 16'
fast = f'{at_16_pixels}, equal compute (9,360 forwards of a batch), temperature'
larger = '5,000 photographs of CIFAR-10, ResNet-18 of width 16, equal compute (4,680 forwards of a batch)'

def encoders(d): return f'{len(d)} encoder{"s"*(len(d) > 1)}'

def figure3a():
    text = 'Adversarial perturbations raise the contrastive loss more than random ones of the same size'
    paper,df = 'Fig. 3a: at every eps',rows('fig3a')
    if not len(df): return Claim(text, paper, '', '', 'not tested')
    wide = df[df.eps > 0].pivot(index=['trial','batch'], columns=['kind','eps'], values='loss')
    d = (wide['adversarial'] - wide['random']).groupby('trial')
    bounds = {e: [confidence_interval(g) for _,g in d[e]] for e in wide['adversarial']} # over batches, for each encoder
    lowest = {e: min(low for _,low,_ in b) for e,b in bounds.items()}
    said = '; '.join(f'eps {e:g}: {sum(mean for mean,_,_ in b)/len(b):+.3f} (lowest bound {lowest[e]:+.3f})'
                     for e,b in bounds.items())
    verdict = above(min(lowest.values()), max(high for b in bounds.values() for *_,high in b))
    return Claim(text, paper, photos, f'{encoders(d)}, 30 batches each; adversarial less random: {said}', verdict)

def figure3b():
    text = "The downstream classifier's accuracy falls under the attack, though it never saw the classifier"
    paper,df = 'sec. 4.2: by about 20 points',rows('fig3b')
    if not len(df): return Claim(text, paper, '', '', 'not tested')
    acc = 100*df.pivot(index='trial', columns=['kind','eps'], values=['mean_accuracy','low_accuracy','high_accuracy'])
    mean,low,high = (acc[f'{o}_accuracy'] for o in ('mean','low','high'))
    def falls_by(kind, eps): return (mean[kind,0.] - mean[kind,eps]).mean()
    falls = [f'eps {e:g}: by {falls_by("adversarial", e):z.1f}, under random signs by {falls_by("random", e):z.1f}'
             for e in mean['adversarial'] if e > 0]
    below = above((low['random',.03] - high['adversarial',.03]).min(),
                  (high['random',.03] - low['adversarial',.03]).max())
    return Claim(text, paper, photos, f'{encoders(acc)}; points: {"; ".join(falls)}',
                 f'that it falls more than under random signs (eps .03, intervals over images): {below}')

def spread():
    "Figure 6a: from alpha .2 on it does not matter"
    df,text,paper = rows('fig6a'),'Stable from alpha = .2 on','Fig. 6a'
    measured,verdicts = [],[]
    for metric,title in metrics.items():
        for a in (.2,.5,2.):
            d = difference(df, metric, dict(data='digits', alpha=a), dict(data='digits', alpha=1.))
            if len(d) < 2: continue
            said,low,high = interval(d)
            measured.append(f'{title}, alpha {a:g} less alpha 1: {said}')
            inside,outside = -points < low and high < points,low > points or high < -points
            verdicts.append('reproduced' if inside else 'not reproduced' if outside else 'within noise')
    if not measured: return Claim(text, paper, '', '', 'not tested')
    worst = next(o for o in ('not reproduced','within noise','reproduced') if o in verdicts)
    return Claim(text, paper, f'{digits}, 10 epochs', '<br>'.join(measured), worst)

def of_the_paper():
    for m,name in dict(plain='Plain', uel='UEL', simclr='SimCLR').items():
        yield claim(f'CLAE (eps .03) above its baseline: {name}', 'Table 1', photos, 'table1',
                    dict(method=m, eps=.03), dict(method=m, eps=0))
    yield claim('CLAE with batches of 64 as good as the baseline with 256, or better', 'Fig. 5a, CIFAR-100',
                f'{digits}, 10 epochs', 'fig5a', dict(bs=64, eps=.03), dict(bs=256, eps=0), as_good)
    yield claim('CLAE with a small encoder above the baseline with a deep one', 'Fig. 5c: ResNet-18 against ResNet-101',
                f'{digits}, 10 epochs, ResNet-8 against ResNet-20', 'fig5c',
                dict(arch='resnet8', eps=.03), dict(arch='resnet20', eps=0))
    yield claim('CLAE for three quarters of the epochs near the baseline for all of them', 'Fig. 6c: 300 against 400',
                f'{digits}, 15 against 20 epochs', 'fig6c', dict(epochs=15, eps=.03), dict(epochs=20, eps=0), as_good)
    yield spread()
    for attack,name in dict(fgsm='FGSM', rfgsm='R-FGSM', ffgsm='F-FGSM').items():
        yield claim(f'PGD is the weakest of the attacks to train with: below {name}', 'Fig. 7', f'{digits}, 10 epochs',
                    'fig7', dict(data='digits', attack=attack), dict(data='digits', attack='pgd'))
    yield figure3a()
    yield figure3b()

def beyond_it():
    def ours(text, where, name, high, low, column='third view', scale='fast'):
        return claim(f'Not in the paper: {text}', '', where, name, {column: high}, {column: low}, scale=scale)
    yield ours('an adversarial view is better than one with random signs of the same size', photos, 'random',
               'adversarial', 'random signs', scale='small')
    yield ours('CLAE is better than SimCLR for as much compute, 11/6 of the epochs', photos, 'compute',
               'CLAE, 10 epochs', 'SimCLR, 18 epochs', column='trained', scale='small')
    def third(kind, when, eps=.03): return f'{kind}, eps {eps:g}, {when}'
    each,fourth = 'each step','each step of 4'
    adversary,signs = third('adversarial', fourth),third('random signs', fourth)
    for said,t,high,low in (
        ("the paper's temperature, .5: above SimCLR", .5, third('adversarial', each), 'none'),
        ('a tuned temperature: above SimCLR', .1, third('adversarial', each), 'none'),
        ('a tuned temperature, in each fourth step: above SimCLR', .1, adversary, 'none'),
        ('a tuned temperature, in each fourth step: above random signs in its place', .1, adversary, signs)):
        yield claim(f'Not in the paper: CLAE at {said}, for as much compute', '', f'{fast} {t:g}', 'temperature',
                    {'temperature': t, 'third view': high}, {'temperature': t, 'third view': low}, scale='fast')
    tested = f'{fast} .1; tested on 10,000 images'
    for said,low in {'SimCLR': 'none', 'random signs in its place': signs,
                     'SimCLR for as many seconds': 'none, for as many seconds as adversarial'}.items():
        yield ours(f'CLAE in each fourth step with a linear head: above {said}', tested, 'headline', adversary, low)
    strong,strong_signs = third('adversarial', each, .1),third('random signs', each, .1)
    for views,where,name in (('weak',tested,'headline_weak'), ('gentle',f'{fast} .1','gentle')):
        for said,low in {'SimCLR': 'none', 'random signs in its place': strong_signs}.items():
            yield ours(f'under {views} views, CLAE of eps .1 in each step with a linear head: above {said}', where,
                       name, strong, low)
    linear_adversary,linear_signs = 'linear head, adversarial each step of 4','linear head, random signs each step of 4'
    for text,high,low in (
        ("temperature .1 above the paper's, .5", 'temperature .1', "the paper's"),
        ('a linear head above one of two layers', 'linear head', 'temperature .1'),
        ('CLAE in each fourth step with a linear head: above SimCLR', linear_adversary, 'linear head'),
        ('random signs in each fourth step with a linear head: above SimCLR', linear_signs, 'linear head')):
        yield ours(f'with a larger encoder, {text}', larger, 'confirm', high, low, column='setting', scale='small')

def claims(): yield from [*of_the_paper(), *beyond_it()]

def text():
    "The page"
    return '\n'.join([
        '# What the paper claims, and what was measured here', '',
        "A verdict is a rule, not a taste. What a claim says is higher, less what it says is lower, seed by seed, "
        "has a 95 % interval (Student's t over the seeds):", '',
        *(f'- **{k}**: {v}' for k,v in rules.items()), '',
        "Differences in points of accuracy. Transfer (Table 2) and the paper's own scale are not tested: "
        "they take GPUs and data that are not downloaded automatically.", '',
        '| claim | the paper | here | measured | verdict |', '|---|---|---|---|---|',
        *('| ' + ' | '.join(c) + ' |' for c in claims())]) + '\n'

if __name__ == '__main__':
    (results/'claims.md').write_text(text())
    print(text())
