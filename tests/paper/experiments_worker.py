"A trial that takes no time, in a module that other processes can import."
import json
import os
import signal
import time
from pathlib import Path

import torch

worker = Path(__file__)

def log(folder, *words):
    with (folder.parent/'log').open('a') as f: f.write(' '.join(map(str, (os.getpid(), folder.name, *words))) + '\n')

def events(folder):
    "(process, trial, 'start', 'resume' or 'end') of a sweep's folder, in their order"
    return [o.split() for o in (folder/'log').read_text().splitlines()] if (folder/'log').exists() else []

def meet(folder, seconds=120):
    "Wait for a second process of the sweep"
    end = time.time() + seconds
    while len({o[0] for o in events(folder)}) < 2:
        assert time.time() < end, 'waited in vain'
        time.sleep(.01)

def fake(options, folder):
    "Two steps, of which the first is not done again; what `options['does']` says happens in between"
    does = options.get('does')
    if (step := folder/'step').exists(): log(folder, 'resume')
    else:
        log(folder, 'start')
        step.touch()
        if does == 'fail': raise KeyError('broken')
        if does == 'meet': meet(folder.parent)
        if does == 'die': os.kill(os.getpid(), signal.SIGKILL)
    if does == 'always die': os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(options.get('sleep', 0))
    accuracy = .3 + .1*options['eps'] + .01*options['seed'] + .001*len(options['method'])
    metrics = dict(accuracy=dict(knn=accuracy, lr=accuracy + .2), train_seconds=1.5, threads=torch.get_num_threads())
    if options.get('transfer'): metrics['transfer'] = {'digits': .5}
    summary = dict(settings=dict(device='cpu'), seed=options['seed'], versions=dict(torch='9.9'), metrics=metrics)
    tmp = folder/'summary.json.tmp'
    tmp.write_text(json.dumps(summary))
    tmp.replace(folder/'summary.json')
    log(folder, 'end')

def trials(n, **kwargs): return [dict(data='digits', method='simclr', eps=.03, seed=i, **kwargs) for i in range(n)]
