"A trial that takes no time, and a process that works through a sweep of them: `python experiments_worker.py FOLDER N SECONDS`."
import json, os, signal, sys, time
from pathlib import Path

import torch

def log(folder, *words):
    with (folder.parent/'log').open('a') as f: f.write(' '.join(map(str, (os.getpid(), folder.name, *words))) + '\n')

def fake(options, folder):
    "Two steps, of which the first is not done again; what `options['does']` says happens in between"
    if (step := folder/'step').exists(): log(folder, 'resume')
    else:
        log(folder, 'start')
        step.touch()
        if options.get('does') == 'fail': raise KeyError('broken')
        if options.get('does') == 'die': os.kill(os.getpid(), signal.SIGKILL)
    if options.get('does') == 'always die': os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(options.get('sleep', 0))
    accuracy = .3 + .1*options['eps'] + .01*options['seed'] + .001*len(options['method'])
    metrics = dict(accuracy=dict(knn=accuracy, lr=accuracy + .2), train_seconds=1.5, threads=torch.get_num_threads())
    if options.get('transfer'): metrics['transfer'] = {'digits': .5}
    tmp = folder/'summary.json.tmp'
    tmp.write_text(json.dumps(dict(settings=dict(device='cpu'), seed=options['seed'], versions=dict(torch='9.9'), metrics=metrics)))
    tmp.replace(folder/'summary.json')
    log(folder, 'end')

def trials(n, **kwargs): return [dict(data='digits', method='simclr', eps=.03, seed=i, **kwargs) for i in range(n)]

if __name__ == '__main__':
    from clae_fastai.paper.experiments import sweep
    folder,n,seconds = Path(sys.argv[1]),int(sys.argv[2]),float(sys.argv[3])
    folder.mkdir(exist_ok=True)
    (folder/f'ready-{os.getpid()}').touch()
    while not (folder/'go').exists(): time.sleep(.01)
    sweep(trials(n, sleep=seconds), fake, folder)
