"What the benchmarks share: the machine in words, intervals of paired ratios, and the page that holds all tables."
import importlib.metadata
import os
import platform
import resource
from pathlib import Path

import numpy as np
import scipy.stats
import torch

from clae_fastai.all import confidence_interval

root = Path(__file__).parent.parent

def machine():
    "Hardware and versions, in a sentence"
    model = (next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), '')
             if Path('/proc/cpuinfo').exists() else '')
    where = (torch.cuda.get_device_name() if torch.cuda.is_available()
             else f"{os.cpu_count()} CPU cores ({' '.join(filter(None, (platform.machine(), model)))})")
    names = 'clae_fastai fastai torch torchvision kornia scikit-learn'.split()
    return (f"{where}, Python {platform.python_version()}, "
            + ', '.join(f'{n} {importlib.metadata.version(n)}' for n in names) + '.')

def peak_memory():
    """Largest resident memory of this process so far, or its peak of GPU memory, in bytes.
    (`ru_maxrss` starts from the parent's on Linux, /proc does not.)"""
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status')
    if status.exists(): return 1024*next(int(l.split()[1]) for l in status.open() if l.startswith('VmHWM'))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def ratio(a, b):
    "Geometric mean of the paired ratios a/b and its 95 % interval (t, on logarithms), as text"
    l = np.log(np.asarray(a)/np.asarray(b))
    half = scipy.stats.t.ppf(.975, len(l)-1)*l.std(ddof=1)/len(l)**.5
    return f'{np.exp(l.mean()):.2f} ({np.exp(l.mean()-half):.2f} to {np.exp(l.mean()+half):.2f})'

def interval(d):
    "Mean of differences in points with its 95 % interval, as text, and the bounds"
    mean,low,high = confidence_interval(d)
    return f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]',low,high

def spread(x, fmt='.2f'):
    "Median (smallest to largest), as text"
    return f'{np.median(x):{fmt}} ({np.min(x):{fmt}} to {np.max(x):{fmt}})'

titles = dict(step='A training step', step_no_bf16='The same on a processor without bfloat16', every='A rare adversary',
    peers='Encoders after equal seconds', labels='Accuracy against the number of labels',
    optimizer='A step of the optimiser', tried='A faster step: what was tried', loss='The losses: time and memory',
    views='Two views of each image', photos='Reading photographs', eval='Evaluation', knn='Nearest neighbours',
    memory='Memory of evaluation', signs="The attack's signs in low precision", monitor='Watching for collapse',
    gpu_environment='A GPU', gpu_golden="The authors' numbers on a GPU", gpu_waits='What a GPU waits for',
    gpu_step='A training step on a GPU', gpu_throughput='Images a second on a GPU',
    gpu_evaluation='Evaluation on a GPU', gpu_processes='Two GPUs')

def save(name, command, lines, folder=root/'results'):
    "Write `name`.md to a folder; in that of all results, the page of all tables, too. Returns the text"
    text = '\n'.join([*lines, '', f'`{command}` on {machine()}']) + '\n'
    (Path(folder)/f'{name}.md').write_text(text)
    if Path(folder) == root/'results': write_page()
    return text

def write(name, command, lines): print(save(name, command, lines))

def write_page():
    "Write benchmarks/README.md from the files of results/"
    page = ['# Benchmarks', '', 'Ratios are of one run, in which what is compared took turns. '
            'Each table is made by the command below it; `DIR` is a folder of CIFAR-10 images.', '']
    for n,t in titles.items():
        f = root/'results'/f'{n}.md'
        if f.exists(): page += [f'## {t}', '', f.read_text().strip(), '']
    (root/'benchmarks'/'README.md').write_text('\n'.join(page))
