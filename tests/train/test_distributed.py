"Several processes, started by torchrun on the CPU, against one."
import json, os, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
import torch

from clae_fastai.train.checkpoint import checkpoints, load_checkpoint
from distributed_worker import exact_learner, losses, n_images, steps

here = Path(__file__).parent

def torchrun(n, *args, cwd=None, timeout=600):
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *map(str, args)]
    return subprocess.run(cmd, cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, 'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})

def launch(n, *args):
    "Run the worker on `n` processes; its standard output"
    p = torchrun(n, here/'distributed_worker.py', *args)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-6000:]
    return p.stdout

def results(out, name, n): return [torch.load(out/f'{name}-{r}.pt', weights_only=False) for r in range(n)]

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

@pytest.mark.slow
def test_monitors(tmp_path):
    for r in '01': (tmp_path/r).mkdir()
    launch(2, 'monitors', tmp_path)
    a,b = results(tmp_path, 'monitors', 2)
    assert a['skipped'] == b['skipped'] == 1 and same(a['state'], b['state'])
    assert .1 < a['row']['knn'] <= 1 and a['row']['z_std'] == b['row']['z_std'] > 0

@pytest.mark.slow
@pytest.mark.parametrize('n', [2,4])
def test_equals_one_process_on_the_whole_batch(tmp_path, n):
    "Adversary, loss, averaged gradients and weights of three steps, float64, no batch norm"
    launch(n, 'exact', tmp_path)
    b = n_images//steps//n
    order = torch.arange(n_images).view(n, steps, b).transpose(0, 1).flatten() # a step's images: one slice of each rank's part
    for m in losses:
        learn = exact_learner(m, n*b, order)
        learn.fit(1)
        ranks,one = results(tmp_path, m, n),learn.record.seen
        assert [len(o) for o in ranks] == [steps]*n and len(one) == steps
        for i,s in enumerate(one):
            r = [o[i] for o in ranks]
            assert torch.equal(torch.cat([o['x_q'] for o in r]), s['x_q'])
            clear = learn.clae.attack.seen[i].abs() >= 1e-12
            assert clear.double().mean() > .9
            close(torch.cat([o['x_adv'] for o in r])[clear], s['x_adv'][clear])
            close(sum(o['loss'] for o in r)/n, s['loss'])
            for o in r:
                for k in s['grads']: close(o['grads'][k], s['grads'][k]); close(o['params'][k], s['params'][k])
            assert all(same(o['params'], r[0]['params']) for o in r)

    g = results(tmp_path, 'gather', n)
    every = torch.cat([torch.arange(6.).view(3,2) + 10*r for r in range(n)])
    total = sum(range(1, n+1))
    for r,o in enumerate(g):
        own = every[3*r:3*r+3]
        assert torch.equal(o['every'], every) and torch.equal(o['plain'], every) and o['offset'] == 3*r
        assert torch.equal(o['once'], torch.full((3,2), float(total)))
        torch.testing.assert_close(o['twice'], 2*own*sum((1 + k)**2 for k in range(1, n+1))) # of sum_k (z + kz)^2
        assert o['types'] == [torch.float64, torch.float32, torch.bfloat16]

@pytest.mark.slow
def test_training_with_batch_norm(tmp_path):
    "The usual learner: shared shuffling and weights, own images and views, one log, and a learner that is as before afterwards"
    out = launch(2, 'learner', tmp_path)
    a,b = results(tmp_path, 'digits', 2)
    assert same(a['first'], b['first']) and same(a['state'], b['state']) and not same(a['first'], a['state'])
    assert a['n_iter'] == b['n_iter'] == [(4,4,.5),(4,8,1.)] # 149 images, 75 a rank, in batches of 16
    for e in (slice(0,4), slice(4,8)): # an epoch's images, divided between the ranks
        p,q = (set(torch.cat(o['seen'][e]).tolist()) for o in (a,b))
        assert len(p) == len(q) == 64 and not p & q
    assert [o.tolist() for o in a['seen'][:4]] != [o.tolist() for o in a['seen'][4:]]
    assert len(set(a['draws'] + b['draws'])) == 16
    assert a['values'] == b['values'] and len(a['values']) == 2 and len(a['values'][0]) == 4 # losses are means over the ranks
    assert a['same'] == b['same'] == [True]*3 and not a['group'] and not b['group']
    assert a['valid'][0] == b['valid'][0] and len(a['preds'][0]) == len(b['preds'][0]) == len(a['labels'])
    assert a['one'][1].tolist() == a['labels'] # on rank 0 alone, in the data set's order
    for name in ('again','unlabelled','other'):
        a,b = (o['state'] for o in results(tmp_path, name, 2))
        assert same(a, b), name
    assert all(set(o['shapes']) == {(16,64),(1,64)} for o in results(tmp_path, 'other', 2))
    for o in results(tmp_path, 'sync', 2): assert o['n'] > 0 and len(o['sync']) == 2*o['n'] and all(o['sync']) and o['restored']
    for o in results(tmp_path, 'fail', 2): assert o['message'].endswith('boom') and o['unwrapped']
    assert out.count('train_loss') == 5 # one table for each of the fits that got so far, of rank 0

@pytest.mark.slow
def test_fastai_context(tmp_path):
    launch(2, 'fastai', tmp_path)
    a,b = results(tmp_path, 'fastai', 2)
    assert same(a['state'], b['state']) and not set(a['draws']) & set(b['draws'])

def test_without_accelerate():
    "It imports and trains on one process; on more it says what is missing"
    code = '''if 1:
        import sys, os
        sys.modules['accelerate'] = None
        from clae_fastai.all import *
        learn = Learner(DataLoaders.from_dsets([(torch.randn(3),torch.randn(1))]*8, [], bs=4, num_workers=0, device='cpu'), nn.Linear(3,1), MSELossFlat())
        with learn.distributed(): print('alone')
        os.environ.update(WORLD_SIZE='2', RANK='1')
        try:
            with learn.distributed(): pass
        except ImportError as e: print(e)
    '''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env={k: v for k,v in os.environ.items() if k not in ('WORLD_SIZE','RANK')})
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines() == ['alone', 'Training on several processes needs accelerate: pip install accelerate']

clae_train = Path(sys.executable).with_name('clae_train')
short = ['--limit', 256, '--epochs', 3, '--every-batches', 1]

@pytest.mark.slow
def test_command_and_resuming_on_another_number_of_processes(cli):
    "`torchrun clae_train`: one run folder, one log; killed, it goes on in one process"
    p = torchrun(2, clae_train, *short, '--name', 'two', cwd=cli.cwd)
    assert p.returncode == 0, p.stderr[-4000:]
    run, = (cli.cwd/'runs').iterdir()
    assert p.stdout.count('\ntrained encoder') == 1 and p.stdout.count('in 2 processes') == 1 and len(pd.read_csv(run/'history.csv')) == 3
    summary = json.loads((run/'summary.json').read_text())
    assert summary['settings']['processes'] == 2
    assert load_checkpoint(checkpoints(run/'checkpoints')[-1])['n_iter'] == 2 # of 128 images a process, by 64

    (run/'summary.json').unlink() # as if it had died in the last epoch
    for f in checkpoints(run/'checkpoints')[-1:]: f.unlink()
    last, = checkpoints(run/'checkpoints')[-1:]
    r = cli('clae_train', '--resume', 'two')
    assert r.returncode == 0, r.stderr
    s = json.loads((run/'summary.json').read_text())
    assert s['settings']['processes'] == 1 and len(pd.read_csv(run/'history.csv')) == 3 and last.stem.startswith('epoch0002-batch')
    assert s['metrics']['knn']['untrained'] == summary['metrics']['knn']['untrained']

@pytest.mark.slow
def test_command_on_one_and_on_two_processes(cli):
    "Begun on one process, killed, gone on with on two; user errors say which process they are from"
    p = subprocess.Popen([clae_train, *map(str, short), '--name', 'one'], cwd=cli.cwd, env={**os.environ, 'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = cli.cwd/'runs'/'one'/'checkpoints'
    while not checkpoints(folder): assert p.poll() is None; time.sleep(.02)
    p.kill(); p.wait()
    r = torchrun(2, clae_train, '--resume', 'one', cwd=cli.cwd)
    assert r.returncode == 0, r.stderr[-4000:]
    assert json.loads((folder.parent/'summary.json').read_text())['settings']['processes'] == 2 and len(pd.read_csv(folder.parent/'history.csv')) == 3
    r = torchrun(2, clae_train, '--eps', '-1', cwd=cli.cwd)
    assert r.returncode != 0 and r.stderr.count('clae_train: ') == 1
