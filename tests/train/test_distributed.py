"Several processes, started by torchrun on the CPU, against one."
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from clae_fastai.train.checkpoint import checkpoints, load_checkpoint
from distributed_worker import exact_learner, losses, n_images, steps

here = Path(__file__).parent

def launcher(n, *args):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', *map(str, args)]

def on_cpus():
    return {**os.environ, 'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
        'ACCELERATE_MIXED_PRECISION': 'bf16'} # as `accelerate launch` sets it; a learner's own `precision` counts

def torchrun(n, *args, cwd=None, timeout=600):
    return subprocess.run(launcher(n, *args), cwd=cwd, capture_output=True, text=True, timeout=timeout, env=on_cpus())

def launch(n, *args):
    "Run the worker on `n` processes; its standard output"
    p = torchrun(n, here/'distributed_worker.py', *args)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-6000:]
    return p.stdout

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """All that two processes do, in one launch: results by name, of each rank;
    `two.out` is the folder, `two.log` what they print"""
    out = tmp_path_factory.mktemp('two')
    def _two(name): return results(out, name, 2)
    _two.out,_two.log = out,launch(2, 'exact', 'every_second', 'learner', 'monitors', 'resume', out)
    return _two

def results(out, name, n): return [torch.load(out/f'{name}-{r}.pt', weights_only=False) for r in range(n)]

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

@pytest.mark.slow
def test_monitors(two):
    a,b = two('monitors')
    assert a['skipped'] == b['skipped'] == 1 and same(a['state'], b['state'])
    assert .1 < a['row']['knn'] <= 1 and a['row']['z_std'] == b['row']['z_std'] > 0

@pytest.mark.slow
def test_every_second_step(two):
    """As one process on the whole batch; and the adversarial batch norms, which most steps do not use,
    move in attacked steps alone"""
    b = n_images//steps//2
    order = torch.arange(n_images).view(2, steps, b).transpose(0, 1).flatten()
    for m in losses:
        learn = exact_learner(m, 2*b, order, every=2)
        learn.fit(1)
        ranks,one = [o['seen'] for o in two(f'{m}-second')],learn.record.seen
        assert [o['n_views'] for o in one] == [o['n_views'] for o in ranks[0]] == [2+(i%2) for i in range(steps)]
        for i,s in enumerate(one):
            for o in (r[i] for r in ranks):
                for k in s['params']: close(o['params'][k], s['params'][k])
    a,b = two('second')
    # from the second of eight steps on
    assert same(a['state'], b['state']) and a['moved'] == b['moved'] == [i%2 == 0 for i in range(7)]

@pytest.mark.slow
@pytest.mark.parametrize('n', [2,4])
def test_equals_one_process_on_the_whole_batch(request, tmp_path, n):
    "Adversary, loss, averaged gradients and weights of three steps, float64, no batch norm"
    if n == 2: out = request.getfixturevalue('two').out
    else:
        out = tmp_path
        launch(n, 'exact', out)
    b = n_images//steps//n
    # a step's images: one slice of each rank's part
    order = torch.arange(n_images).view(n, steps, b).transpose(0, 1).flatten()
    for m in losses:
        learn = exact_learner(m, n*b, order)
        learn.fit(1)
        ranks,one = [o['seen'] for o in results(out, m, n)],learn.record.seen
        assert [len(o) for o in ranks] == [steps]*n and len(one) == steps
        for i,s in enumerate(one):
            r = [o[i] for o in ranks]
            assert torch.equal(torch.cat([o['x_q'] for o in r]), s['x_q'])
            clear = learn.clae.attack.seen[i].abs() >= 1e-12
            assert clear.double().mean() > .9
            close(torch.cat([o['x_adv'] for o in r])[clear], s['x_adv'][clear])
            close(sum(o['loss'] for o in r)/n, s['loss'])
            for o in r:
                for k in s['grads']:
                    close(o['grads'][k], s['grads'][k])
                    close(o['params'][k], s['params'][k])
            assert all(same(o['params'], r[0]['params']) for o in r)

    every = torch.cat([torch.arange(6.).view(3,2) + 10*r for r in range(n)])
    total = sum(range(1, n+1))
    for r,o in enumerate(results(out, 'gather', n)):
        own = every[3*r:3*r+3]
        assert torch.equal(o['every'], every) and torch.equal(o['plain'], every) and o['offset'] == 3*r
        assert torch.equal(o['once'], torch.full((3,2), float(total)))
        torch.testing.assert_close(o['twice'], 2*own*sum((1 + k)**2 for k in range(1, n+1))) # of sum_k (z + kz)^2
        assert o['types'] == [torch.float64, torch.float32, torch.bfloat16]

@pytest.mark.slow
def test_training_with_batch_norm(two):
    """The usual learner: shared shuffling and weights, own images and views, one log,
    and a learner that is as before afterwards"""
    a,b = two('digits')
    assert same(a['first'], b['first']) and same(a['state'], b['state']) and not same(a['first'], a['state'])
    assert a['n_iter'] == b['n_iter'] == [(4,4,.5),(4,8,1.)] # 149 images, 75 a rank, in batches of 16
    for e in (slice(0,4), slice(4,8)): # an epoch's images, divided between the ranks
        p,q = (set(torch.cat(o['seen'][e]).tolist()) for o in (a,b))
        assert len(p) == len(q) == 64 and not p & q
    assert [o.tolist() for o in a['seen'][:4]] != [o.tolist() for o in a['seen'][4:]]
    assert len(set(a['draws'] + b['draws'])) == 16
    # losses are means over the ranks
    assert a['values'] == b['values'] and len(a['values']) == 2 and len(a['values'][0]) == 4
    assert a['kept'] == b['kept'] == [True]*3 and not a['group'] and not b['group']
    assert a['valid'][0] == b['valid'][0] and len(a['preds'][0]) == len(b['preds'][0]) == len(a['labels'])
    for name in ('again','unlabelled','other'):
        a,b = (o['state'] for o in two(name))
        assert same(a, b), name
    assert all(o['kept'] == [True]*3 for o in two('again'))
    assert all(set(o['shapes']) == {(16,64),(1,64)} for o in two('other'))
    assert two.log.count('train_loss') == 18 # one table for each of the fits that got so far, of rank 0

@pytest.mark.slow
def test_after_the_context(two):
    "Evaluation, features, pictures and files are rank 0's alone; fastai's own loop says that there is no process group"
    a,b = two('alone')
    assert a['labels'].tolist() == two('digits')[0]['labels'] # in the data set's order
    assert a['features'].isfinite().all() and .1 < a['result'] <= 1 and (two.out/'encoder.safetensors').exists()
    for o in (a,b): assert len(o['outside']) == 3 and all('process group' in message for message in o['outside'])

@pytest.mark.slow
def test_batch_norms_and_failures(two):
    "SyncBatchNorms go when the context ends, also when they could not be used; a fit that fails leaves nothing behind"
    for o in two('sync'):
        assert o['n'] > 0 and len(o['sync']) == 2*o['n'] and all(o['sync'])
        assert 'SyncBatchNorm' in o['refused'] and o['restored'] == [True,True] and o['kept']
    a,b = two('fail')
    assert same(a['state'], b['state'])
    for o in (a,b):
        assert o['message'].endswith('boom') and o['wrapped'] and o['unwrapped']
        assert o['kept'] == [True]*3 and not o['group']

def drawn(run): return run['attack']['generator'][1]

@pytest.mark.slow
@pytest.mark.parametrize('attack', ['RFGSM','FFGSM','PGD'])
def test_resuming_on_as_many_processes(two, attack):
    a,b = two(f'resume-{attack}')
    for o in (a,b):
        whole,resumed = o['whole'],o['resumed']
        assert 'lights' in o['cut']['message'] and whole['message'] is resumed['message'] is None
        assert same(whole['state'], resumed['state']) and torch.equal(drawn(whole), drawn(resumed))
        assert whole['values'] == resumed['values']
    assert not torch.equal(drawn(a['whole']), drawn(b['whole']))

@pytest.mark.slow
def test_resuming_what_one_process_saved(two):
    "Each process draws starts of its own; weights are shared"
    a,b = (o['resumed'] for o in two('resume-one'))
    assert same(a['state'], b['state']) and not torch.equal(drawn(a), drawn(b))

def test_without_accelerate():
    "It imports and trains on one process; on more it says what is missing"
    code = '''if 1:
        import sys, os
        sys.modules['accelerate'] = None
        from clae_fastai.all import *
        pairs = [(torch.randn(3),torch.randn(1))]*8
        dls = DataLoaders.from_dsets(pairs, [], bs=4, num_workers=0, device='cpu')
        learn = Learner(dls, nn.Linear(3,1), MSELossFlat())
        with learn.distributed(), learn.no_bar(), learn.no_logging(): learn.fit(1)
        print('alone', local_dl(dls.train) is dls.train)
        os.environ.update(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1', MASTER_ADDR='localhost', MASTER_PORT='29500')
        try:
            with learn.distributed(): pass
        except ValueError as e: print(e)
    '''
    env = {k: v for k,v in os.environ.items() if k not in ('WORLD_SIZE','RANK')}
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env=env)
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines() == [
        'alone True', 'Training on several processes needs accelerate: pip install accelerate']

@pytest.mark.parametrize('rank,message', [(1,'data, after [(1, False), (1, True)]'),
                                          (2,'2 GPUs, and process 2 needs one of its own')])
def test_each_process_takes_its_gpu_first(rank, message):
    """Before fastai is imported, which takes the first one, and before there is data;
    one process too many hears what to do"""
    code = """if 1:
        import sys, torch
        from contextlib import nullcontext
        said = []
        def get_dls(*args, **kwargs): raise OSError(f'data, after {said}')
        def take(i): # the first time fastai is not there, and from then on there are GPUs
            said.append((i, 'fastai' in sys.modules))
        def n_gpus():
            if 'clae_fastai.runs' in sys.modules:
                sys.modules['clae_fastai.runs'].get_dls = get_dls
                rooms = sys.modules['clae_fastai.train.distributed']
                # nobody else is there
                rooms._process_group,rooms.default_device = nullcontext,lambda: torch.device('cpu')
            return 2
        torch.cuda.device_count,torch.cuda.set_device = n_gpus,take
        torch.cuda.is_available = lambda: (
            'clae_fastai.runs' in sys.modules and hasattr(sys.modules['clae_fastai.runs'], 'train'))
        from clae_fastai.cli import clae_train
        clae_train()
    """
    env = os.environ | dict(WORLD_SIZE='3', RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR='localhost',
                            MASTER_PORT='29500')
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env=env)
    assert p.returncode == 2 and message in p.stderr, p.stderr

# The command, started, stopped and killed

class Command:
    "`clae_train` on two processes, which train when this is made; its folder is `out`"
    started = []
    def __init__(self, out, *options):
        self.out,self.logs = out,Path(tempfile.mkdtemp(dir=out))
        for f in out.glob('code-*'): f.unlink()
        before = self.newest()
        cmd = launcher(2, '--log-dir', self.logs, '--redirects', 3, here/'distributed_worker.py',
                       'clae_train', *options, out)
        self.process = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=(self.logs/'launcher').open('w'),
                                        env=on_cpus())
        self.started.append(self)
        while self.newest() == before:
            time.sleep(.02)
            assert self.process.poll() is None, self.said()

    def newest(self): return [f.name for f in checkpoints(self.out/'runs'/'run'/'checkpoints')[-1:]]

    @property
    def workers(self):
        res = subprocess.run(['ps','--ppid',str(self.process.pid),'-o','pid='], capture_output=True, text=True)
        return [int(o) for o in res.stdout.split()]

    def said(self): return '\n'.join(f.read_text() for f in self.logs.rglob('stderr.log'))

    @property
    def reported(self): return {int(o) for o in re.findall(r'exitcode *: (-?\d+)', (self.logs/'launcher').read_text())}

    def finish(self, timeout=120):
        "Exit code of the launcher, and of the processes that came to write theirs"
        code = self.process.wait(timeout=timeout)
        return code,[f.read_text() for f in sorted(self.out.glob('code-*'))]

    def kill(self):
        for pid in (*self.workers, self.process.pid): os.kill(pid, signal.SIGKILL)
        self.process.wait()

@pytest.fixture(autouse=True)
def no_command_stays():
    "Also after a test that has failed"
    yield
    for command in Command.started:
        if command.process.poll() is None: command.kill()
    Command.started.clear()

def assert_same_runs(a, b):
    "Weights, optimiser, history, and what each process's random generators draw next"
    tables = [pd.read_csv(o/'history.csv').drop(columns='time') for o in (a,b)]
    assert tables[0].equals(tables[1])
    (file_a,file_b) = (checkpoints(o/'checkpoints')[-1] for o in (a,b))
    assert file_a.name == file_b.name
    x,y = (plain(load_checkpoint(o)) for o in (file_a,file_b))
    assert [k for k in x if x[k] != y[k]] == ['run_id']

def plain(o):
    """With checksums in place of tensors, and without what tells a resumed run: the history's times,
    and `Resume` among the callbacks"""
    if isinstance(o, torch.Tensor): return (str(o.dtype), *o.shape, hashlib.sha256(o.numpy().tobytes()).hexdigest())
    if isinstance(o, np.ndarray): return o.tolist()
    if isinstance(o, dict): return {k: plain(v) for k,v in o.items() if k not in ('rows','seconds')}
    return [p for v in o if (p := plain(v)) != ['Resume',{}]] if isinstance(o, (list,tuple)) else o

@pytest.mark.slow
def test_stopped_and_killed(tmp_path, pytestconfig):
    """SIGTERM and Ctrl-C at random moments, to the launcher, to one process, or to both and again: all stop at the
    same batch, with one checkpoint and the code that was promised. A process that is killed ends all, and the other
    says how to go on. One run suffers all of it, and ends where the one that nobody interrupted ends,
    on each process"""
    n,rng = pytestconfig.getoption('moments'),random.Random()
    stops = ([(to,rng.choice([signal.SIGTERM,signal.SIGINT])) for to in ['launcher','one','both']*n] +
             [('one',signal.SIGKILL)])
    rng.shuffle(stops)
    options = ['--limit', 640, '--bs', 32, '--epochs', 3*len(stops)+2, '--attack', 'rfgsm', '--name', 'run']
    for name in ('whole','stopped'): (tmp_path/name).mkdir()
    whole = Command(tmp_path/'whole', *options)
    assert whole.finish(300) == (0,['0','0']), whole.said()
    out = tmp_path/'stopped'
    for to,sig in stops:
        run = Command(out, *options)
        options = ['--resume', 'run']
        time.sleep(rng.uniform(0, .5))
        before,start,workers = run.newest(),time.time(),run.workers
        targets = dict(launcher=[run.process.pid], one=[rng.choice(workers)], both=workers*2)[to]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError): os.kill(pid, sig) # the second time
        code,codes = run.finish(60)
        said,took = run.said(),time.time() - start
        print(f"{sig.name:8} to {to:9} codes {','.join(codes):8} {took:5.1f} s  {', '.join(run.newest())}")
        assert code != 0 and took < 30 and 'Traceback' not in said, said
        if sig == signal.SIGKILL: assert codes == ['2'] and said.count('--resume run') == 1, said
        else:
            assert codes == [str(128 + sig)]*2 and run.reported <= {128 + sig}, (codes, run.reported, said)
            assert said.count(f'{sig.name}: 2 processes save after this batch') == 1 and run.newest() != before, said
    last = Command(out, *options)
    assert last.finish(300) == (0,['0','0']), last.said()
    assert_same_runs(*(tmp_path/o/'runs'/'run' for o in ('whole','stopped')))

@pytest.mark.slow
def test_a_first_process_that_takes_long(tmp_path):
    "It loads, and later evaluates, for twice the time after which a collective gives up; nobody waits in one"
    launch(2, 'slow_first', tmp_path)
    assert (tmp_path/'runs'/'slow'/'summary.json').exists()

clae_train = Path(sys.executable).with_name('clae_train')

def cut(run):
    "As if the run had died in its last epoch"
    (run/'summary.json').unlink()
    checkpoints(run/'checkpoints')[-1].unlink()
    return checkpoints(run/'checkpoints')[-1].stem

@pytest.mark.slow
def test_command_and_resuming_on_another_number_of_processes(cli):
    "`torchrun clae_train`: one run folder, one log; interrupted, it goes on in one process, and again in two"
    p = torchrun(2, clae_train, '--limit', 256, '--epochs', 3, '--every-batches', 1, '--name', 'two', cwd=cli.cwd)
    assert p.returncode == 0, p.stderr[-4000:]
    run, = (cli.cwd/'runs').iterdir()
    assert p.stdout.count('\ntrained encoder') == 1 and p.stdout.count('in 2 processes; 2 steps an epoch') == 1
    assert load_checkpoint(checkpoints(run/'checkpoints')[-1])['n_iter'] == 2 # of 128 images a process, by 64
    def summary(): return json.loads((run/'summary.json').read_text())
    first = summary()
    assert first['settings']['processes'] == 2 and len(pd.read_csv(run/'history.csv')) == 3

    assert cut(run).startswith('epoch0002-batch')
    r = cli('clae_train', '--resume', 'two')
    assert r.returncode == 0, r.stderr
    assert summary()['settings']['processes'] == 1 and len(pd.read_csv(run/'history.csv')) == 3
    assert summary()['metrics']['knn']['untrained'] == first['metrics']['knn']['untrained']

    assert cut(run).startswith('epoch0002-batch')
    r = torchrun(2, clae_train, '--resume', 'two', cwd=cli.cwd)
    assert r.returncode == 0, r.stderr[-4000:]
    assert summary()['settings']['processes'] == 2 and len(pd.read_csv(run/'history.csv')) == 3

@pytest.mark.slow
def test_user_errors_of_several_processes(cli):
    r = torchrun(2, clae_train, '--eps', '-1', cwd=cli.cwd)
    assert r.returncode != 0 and r.stderr.count('clae_train: ') == 1

fits_once = '''
from clae_fastai.all import *
learn = clae_learner(get_dls('digits', bs=32, limit=128), resnet8, views='digits')
with learn.distributed(), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
learn.model.encoder.conv1.register_forward_hook(lambda m, x, out: print(f'a convolution in {out.dtype}'))
learn.model(learn.dls.one_batch()[0])
'''

@pytest.mark.slow
def test_a_learners_own_precision(tmp_path):
    "Whatever the launcher is configured for"
    (file := tmp_path/'fits_once.py').write_text(fits_once)
    p = torchrun(2, file, cwd=tmp_path)
    assert p.stdout.count('a convolution in torch.float32') == 2, p.stdout + p.stderr
