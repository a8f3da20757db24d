#!/usr/bin/env python3
"""All that a GPU has to show, in nine minutes at most: `python benchmarks/gpu.py` writes `results/gpu_*.md`, a table a part.

environment  what it ran on
golden       the authors' numbers (`tests/golden`) on the GPU, with the greatest difference
waits        a training batch under `torch.cuda.set_sync_debug_mode('error')`, and every wait of a batch with its line
step         `bench_step.py` in fp32, TF32, bf16 and fp16, channels-last, compiled
throughput   images a second and peak memory of CLAE, SimCLR and lightly's SimCLR
evaluation   features, kNN and probe
processes    two processes on two GPUs

Each part is a process of its own with a time of its own. Its table is written after every row, so that what is cut off leaves
what it had; a row that fails says why, and one that comes too late that it was not reached. `--tiny` runs all of it in two
minutes without a GPU, on networks and images too small to mean anything, into a temporary folder; `--out DIR` into another."""
import argparse
import contextlib
import functools
import gc
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
from clae_fastai.all import (PGD, Callback, Recorder, TwoViews, create_encoder, default_device, extract_features, knn_predict, linear_probe,
    num_features, rank_distrib, resnet8, resnet18, resnet50, set_rank_device, set_seed)

seconds = dict(environment=30, golden=35, waits=50, step=145, throughput=175, evaluation=45, processes=60) # 540 in all
last_row = 10 # seconds before the end of a part after which no row is begun
cuda = torch.cuda.is_available()

def sizes(tiny):
    "What is measured: on a GPU, and as a test on a processor"
    if tiny: return dict(archs=[resnet8], sides=[16], batches=[8], images=16, bank=300, queries=50, dim=16, adam=2, workers=1, epochs=2)
    return dict(archs=[resnet18, resnet50], sides=[32,224], batches=[256,64,1024], images=512, bank=50_000, queries=10_000, dim=512, adam=20,
                workers=os.cpu_count(), epochs=3)

# What the parts share

class Table:
    "A part's table, written after every row"
    def __init__(self, part, columns, note, args):
        self.part,self.note,self.args = part,note,args
        self.lines = [f"| {' | '.join(columns)} |", '|'+'---|'*len(columns)]
        self.n_cells = len(columns)

    def save(self, end=''):
        note = [o for o in (self.note, end, '' if cuda else 'There was no GPU: this ran on a processor, as a test.') if o]
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

def milliseconds(x): return report.spread(1000*np.array(x))

# The parts

def environment(args):
    table = Table('environment', ['what','value'], '', args)
    if cuda:
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            table.add(f'GPU {i}', f'{p.name}, {p.total_memory/2**30:.0f} GiB, capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors')
        query = ['nvidia-smi','--query-gpu=driver_version,power.limit,clocks.max.sm','--format=csv,noheader']
        table.measure(['driver, power limit, highest clock'], lambda: subprocess.check_output(query, text=True, timeout=10).split('\n')[:1])
        table.add('NCCL', '.'.join(map(str, torch.cuda.nccl.version())))
    else: table.add('GPU', 'none')
    table.add('processor', f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads')
    table.add('CUDA, cuDNN', f'{torch.version.cuda}, {torch.backends.cudnn.version()}')
    table.add('cuDNN', f'benchmark {torch.backends.cudnn.benchmark}, deterministic {torch.backends.cudnn.deterministic}, TF32 {torch.backends.cudnn.allow_tf32}')
    table.add('TF32 in matrix products', torch.backends.cuda.matmul.allow_tf32)
    for n in ('triton','lightly','timm','accelerate'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError): table.add(n, importlib.metadata.version(n))
    git = ['git','-C',report.root,'rev-parse','HEAD']
    table.measure(['commit'], lambda: subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).split())

def golden(args):
    sys.path.insert(0, str(report.root/'tests'/'method'))
    import test_golden as authors
    table = Table('golden', ['method','what','greatest difference','numbers'],
        "Float64. Three steps of training, each from what the last one left; on a processor every difference must be below 1e-9. "
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
        a,y,b,t = (torch.tensor(d[k]).to(device) for k in ('train_features','train_labels','test_features','test_labels'))
        settings = [(k,t) for k in (1,5,200) for t in (.1,.5)]
        accuracies = [100*(knn_predict(a, y, b, *s) == t).double().mean().item() - d['accuracy/k{}_t{}'.format(*s)] for s in settings]
        return f'{np.abs(accuracies).max():.1e}',len(settings)
    table.measure(['kNN','accuracy, percent'], _knn)

class Waits(Callback):
    "Batches in which the host must not wait, from views to the optimiser's step; the copy of the loss, which comes after it, may"
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
    table = Table('waits', ['training','under `error`','waits a batch, loading and copy of the loss included, and where'],
        "Under `error` a wait raises, in views, attack, forward, loss, backward and the optimiser's step. "
        "Then all waits of a whole epoch, counted under `warn`, over its batches.", args)
    settings = {'SimCLR': dict(eps=0), 'CLAE': {}, 'CLAE, channels-last': dict(channels_last=True), 'CLAE, bf16': dict(precision='bf16'),
        'CLAE, fp16, whose scaler asks for overflow': dict(precision='fp16'), 'plain': dict(method='plain'), 'UEL': dict(method='uel'),
        **{f'attack {a}': dict(attack=a) for a in ('rfgsm','ffgsm','random')}, 'attack PGD, l2, pixels': dict(attack=PGD(.03, norm='l2', space='pixel')),
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

def tf32(allowed): torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed

def step(args):
    s,tiny = sizes(args.tiny),args.tiny
    arch,side,bs = s['archs'][0],s['sides'][0],s['batches'][0]
    bench_step.bs,bench_step.side = bs,side
    n,rounds = (2,2) if tiny else (20,3)
    table = Table('step', ['step','precision','compiled','ms, median (range)','published in fp32 / this','peak memory, MiB'],
        f"{arch.__name__}, {side}x{side} images, batch {bs}; rounds of {n} steps. Published, and passes: see `bench_step.py`, here too with a ResNet-18. "
        "CLAE and SimCLR through the Learner, loading included. Compiled: the encoder, by `torch.compile`, the time of which is left out.", args)
    images = memory_images(n*bs, side)
    published = []
    def _ratio(t): return f'{np.median(published)/np.median(t):.2f}' if published else ''
    def _plain(make, precision, channels_last, allowed):
        tf32(allowed)
        reset_peak()
        t = loop_seconds(make(precision, channels_last), n, rounds)
        if make is bench_step.published_step and not allowed: published.extend(t)
        return milliseconds(t),_ratio(t),peak_mib()
    def _ours(eps, precision, channels_last, allowed, compiled):
        tf32(allowed)
        reset_peak()
        learn = learner_of(images, bs, arch, eps=eps, precision=precision, channels_last=channels_last)
        if compiled:
            torch.compiler.reset() # each row compiles anew: graphs of others count towards a limit
            learn.model.encoder = torch.compile(learn.model.encoder, backend='eager' if tiny else 'inductor')
        t = epoch_seconds(learn, rounds+1)
        return milliseconds(t),_ratio(t),peak_mib()
    kinds = [(p,cl) for cl in (False,True) for p in ('fp32','tf32','bf16','fp16')]
    def _arguments(p, cl): return 'fp32' if p == 'tf32' else p,cl,p == 'tf32'
    def _name(p, cl): return p + ', channels-last'*cl
    for p,cl in [('fp32',False),('tf32',False)]:
        table.measure(['published', _name(p, cl), ''], functools.partial(_plain, bench_step.published_step, *_arguments(p, cl)))
    for compiled in (False,True):
        # the most useful first: compiling takes long
        for p,cl in kinds if not compiled else kinds[::-1]:
            for who,eps in (('clae',.03),('simclr',0.)):
                table.measure([who, _name(p, cl), 'yes' if compiled else ''], functools.partial(_ours, eps, *_arguments(p, cl), compiled))
        if not compiled:
            for p,cl in kinds:
                if p == 'fp16': continue # as bf16
                table.measure(['passes', _name(p, cl), ''], functools.partial(_plain, bench_step.passes_step, *_arguments(p, cl)))

def lightly_step(arch, side):
    "A step of lightly's SimCLR, in bf16 and channels-last as ours, and the two views that it takes"
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    encoder = create_encoder(arch, size=side)
    n = num_features(encoder, 3, [side,side])
    model = nn.Sequential(encoder, SimCLRProjectionHead(n, n, 128)).to(default_device(), memory_format=torch.channels_last)
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
        self.images,self.transform,self.n = [Image.fromarray(o.permute(1,2,0).numpy()) for o in images[:256]],transform,n
    def __len__(self): return self.n
    def __getitem__(self, i): return self.transform(self.images[i % len(self.images)])

def throughput(args):
    s = sizes(args.tiny)
    table = Table('throughput', ['network','side','batch','what','images a second, median (range)','peak memory, MiB'],
        "bf16, channels-last, random images, no labels; a 3x3 stem at 32 pixels, the ImageNet stem at 224. CLAE and SimCLR: `clae_learner`, loading and views "
        "included. lightly, the same tensors: its loss, head and a plain loop with torch's Adam, on our loader's batches and views. lightly, its own loader: "
        f"its `SimCLRTransform` on images in memory, without blur at 32 pixels, in PyTorch's loader of {s['workers']} processes, once it is busy.", args)
    def _images_a_second(bs, t): return report.spread(bs/np.array(t), ',.0f')
    def _ours(arch, side, bs, n, eps):
        reset_peak()
        t = epoch_seconds(learner_of(memory_images(n*bs, side), bs, arch, eps=eps, precision='bf16', channels_last=True), s['epochs'])
        return _images_a_second(bs, t),peak_mib()
    def _same_tensors(arch, side, bs, n):
        reset_peak()
        dl,views = learner_of(memory_images(n*bs, side), bs, arch, eps=0).dls.train,TwoViews.from_preset('simclr', side)
        step,t = lightly_step(arch, side),[]
        for _ in range(s['epochs']):
            sync(); start = time.perf_counter()
            for x,*_ in dl: step(*(v.as_subclass(torch.Tensor) for v in views(x)))
            sync(); t.append((time.perf_counter() - start)/n)
        return _images_a_second(bs, t[1:]),peak_mib()
    def _own_loader(arch, side, bs, n):
        from lightly.transforms import SimCLRTransform
        reset_peak()
        skipped,counted = s['workers'],2*s['workers'] # batches: all processes are at work, and have handed over twice
        data = PILImages(memory_images(256, side), SimCLRTransform(side, gaussian_blur=.5 if side > 64 else 0.), bs*(skipped+counted))
        loader = iter(torch.utils.data.DataLoader(data, bs, num_workers=s['workers'], pin_memory=cuda))
        step = lightly_step(arch, side)
        for _ in range(skipped): step(*next(loader))
        sync(); start = time.perf_counter()
        for _ in range(counted): step(*next(loader))
        sync()
        return _images_a_second(bs, [(time.perf_counter() - start)/counted]),peak_mib()
    for bs in s['batches']:
        for side in s['sides']:
            for arch in s['archs']:
                n = 2 if args.tiny else max(4, min(20, 4096//bs)) if side < 64 else 3
                rows = dict(CLAE=functools.partial(_ours, eps=.03), SimCLR=functools.partial(_ours, eps=0.))
                rows['lightly, the same tensors'] = _same_tensors
                if bs == s['batches'][0]: rows['lightly, its own loader'] = _own_loader
                for what,f in rows.items(): table.measure([arch.__name__, side, bs, what], functools.partial(f, arch, side, bs, n))

def evaluation(args):
    s,device = sizes(args.tiny),default_device()
    table = Table('evaluation', ['what','where','seconds','result'],
        f"Features: random images of {s['sides'][-1]} pixels. kNN (k 200) and probes: {s['queries']:,} against {s['bank']:,} made-up features of {s['dim']} numbers in 10 classes, "
        f"the time of a second call; the probes: once, `adam` {s['adam']} epochs, `lbfgs` 3 penalties. The results must not depend on where.", args)
    set_seed(0)
    y,test_y = torch.arange(s['bank'])%10,torch.arange(s['queries'])%10
    centres = torch.randn(10, s['dim'])
    x,test_x = (.3*centres[o] + torch.randn(len(o), s['dim']) for o in (y, test_y))
    def _twice(f):
        f(); sync(); start = time.perf_counter()
        res = f()
        sync()
        return f'{time.perf_counter() - start:.2f}',res
    def _features(arch):
        learn = learner_of(memory_images(s['images'], s['sides'][-1]), s['batches'][0], arch, eps=0)
        t,(h,_) = _twice(lambda: extract_features(learn, learn.dls.train.new(shuffle=False, drop_last=False)))
        return t,f"{len(h)/float(t):,.0f} images a second"
    def _knn(device):
        t,predicted = _twice(lambda: knn_predict(*(o.to(device) for o in (x, y, test_x)), min(200, len(x)//2)))
        return t,f'{100*(predicted.cpu() == test_y).float().mean():.2f} % right'
    def _probe(solver):
        start = time.perf_counter()
        p = linear_probe((x, y), (test_x, test_y), solver, epochs=s['adam'], l2s=[1.,.1,.01], device=device)
        return f'{time.perf_counter() - start:.2f}',f'{100*p.final:.2f} % right'
    for arch in s['archs']: table.measure([f'features, {arch.__name__}', device], lambda: _features(arch))
    for where in dict.fromkeys((str(device), 'cpu')): table.measure(['kNN', where], lambda: _knn(where))
    for solver in ('adam','lbfgs'): table.measure([f'probe, {solver}', device], lambda: _probe(solver))

def distributed_epochs(args):
    "What each process of `processes` does: `--part worker`"
    s = sizes(args.tiny)
    set_rank_device()
    bs,side,n = s['batches'][0],s['sides'][0],2 if args.tiny else 20
    ranks = int(os.environ.get('WORLD_SIZE', 1))
    set_seed(0)
    learn = learner_of(memory_images(n*bs*ranks, side), bs, s['archs'][0], precision='fp32')
    with learn.distributed(): t = epoch_seconds(learn, s['epochs'])
    weights = torch.cat([p.detach().double().cpu().flatten() for p in learn.model.parameters()])
    (args.out/f'gpu-rank{rank_distrib()}.json').write_text(json.dumps(dict(seconds=t, sum=weights.sum().item(), squares=weights.square().sum().item())))

def processes(args):
    s = sizes(args.tiny)
    bs = s['batches'][0]
    table = Table('processes', ['processes','images a second, all together','weights at the end'],
        f"CLAE, {s['archs'][0].__name__}, {s['sides'][0]}x{s['sides'][0]} images, batch {bs} a process, fp32, over {'NCCL' if cuda else 'gloo'}, by torchrun.", args)
    def _run(n):
        if cuda and torch.cuda.device_count() < n: return [f'not run: there is {torch.cuda.device_count()} GPU']
        with tempfile.TemporaryDirectory() as out:
            launch = ['-m','torch.distributed.run','--standalone',f'--nproc_per_node={n}'] if n > 1 else []
            tiny = ['--tiny'] if args.tiny else []
            p = subprocess.Popen([sys.executable, *launch, __file__, '--part', 'worker', '--out', out, *tiny], stderr=subprocess.PIPE, text=True)
            try: _,err = p.communicate(timeout=args.until - time.time() - 8)
            except subprocess.TimeoutExpired:
                p.terminate() # torchrun ends its processes, which are in groups of their own
                raise
            ranks = [json.loads(f.read_text()) for f in sorted(Path(out).glob('*.json'))]
        if p.returncode or len(ranks) != n: raise RuntimeError(err[-160:])
        same = all((o['sum'],o['squares']) == (ranks[0]['sum'],ranks[0]['squares']) for o in ranks)
        return report.spread(n*bs/np.array(ranks[0]['seconds']), ',.0f'),'' if n == 1 else 'equal' if same else 'DIFFERENT'
    for n in (1,2): table.measure([n], lambda: _run(n))

parts = dict(environment=environment, golden=golden, waits=waits, step=step, throughput=throughput, evaluation=evaluation, processes=processes)

def run_part(name, args):
    "A part in a process of its own, with all that it starts; returns why it ended early, if it did"
    limit = 600 if args.tiny else seconds[name]
    options = ['--part', name, '--out', str(args.out), '--until', str(time.time() + limit), *['--tiny']*args.tiny]
    p = subprocess.Popen([sys.executable, __file__, *options], start_new_session=True)
    try: return f'The part failed (exit code {p.returncode}).' if p.wait(limit) else ''
    except subprocess.TimeoutExpired: return f'The part was ended after {limit} seconds.'
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        p.wait()

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tiny', action='store_true', help='a test, on a processor')
    parser.add_argument('--out', type=Path, help='folder of the tables; by default results/, of --tiny a temporary one')
    parser.add_argument('--part', help=argparse.SUPPRESS)
    parser.add_argument('--until', type=float, default=float('inf'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part: return distributed_epochs(args) if args.part == 'worker' else parts[args.part](args)
    if not (cuda or args.tiny): parser.error('there is no GPU here. `--tiny` tries all parts on a processor.')
    args.out = args.out or (Path(tempfile.mkdtemp(prefix='gpu-')) if args.tiny else report.root/'results')
    args.out.mkdir(parents=True, exist_ok=True)
    for name in parts: (args.out/f'gpu_{name}.md').unlink(missing_ok=True) # of an earlier run
    for name in parts:
        start = time.time()
        why = run_part(name, args)
        file = args.out/f'gpu_{name}.md'
        if why:
            before = file.read_text() if file.exists() else ''
            file.write_text('\n'.join([before.rstrip(), '', why, '']).lstrip())
        print(f'{name}: {time.time() - start:.0f} s. {why}', flush=True)
    if args.out == report.root/'results': report.write_page()
    print(f'The tables are in {args.out}.')

if __name__ == '__main__': main()
