#!/usr/bin/env python3
"""All that a GPU has to show, in nine minutes at most: `python benchmarks/gpu.py` writes `results/gpu_*.md`,
a table a part.

environment  what it ran on
golden       the authors' numbers (`tests/golden`) on the GPU, with the greatest difference
waits        a training batch under `torch.cuda.set_sync_debug_mode('error')`, and every wait of a batch with its line
step         `bench_step.py` in fp32, TF32, bf16 and fp16, channels-last, compiled
throughput   images a second and peak memory of CLAE, SimCLR and lightly's SimCLR
evaluation   features, kNN and probe
processes    two processes on two GPUs

Each part has a time of its own. Its table is written after every row, so that what is cut off leaves what it had; a
row that fails says why, one that comes too late that it was not reached. A part that takes longer, or breaks the
GPU's context, ends its process, and another one goes on with the next part. `--tiny` tries all of it in two minutes
without a GPU, on networks and images too small to mean anything, and writes to a temporary folder; `--out DIR` to
another."""
import argparse
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import bench_step
import report
from bench_step import learner_of, sync
from clae_fastai.all import (PGD, Callback, Recorder, TwoViews, create_encoder, default_device, extract_features,
    knn_predict, linear_probe, num_distrib, num_features, rank_distrib, resnet8, resnet18, resnet50, set_rank_device,
    set_seed)

seconds = dict(environment=15, golden=25, waits=40, step=150, throughput=175, evaluation=40, processes=55) # 500 in all
last_row = 10 # seconds before the end of a part after which no row is begun
cuda = torch.cuda.is_available()

def sizes(tiny):
    "What is measured: on a GPU, and as a test on a processor"
    if tiny:
        return dict(archs=[resnet8], sides=[16], batches=[8], images=16,
                    bank=300, queries=50, dim=16, adam=2, workers=1, epochs=2)
    return dict(archs=[resnet18, resnet50], sides=[32,224], batches=[256,64,1024], images=512,
                bank=50_000, queries=10_000, dim=512, adam=20, workers=os.cpu_count(), epochs=3)

# What the parts share

class Table:
    "A part's table, written after every row"
    def __init__(self, part, columns, note, args):
        self.part,self.note,self.args = part,note,args
        self.lines = [f"| {' | '.join(columns)} |", '|'+'---|'*len(columns)]
        self.n_cells = len(columns)

    def save(self):
        note = [o for o in (self.note, '' if cuda else 'There was no GPU: this ran on a processor, as a test.') if o]
        report.save(f'gpu_{self.part}', command(self.args), [*self.lines, '', *note], self.args.out)

    def add(self, *cells):
        cells = [str(c).replace('|', '/').replace('\n', ' ') for c in cells]
        self.lines.append(f"| {' | '.join([*cells, *['']*(self.n_cells - len(cells))])} |")
        print(self.lines[-1], flush=True)
        self.save()

    def measure(self, what, f):
        "A row: the cells `what`, and those that `f` returns, or why there are none"
        if time.time() > self.args.until - last_row: return self.add(*what, 'not reached in time')
        self.add(*what, *attempt(f))

def attempt(f):
    "What `f` returns, or in a single cell why it did not"
    try: return f()
    except torch.OutOfMemoryError: return ['out of memory']
    except Exception as e:
        traceback.print_exc()
        return [f'{type(e).__name__}: {" ".join(str(e).split())[:160]}']

def command(args): return 'python benchmarks/gpu.py' + ' --tiny'*args.tiny

def reset_peak():
    gc.collect() # learners and their callbacks point at each other
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def peak_mib(): return f'{torch.cuda.max_memory_allocated()/2**20:,.0f}' if cuda else '-'

def memory_images(n, side):
    "`n` random images; drawing them all would take longer than training on them"
    few = torch.randint(0, 256, (min(n, 256),3,side,side), dtype=torch.uint8)
    return few[torch.arange(n) % len(few)]

class EpochTimes(Callback):
    "Seconds a batch of each epoch's training, from before its first batch is loaded until the last is done"
    def before_fit(self): self.seconds = []
    def before_train(self): sync(); self.start = time.perf_counter()
    def after_train(self): sync(); self.seconds.append((time.perf_counter() - self.start)/len(self.dls.train))

def epoch_seconds(learn, epochs):
    "Seconds a batch of all epochs but the first, which warms up"
    with learn.no_bar(), learn.added_cbs(EpochTimes()):
        learn.fit(epochs, 3e-4)
        return learn.epoch_times.seconds[1:]

def loop_seconds(step, n, rounds):
    "Seconds of a step, in each of some rounds of `n` steps"
    for _ in range(2): step()
    res = []
    for _ in range(rounds):
        sync(); start = time.perf_counter()
        for _ in range(n): step()
        sync(); res.append((time.perf_counter() - start)/n)
    return res

def milliseconds(t): return report.spread(1000*np.array(t))
def images_a_second(bs, t): return report.spread(bs/np.array(t), ',.0f')

# The parts

def environment(args):
    table = Table('environment', ['what','value'], '', args)
    if cuda:
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            table.add(f'GPU {i}', f'{p.name}, {p.total_memory/2**30:.0f} GiB, capability {p.major}.{p.minor}, '
                f'{p.multi_processor_count} multiprocessors')
        query = ['nvidia-smi','--query-gpu=driver_version,power.limit,clocks.max.sm','--format=csv,noheader']
        table.measure(['driver, power limit, highest clock'],
            lambda: subprocess.check_output(query, text=True, timeout=10).split('\n')[:1])
        table.add('NCCL', '.'.join(map(str, torch.cuda.nccl.version())))
    else: table.add('GPU', 'none')
    table.add('processor',
        f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads')
    table.add('CUDA, cuDNN', f'{torch.version.cuda}, {torch.backends.cudnn.version()}')
    cudnn = torch.backends.cudnn
    table.add('settings', f'benchmark {cudnn.benchmark}, deterministic {cudnn.deterministic}, TF32 {cudnn.allow_tf32}')
    table.add('TF32 in matrix products', torch.backends.cuda.matmul.allow_tf32)
    for n in ('triton','lightly','timm','accelerate'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError): table.add(n, importlib.metadata.version(n))
    git = ['git','-C',report.root,'rev-parse','HEAD']
    with contextlib.suppress(Exception):
        table.add('commit', subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip())

def golden(args):
    sys.path.insert(0, str(report.root/'tests'/'method'))
    import test_golden as authors
    table = Table('golden', ['method','what','greatest difference','numbers'],
        "Float64. Three steps of training, each from what the last one left; "
        "on a processor every difference must be below 1e-9. "
        "A sign that differs changes its pixel by twice eps, .06.", args)
    device = default_device()
    def _differences(method, d):
        got = {'attack/x_adv': authors.attacked(d, method, device), **authors.three_steps(d, method, device)}
        rows = {}
        for k,v in got.items():
            kind = 'attack' if k.startswith('attack') else k.split('/')[1]
            want = torch.tensor(d[k.replace('attack', 'step0')])
            worst,n = rows.get(kind, (0.,0))
            rows[kind] = max(worst, (v.cpu() - want).abs().max().item()),n+want.numel()
        return rows
    for method in authors.losses:
        d = np.load(report.root/'tests'/'golden'/f'step_{method}.npz')
        rows = attempt(lambda: _differences(method, d))
        if isinstance(rows, list): table.add(method, 'three steps', *rows)
        else:
            for kind,(worst,n) in rows.items(): table.add(method, kind, f'{worst:.1e}', f'{n:,}')
    def _knn():
        d = np.load(report.root/'tests'/'golden'/'knn.npz')
        a,y,b,t = (torch.tensor(d[k]).to(device)
                   for k in ('train_features','train_labels','test_features','test_labels'))
        settings = [(k,t) for k in (1,5,200) for t in (.1,.5)]
        accuracies = [100*(knn_predict(a, y, b, *s) == t).double().mean().item() - d['accuracy/k{}_t{}'.format(*s)]
                      for s in settings]
        return f'{np.abs(accuracies).max():.1e}',len(settings)
    table.measure(['kNN','accuracy, percent'], _knn)

class Waits(Callback):
    """Batches in which the host must not wait, from views to the optimiser's step;
    the copy of the loss, which comes after it, may"""
    order,run_valid = -10**6,False
    def __init__(self, mode): self.mode = mode
    def before_batch(self): set_sync_mode(self.mode)

class LossMayWait(Callback):
    order,run_valid = Recorder.order-.5,False
    def after_batch(self): set_sync_mode('default')

def set_sync_mode(mode):
    if cuda: torch.cuda.set_sync_debug_mode(mode)

def waits(args):
    s,tiny = sizes(args.tiny),args.tiny
    arch,side,bs = s['archs'][0],s['sides'][0],s['batches'][0]
    table = Table('waits',
        ['training','under `error`','waits a batch, loading and copy of the loss included, and where'],
        "Under `error` a wait raises, in views, attack, forward, loss, backward and the optimiser's step. "
        "Then all waits of a whole epoch, counted under `warn`, over its batches.", args)
    settings = {'SimCLR': dict(eps=0), 'CLAE': {},
        'CLAE, channels-last': dict(channels_last=True), 'CLAE, bf16': dict(precision='bf16'),
        'CLAE, fp16, whose scaler asks for overflow': dict(precision='fp16'),
        'plain': dict(method='plain'), 'UEL': dict(method='uel'),
        **{f'attack {a}': dict(attack=a) for a in ('rfgsm','ffgsm','random')},
        'attack PGD, l2, pixels': dict(attack=PGD(.03, norm='l2', space='pixel')),
        'steps skipped where not finite': dict(on_nonfinite='skip')}
    n = 2 if tiny else 5
    images = memory_images(n*bs, side)
    def _where(w): return f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
    def _row(kwargs):
        learn = learner_of(images, bs, arch, **kwargs)
        def _fit(*cbs):
            try:
                with learn.no_bar(): learn.fit(1, 3e-4, cbs=cbs)
            finally: set_sync_mode('default')
        _fit() # what happens once
        strict = attempt(lambda: [_fit(Waits('error'), LossMayWait()), 'no wait'][1:])[0]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            set_sync_mode('warn')
            _fit()
        places = [_where(w) for w in found if 'synchronizing CUDA operation' in str(w.message)]
        counts = {p: places.count(p)/n for p in dict.fromkeys(places)}
        return strict if cuda else 'not counted',', '.join(f'{c:g} {p}' for p,c in counts.items()) or 'none'
    for name,kwargs in settings.items(): table.measure([name], functools.partial(_row, kwargs))

@contextlib.contextmanager
def tf32(allowed):
    before = torch.backends.cudnn.allow_tf32,torch.backends.cuda.matmul.allow_tf32
    def _set(cudnn, matmul): torch.backends.cudnn.allow_tf32,torch.backends.cuda.matmul.allow_tf32 = cudnn,matmul
    _set(allowed, allowed)
    try: yield
    finally: _set(*before)

def step(args):
    s,tiny = sizes(args.tiny),args.tiny
    arch,side,bs = s['archs'][0],s['sides'][0],s['batches'][0]
    bench_step.bs,bench_step.side = bs,side
    n,rounds = (1,1) if tiny else (20,3)
    table = Table('step',
        ['step','precision','compiled','ms, median (range)','published in fp32 / this','peak memory, MiB'],
        f"{arch.__name__}, {side}x{side} images, batch {bs}; rounds of {n} steps. "
        "Published, and passes: see `bench_step.py`, always of a ResNet-18. "
        "CLAE and SimCLR through the Learner, loading included. "
        "Compiled: the encoder, by `torch.compile`, the time of which is left out.", args)
    images = memory_images(n*bs, side)
    published = []
    def _cells(t): return milliseconds(t),f'{np.median(published)/np.median(t):.2f}' if published else '',peak_mib()
    def _bare(make, precision, channels_last):
        t = loop_seconds(make(precision, channels_last), n, rounds)
        if not published: published.extend(t) # the first row
        return _cells(t)
    def _ours(precision, channels_last, eps, compiled):
        learn = learner_of(images, bs, arch, eps=eps, precision=precision, channels_last=channels_last)
        if compiled:
            torch.compiler.reset() # each row compiles anew: graphs of others count towards a limit
            learn.model.encoder = torch.compile(learn.model.encoder, backend='eager' if tiny else 'inductor')
        return _cells(epoch_seconds(learn, rounds+1))
    def _measure(who, kind, f, compiled=False):
        precision,channels_last = kind
        def _row():
            reset_peak()
            with tf32(precision == 'tf32'): return f('fp32' if precision == 'tf32' else precision, channels_last)
        table.measure([who, precision + ', channels-last'*channels_last, 'yes' if compiled else ''], _row)
    kinds = [(precision,channels_last) for channels_last in (False,True) for precision in ('fp32','tf32','fp16','bf16')]
    for kind in kinds[:2]: _measure('published', kind, functools.partial(_bare, bench_step.published_step))
    def _measure_ours(kinds, compiled):
        for kind in kinds:
            for who,eps in (('clae',.03),('simclr',0.)):
                _measure(who, kind, functools.partial(_ours, eps=eps, compiled=compiled), compiled)
    _measure_ours(kinds[::-1], False)
    for kind in kinds:
        if kind[0] != 'fp16': # its time is bf16's
            _measure('passes', kind, functools.partial(_bare, bench_step.passes_step))
    _measure_ours(kinds[::-1][:1 if tiny else None], True) # last, as compiling takes long, and the most useful first

def lightly_step(arch, side):
    "A step of lightly's SimCLR, in bf16 and channels-last as ours, and the two views that it takes"
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    encoder = create_encoder(arch, size=side)
    n = num_features(encoder, 3, [side,side])
    model = nn.Sequential(encoder, SimCLRProjectionHead(n, n, 128)).to(
        default_device(), memory_format=torch.channels_last)
    loss,opt = NTXentLoss(.5),torch.optim.Adam(model.parameters(), 3e-4)
    def _step(x_q, x_p):
        x_q,x_p = (x.to(default_device(), non_blocking=True, memory_format=torch.channels_last) for x in (x_q, x_p))
        opt.zero_grad()
        with torch.autocast(x_q.device.type, torch.bfloat16): value = loss(model(x_q), model(x_p))
        value.backward()
        opt.step()
    return _step

class PILImages(torch.utils.data.Dataset):
    "Images in memory, each seen twice through a transform"
    def __init__(self, images, transform, n):
        from PIL import Image
        self.images,self.transform,self.n = ([Image.fromarray(o.permute(1,2,0).numpy()) for o in images[:256]],
                                             transform, n)
    def __len__(self): return self.n
    def __getitem__(self, i): return self.transform(self.images[i % len(self.images)])

def throughput(args):
    s = sizes(args.tiny)
    table = Table('throughput', ['network','side','batch','what','images a second, median (range)','peak memory, MiB'],
        "bf16, channels-last, random images, no labels; a 3x3 stem at 32 pixels, the ImageNet stem at 224. "
        "CLAE and SimCLR: `clae_learner`, loading and views included. "
        "lightly, the same tensors: its loss, head and a plain loop with torch's Adam, "
        "on our loader's batches and views. "
        "lightly, its own loader: its `SimCLRTransform` on images in memory, without blur at 32 pixels, "
        f"in PyTorch's loader of {s['workers']} processes, once it is busy.", args)
    def _ours(arch, side, bs, n, eps):
        reset_peak()
        t = epoch_seconds(learner_of(memory_images(n*bs, side), bs, arch, eps=eps,
                                     precision='bf16', channels_last=True), s['epochs'])
        return images_a_second(bs, t),peak_mib()
    def _same_tensors(arch, side, bs, n):
        reset_peak()
        dl,views = learner_of(memory_images(n*bs, side), bs, arch, eps=0).dls.train,TwoViews.from_preset('simclr', side)
        step,t = lightly_step(arch, side),[]
        for _ in range(s['epochs']):
            sync(); start = time.perf_counter()
            for x,*_ in dl: step(*(v.as_subclass(torch.Tensor) for v in views(x)))
            sync(); t.append((time.perf_counter() - start)/n)
        return images_a_second(bs, t[1:]),peak_mib()
    def _own_loader(arch, side, bs, n):
        from lightly.transforms import SimCLRTransform
        reset_peak()
        skipped,counted = s['workers'],2*s['workers'] # batches: all processes are at work, and have handed over twice
        data = PILImages(memory_images(256, side), SimCLRTransform(side, gaussian_blur=.5 if side > 64 else 0.),
                         bs*(skipped+counted))
        loader = iter(torch.utils.data.DataLoader(data, bs, num_workers=s['workers'], pin_memory=cuda))
        step = lightly_step(arch, side)
        for _ in range(skipped): step(*next(loader))
        sync(); start = time.perf_counter()
        for _ in range(counted): step(*next(loader))
        sync()
        return images_a_second(bs, [(time.perf_counter() - start)/counted]),peak_mib()
    for bs in s['batches']:
        for side in s['sides']:
            for arch in s['archs']:
                n = 2 if args.tiny else max(4, min(20, 4096//bs)) if side < 64 else 3
                rows = dict(CLAE=functools.partial(_ours, eps=.03), SimCLR=functools.partial(_ours, eps=0.))
                rows['lightly, the same tensors'] = _same_tensors
                if bs == s['batches'][0]: rows['lightly, its own loader'] = _own_loader
                for what,f in rows.items():
                    table.measure([arch.__name__, side, bs, what], functools.partial(f, arch, side, bs, n))

def evaluation(args):
    s,device = sizes(args.tiny),default_device()
    table = Table('evaluation', ['what','where','seconds','result'],
        f"Features: random images of {s['sides'][-1]} pixels. "
        f"kNN (k 200) and probes: {s['queries']:,} against {s['bank']:,} made-up features "
        f"of {s['dim']} numbers in 10 classes. "
        f"Features and kNN: the second call; probes: once, `adam` {s['adam']} epochs, `lbfgs` 3 penalties. "
        "The results must not depend on where.", args)
    set_seed(0)
    y,test_y = torch.arange(s['bank'])%10,torch.arange(s['queries'])%10
    centres = torch.randn(10, s['dim'])
    x,test_x = (.3*centres[o] + torch.randn(len(o), s['dim']) for o in (y, test_y))
    def _twice(f):
        f(); sync(); start = time.perf_counter()
        res = f()
        sync()
        return time.perf_counter() - start,res
    def _features(arch):
        learn = learner_of(memory_images(s['images'], s['sides'][-1]), s['batches'][0], arch, eps=0)
        t,(h,_) = _twice(lambda: extract_features(learn, learn.dls.train.new(shuffle=False, drop_last=False)))
        return f'{t:.2f}',f"{len(h)/t:,.0f} images a second"
    def _knn(device):
        t,predicted = _twice(lambda: knn_predict(*(o.to(device) for o in (x, y, test_x)), min(200, len(x)//2)))
        return f'{t:.2f}',f'{100*(predicted.cpu() == test_y).float().mean():.2f} % right'
    def _probe(solver):
        start = time.perf_counter()
        p = linear_probe((x, y), (test_x, test_y), solver, epochs=s['adam'], l2s=[1.,.1,.01], device=device)
        return f'{time.perf_counter() - start:.2f}',f'{100*p.final:.2f} % right'
    for arch in s['archs']: table.measure([f'features, {arch.__name__}', device], lambda: _features(arch))
    for where in dict.fromkeys((str(device), 'cpu')): table.measure(['kNN', where], lambda: _knn(where))
    for solver in ('adam','lbfgs'): table.measure([f'probe, {solver}', device], lambda: _probe(solver))

def distributed_epochs(args):
    "What each process of `processes` does"
    s = sizes(args.tiny)
    bs,n = s['batches'][0],2 if args.tiny else 20
    set_seed(0)
    learn = learner_of(memory_images(n*bs*max(1, num_distrib()), s['sides'][0]), bs, s['archs'][0])
    with learn.distributed(): t = epoch_seconds(learn, s['epochs'])
    weights = torch.cat([p.detach().cpu().flatten() for p in learn.model.parameters()])
    return dict(seconds=t, weights=hashlib.sha256(weights.numpy().tobytes()).hexdigest())

def worker(args):
    set_rank_device()
    (args.out/f'rank{rank_distrib()}.json').write_text(json.dumps(distributed_epochs(args)))

def processes(args):
    s = sizes(args.tiny)
    bs = s['batches'][0]
    table = Table('processes', ['processes','images a second, all together','weights at the end'],
        f"CLAE, {s['archs'][0].__name__}, {s['sides'][0]}x{s['sides'][0]} images, batch {bs} a process, fp32, "
        f"by torchrun over {'NCCL' if cuda else 'gloo'}.", args)
    def _launched(n):
        if cuda and torch.cuda.device_count() < n: return [f'not run: there is {torch.cuda.device_count()} GPU']
        with tempfile.TemporaryDirectory() as out:
            launch = [sys.executable,'-m','torch.distributed.run','--standalone',f'--nproc_per_node={n}', __file__]
            p = subprocess.Popen([*launch, '--parts', 'worker', '--out', out, *['--tiny']*args.tiny],
                                 stderr=subprocess.PIPE, text=True)
            try: _,err = p.communicate(timeout=args.until - time.time() - 8)
            except subprocess.TimeoutExpired:
                p.terminate() # torchrun ends its processes, which are in groups of their own
                raise
            ranks = [json.loads(f.read_text()) for f in sorted(Path(out).glob('rank*.json'))]
        if p.returncode or len(ranks) != n: raise RuntimeError(err[-160:])
        same = len({o['weights'] for o in ranks}) == 1
        return images_a_second(n*bs, ranks[0]['seconds']),'equal' if same else 'DIFFERENT'
    table.measure([1], lambda: [images_a_second(bs, distributed_epochs(args)['seconds'])])
    table.measure([2], lambda: _launched(2))

parts = dict(environment=environment, golden=golden, waits=waits, step=step, throughput=throughput,
             evaluation=evaluation, processes=processes)

def run(args):
    "The parts `args.parts` in this process, which ends when one takes too long"
    for name in args.parts:
        print(f'{name}:', flush=True)
        limit = 600 if args.tiny else seconds[name]
        args.until = time.time() + limit
        args.begun.write_text(name)
        signal.alarm(limit) # ends the process even where it hangs outside Python
        parts[name](args)
        signal.alarm(0)
        sync() # raises where the GPU's context is broken: then no other part could use it

def run_in_processes(args):
    "All parts, in as many processes as it takes"
    left = list(parts)
    while left:
        args.begun.write_text(left[0])
        options = ['--parts', *left, '--out', args.out, '--begun', args.begun, *['--tiny']*args.tiny]
        p = subprocess.Popen([sys.executable, __file__, *options], start_new_session=True)
        try: p.wait()
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL) # all that it had started
        if not p.returncode: return
        name = args.begun.read_text()
        too_long = p.returncode == -signal.SIGALRM
        why = 'This part took too long, and was ended.' if too_long else f'This part failed (exit code {p.returncode}).'
        with (args.out/f'gpu_{name}.md').open('a') as f: f.write(f'\n{why}\n')
        print(why, flush=True)
        left = left[left.index(name)+1:]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tiny', action='store_true', help='a test, on a processor')
    parser.add_argument('--out', type=Path, help='folder of the tables; by default results/, of --tiny a temporary one')
    parser.add_argument('--parts', nargs='+', help=argparse.SUPPRESS)
    parser.add_argument('--begun', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parts: return worker(args) if args.parts == ['worker'] else run(args)
    if not (cuda or args.tiny): parser.error('there is no GPU here. `--tiny` tries all parts on a processor.')
    args.out = args.out or (Path(tempfile.mkdtemp(prefix='gpu-')) if args.tiny else report.root/'results')
    args.out.mkdir(parents=True, exist_ok=True)
    for name in parts: (args.out/f'gpu_{name}.md').unlink(missing_ok=True) # of an earlier run
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        args.begun = Path(folder)/'begun'
        run_in_processes(args)
    if args.out == report.root/'results': report.write_page()
    print(f'{time.time() - start:.0f} s. The tables are in {args.out}.')

if __name__ == '__main__': main()
