"""What `test_distributed.py` runs under torchrun, on every rank: `distributed_worker.py NAME ... OUT`, where a NAME is
one of the functions exact, learner, monitors, resume and slow_first. Results go to OUT/NAME-RANK.pt. Its first part is
also the reference in one process. `distributed_worker.py clae_train OPTION ... OUT` is the command, whose exit code
goes to OUT/code-RANK."""
import hashlib
import math
import os
import sys
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed as dist, nn

from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from clae_fastai import cli
from clae_fastai.all import (FFGSM, FGSM, PGD, Callback, Checkpoint, CLAECallback, CLAELoss, CollapseMonitor,
    ContrastiveModel, DataBlock, DataLoader, DataLoaders, ImageBlock, IndexSplitter, KNNCallback, Learner, NTXentLoss,
    OptimWrapper, PILImageBW, PlainLoss, ProgressCallback, Recorder, Resume, RFGSM, UELLoss, checkpoints, clae_learner,
    dual_bns, evaluate, extract_features, gather, get_dls, load_checkpoint, np, num_distrib, partial, projection_head,
    rank_distrib, rank_offset, resnet8, save_checkpoint, set_seed)

losses = dict(plain=PlainLoss, uel=UELLoss, uel_full=partial(UELLoss, detach_keys=False), simclr=NTXentLoss)
n_images,steps = 48,3

class Record(Callback):
    "x_adv, loss, gradients and parameters of each step"
    order = 20
    def __init__(self): self.seen = []
    def before_step(self):
        params = OrderedDict((k.removeprefix('module.'), p) for k,p in self.model.named_parameters())
        grads = {k: p.grad.clone() for k,p in params.items()}
        xs,loss = self.learn.xb,self.learn.loss.detach()
        self.seen.append(dict(x_q=xs[0], x_adv=xs[-1], n_views=len(xs), loss=loss, grads=grads))
    def after_step(self):
        self.seen[-1]['params'] = {k.removeprefix('module.'): p.detach().clone()
                                   for k,p in self.model.named_parameters()}

class Watch(FGSM):
    "FGSM that keeps the gradients it takes the signs of"
    seen = ()
    def __call__(self, embed, x, loss):
        with torch.enable_grad():
            x_ = x.detach().requires_grad_()
            z = embed(x_)
            self.seen = [*self.seen, torch.autograd.grad(loss(z.detach(), z), x_)[0]]
        return super().__call__(embed, x, loss)

def exact_learner(method, bs, order=None, every=1):
    "A float64 learner without batch norm on pairs of given views; `order`: of the images"
    torch.manual_seed(0)
    pairs = torch.randn(n_images, 2, 3, 9, 9, dtype=torch.double)
    if order is not None: pairs = pairs[order]
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3))
    model = ContrastiveModel(encoder, projection_head(16, 'mlp', 8)).double()
    dls = DataLoaders(DataLoader([(o,) for o in pairs], bs=bs), DataLoader([], bs=bs), device='cpu')
    learn = Learner(dls, model, CLAELoss(losses[method](), alpha=.7), lr=.1,
                    opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),
                    cbs=[CLAECallback(lambda x: (x[:,0],x[:,1]), Watch(.03), every=every), Record()])
    learn.remove_cbs([Recorder, ProgressCallback]) # the one smooths losses in float32 only, the other needs it
    return learn

def save(out, name, **results): torch.save(results, out/f'{name}-{rank_distrib()}.pt')

def exact(out):
    for m in losses:
        learn = exact_learner(m, n_images//steps//num_distrib())
        with learn.distributed():
            learn.fit(1)
            if m == 'plain': save(out, 'gather', **gathered())
        save(out, m, seen=learn.record.seen)

def every_second(out):
    "An adversarial term in each second step: the others do not use the adversarial batch norms at all"
    for m in losses:
        learn = exact_learner(m, n_images//steps//num_distrib(), every=2)
        with learn.distributed(): learn.fit(1)
        save(out, f'{m}-second', seen=learn.record.seen)
    class Norms(Callback):
        order,run_valid = 1000,False
        def before_fit(self): self.seen = []
        def after_batch(self):
            self.seen.append([p.detach().clone() for bn in dual_bns(self.model) for p in bn.adv.parameters()])
    learn = digits_learner(every=2)
    with learn.distributed(), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=(norms := Norms()))
    moved = [any(not torch.equal(p, q) for p,q in zip(a, b)) for a,b in zip(norms.seen, norms.seen[1:])]
    save(out, 'second', moved=moved, state=state(learn))

def gathered():
    "`gather` by itself: order, gradient, twice in one step, tensors without gradient, dtypes"
    r = dist.get_rank()
    z = (torch.arange(6.).view(3,2) + 10*r).requires_grad_()
    every = gather(z)
    ((r+1)*every).sum().backward(retain_graph=True)
    once = z.grad.clone()
    (every + (r+1)*gather(z.T.contiguous().T)).square().sum().backward() # a second use, not contiguous
    with torch.no_grad(): plain = gather(z)
    types = [gather(z.detach().to(d)).dtype for d in (torch.float64, torch.float32, torch.bfloat16)]
    return dict(every=every.detach(), offset=rank_offset(3), once=once, twice=z.grad - once, plain=plain, types=types)

class Batches(Callback):
    "Which images a rank trains on, and what its views draw"
    order = -5
    def __init__(self): self.seen,self.n_iter,self.draws = [],[],[]
    def before_batch(self):
        if not self.training: return
        x = self.learn.xb[0].flatten(1).double()
        self.seen.append(x @ torch.arange(x.shape[1], dtype=x.dtype).sqrt())
        self.draws.append(hashlib.md5(torch.get_rng_state().numpy()).hexdigest())
    def after_train(self): self.n_iter.append((self.learn.n_iter, len(self.seen), round(self.learn.pct_train, 6)))

def state(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

def digits_learner(cbs=(), **kwargs):
    set_seed(7)
    dls = get_dls('digits', bs=16, limit=149)
    return clae_learner(dls, partial(resnet8, width=4), views='digits', cbs=[Batches(), *cbs], **dict(every=1) | kwargs)

def parts(learn):
    "What `distributed` must leave as it was"
    return [type(m) for m in learn.model.modules()],list(learn.dls.loaders),sorted(str(type(c)) for c in learn.cbs)

def failure(f, *args):
    "What `f` says when it fails"
    try: f(*args)
    except Exception as e: return str(e)

def learner(out):
    "The usual learner: batch norm, all the usual callbacks"
    learn = digits_learner()
    before,first = parts(learn),state(learn)
    with learn.distributed():
        learn.fit_one_cycle(2, 3e-3)
        values = [list(o) for o in learn.recorder.values]
        valid = list(learn.validate())
        preds = learn.get_preds()
    kept = [a == b for a,b in zip(before, parts(learn), strict=True)]
    seen = {k: getattr(learn.batches, k) for k in ('seen','n_iter','draws')}
    save(out, 'digits', first=first, state=state(learn), **seen, kept=kept, group=dist.is_initialized(), values=values,
         valid=valid, preds=preds, labels=[o[1] for o in learn.dls.valid_ds])

    # on its own after the context: our own functions on rank 0 alone, and fastai's error where its loop would run
    other = digits_learner() # the fit fails after its first step
    with learn.no_bar(), other.no_bar(), other.no_logging():
        alone = dict(outside=[failure(f) for f in (learn.validate, learn.get_preds, partial(other.fit, 1))])
    if rank_distrib() == 0:
        learn.show_views(2)
        learn.export_encoder(out/'encoder.safetensors')
        features,labels = extract_features(learn, learn.dls.valid)
        alone.update(features=features, labels=labels, result=evaluate(learn, learn.dls).knn)
    save(out, 'alone', **alone)
    with learn.distributed(), learn.distributed(): learn.fit(1)
    save(out, 'again', state=state(learn), kept=[a == b for a,b in zip(before, parts(learn), strict=True)])

    # no labels, and nothing to validate on
    items = [np.array(x[0]) for x,_ in get_dls('digits', bs=16, limit=64).train_ds]
    set_seed(7)
    dls = DataBlock([ImageBlock(PILImageBW)], splitter=IndexSplitter([])).dataloaders(items, bs=16, num_workers=0)
    learn = clae_learner(dls, resnet8, views='digits', attack='pgd')
    with learn.distributed(): learn.fit(1, 1e-3)
    save(out, 'unlabelled', state=state(learn))

    shapes = []
    def loss(z_q, z_p): # of somebody else: this rank's batch, before normalisation
        shapes.append(tuple(z_q.shape))
        return (z_q - z_p).square().mean()
    learn = digits_learner(method=loss)
    with learn.distributed(): learn.fit(1, 1e-3)
    save(out, 'other', state=state(learn), shapes=shapes)
    sync_bn(out)
    nested_and_failed(out)

def sync_bn(out):
    "Both sets of batch norms are shared where sync_bn is; the forward needs a GPU"
    learn = digits_learner()
    def norms(cls=nn.BatchNorm2d): return [m for m in learn.model.modules() if isinstance(m, cls)]
    own = norms()
    def restored(): return all(a is b for a,b in zip(own, norms(), strict=True)) and not norms(nn.SyncBatchNorm)
    with (patch.object(nn.parallel.DistributedDataParallel, '_passing_sync_batchnorm_handle'),
          learn.distributed(sync_bn=True)):
        learn.distributed_trainer.before_fit() # DistributedDataParallel itself would refuse them on a CPU
        duals = dual_bns(learn.model)
        sync = [isinstance(m, nn.SyncBatchNorm) for d in duals for m in (d.clean, d.adv)]
    after = restored()
    with learn.distributed(sync_bn=True): refused = failure(learn.fit, 1)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3), RectifiedNorm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    more = clae_learner(get_dls('digits', bs=16, limit=149), encoder, views='digits', every=2)
    kinds = [type(m) for m in more.model.modules()]
    handlers = [DistributedDataParallelKwargs(bucket_cap_mb=50), InitProcessGroupKwargs()]
    with more.no_bar(), more.no_logging(), more.distributed(sync_bn=True, kwargs_handlers=handlers):
        more.fit(1, 1e-3)
        more.distributed_trainer.before_fit()
        kept = kinds == [type(m) for m in more.model.module.modules()]
    save(out, 'sync', sync=sync, n=len(duals), restored=[after, restored()], refused=refused, kept=kept)

class RectifiedNorm(nn.BatchNorm2d):
    "As timm's, which a SyncBatchNorm in its place would not rectify"
    def forward(self, x): return super().forward(x).relu()

def nested_and_failed(out):
    "A validation inside a fit, and fits that fail"
    class Nested(Callback):
        order,run_valid = 90,False
        def before_train(self): # the first epoch's training comes after it
            self.learn.validate()
            self.learn.model.train()
            self.learn.dl,self.wrapped = (
                self.learn.dls.train,isinstance(self.learn.model, nn.parallel.DistributedDataParallel))
    class Fail(Callback):
        def after_batch(self): raise RuntimeError('boom')
    learn = digits_learner()
    before = parts(learn)
    nested = Nested()
    with learn.distributed():
        message = failure(partial(learn.fit, 1, cbs=Fail()))
        learn.fit(1, cbs=nested)
        unwrapped = isinstance(learn.model, ContrastiveModel)
    after = state(learn)
    with learn.distributed(): failure(partial(learn.fit, 1, cbs=Fail()))
    save(out, 'fail', message=message, wrapped=nested.wrapped, unwrapped=unwrapped, state=after,
         kept=[a == b for a,b in zip(before, parts(learn), strict=True)], group=dist.is_initialized())

def monitors(out):
    "Evaluation while training, and steps that are skipped on all ranks when one has no finite loss"
    class Boom(nn.Module):
        def forward(self, z_q, z_p):
            scale = math.inf if rank_distrib() == 1 and learn.train_iter == 1 else 1.
            return (z_q*z_p).sum(1).mean()*scale
    learn = digits_learner(method=Boom(), on_nonfinite='skip')
    learn.add_cbs([KNNCallback(k=5), CollapseMonitor()])
    with learn.distributed(): learn.fit(1, 1e-3)
    row = dict(zip(list(learn.recorder.metric_names)[1:-1], learn.recorder.values[-1]))
    save(out, 'monitors', row=row, skipped=learn.check_finite.n_skipped, state=state(learn))

class PowerCut(Callback):
    order,run_valid = 2000,False
    def after_batch(self):
        if self.learn.train_iter == 6: raise RuntimeError('the lights went out')

def resume(out):
    "Interrupted and resumed with as many processes: every rank's attack, too, draws what it would have drawn"
    def run(attack, *cbs):
        learn = digits_learner(attack=attack(.03), cbs=cbs)
        with learn.distributed(): message = failure(learn.fit_one_cycle, 2, 3e-3)
        return dict(message=message, state=state(learn), attack=learn.clae.attack.state_dict(),
                    values=learn.recorder.values)
    for attack in (RFGSM, FFGSM, partial(PGD, steps=2)):
        name = getattr(attack, '__name__', 'PGD')
        folder = out/f'checkpoints-{name}'
        whole = run(attack)
        cut = run(attack, Checkpoint(folder, every_batches=1), PowerCut())
        save(out, f'resume-{name}', whole=whole, cut=cut, resumed=run(attack, Resume(folder)))
    file, = checkpoints(out/'checkpoints-RFGSM')[-1:] # as one process would have written it
    saved,one = load_checkpoint(file),out/f'one-{rank_distrib()}'
    one.mkdir()
    save_checkpoint(one/file.name, saved | {k: saved[k][:1] for k in ('random','at_start')})
    save(out, 'resume-one', resumed=run(RFGSM, Resume(one)))

def clae_train(out, *options):
    "The command, in OUT; what it ends with goes to OUT/code-RANK"
    os.chdir(out)
    code = 0
    try: cli.clae_train.main([*options])
    except SystemExit as e: code = e.code
    (out/f'code-{rank_distrib()}').write_text(str(code))
    sys.exit(code)

def slow_first(out):
    "The command, where the first process takes longer, to load and to evaluate, than a collective waits"
    from clae_fastai import runs
    def slow(f):
        def _slow(*args, **kwargs):
            if not rank_distrib(): time.sleep(2*waits)
            return f(*args, **kwargs)
        return _slow
    waits = 4
    form_group,options = dist.init_process_group,'--limit 128 --epochs 1 --name slow'
    with (patch.object(dist, 'init_process_group', partial(form_group, timeout=timedelta(seconds=waits))),
          patch.object(runs, 'get_dls', slow(runs.get_dls)),
          patch.object(runs, 'few_label_knn', slow(runs.few_label_knn))):
        clae_train(out, *options.split())

if __name__ == '__main__':
    *names,out = sys.argv[1:]
    if names[0] == 'clae_train': clae_train(Path(out), *names[1:])
    for name in names: globals()[name](Path(out))
