"""What `test_distributed.py` runs under torchrun, on every rank: `distributed_worker.py exact|learner|monitors|fastai OUT`; results go to OUT/NAME-RANK.pt. Its first part is also the reference in one process."""
import hashlib, math, sys
from collections import OrderedDict
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed as dist, nn

from clae_fastai.all import (FGSM, Callback, Checkpoint, CLAECallback, CLAELoss, CollapseMonitor, ContrastiveModel, DataBlock, DataLoader, DataLoaders, ImageBlock, IndexSplitter, KNNCallback, Learner, NTXentLoss, OptimWrapper, PILImageBW,
                             PlainLoss, ProgressCallback, Recorder, UELLoss, clae_learner, projection_head, dual_bns, gather, get_dls, np, num_distrib, partial, rank_distrib, rank_offset, resnet8, set_seed)

losses = dict(plain=PlainLoss, uel=UELLoss, uel_full=partial(UELLoss, detach_keys=False), simclr=NTXentLoss)
n_images,steps = 48,3

class Record(Callback):
    "x_adv, loss, gradients and parameters of each step"
    order = 20
    def __init__(self): self.seen = []
    def before_step(self):
        params = OrderedDict((k.removeprefix('module.'), p) for k,p in self.model.named_parameters())
        self.seen.append(dict(x_q=self.learn.xb[0], x_adv=self.learn.xb[2], loss=self.learn.loss.detach(), grads={k: p.grad.clone() for k,p in params.items()}))
    def after_step(self): self.seen[-1]['params'] = {k.removeprefix('module.'): p.detach().clone() for k,p in self.model.named_parameters()}

class Watch(FGSM):
    "FGSM that keeps the gradients it takes the signs of"
    seen = ()
    def __call__(self, embed, x, loss):
        with torch.enable_grad():
            x_ = x.detach().requires_grad_()
            z = embed(x_)
            self.seen = [*self.seen, torch.autograd.grad(loss(z.detach(), z), x_)[0]]
        return super().__call__(embed, x, loss)

def exact_learner(method, bs, order=None):
    "A float64 learner without batch norm on pairs of given views; `order`: of the images"
    torch.manual_seed(0)
    pairs = torch.randn(n_images, 2, 3, 9, 9, dtype=torch.double)
    if order is not None: pairs = pairs[order]
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3))
    model = ContrastiveModel(encoder, projection_head(16, 'mlp', 8)).double()
    dls = DataLoaders(DataLoader([(o,) for o in pairs], bs=bs), DataLoader([], bs=bs), device='cpu')
    learn = Learner(dls, model, CLAELoss(losses[method](), alpha=.7), opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9), cbs=[CLAECallback(lambda x: (x[:,0],x[:,1]), Watch(.03)), Record()], lr=.1)
    learn.remove_cbs([Recorder, ProgressCallback]) # the one smooths losses in float32 only, the other needs it
    return learn

def exact(out):
    for m in losses:
        learn = exact_learner(m, n_images//steps//num_distrib())
        with learn.distributed():
            learn.fit(1)
            if m == 'plain': torch.save(gathered(), out/f'gather-{rank_distrib()}.pt')
        torch.save(learn.record.seen, out/f'{m}-{rank_distrib()}.pt')

def gathered():
    "`gather` by itself: order, gradient, twice in one step, tensors without gradient, dtypes"
    r = dist.get_rank()
    z = (torch.arange(6.).view(3,2) + 10*r).requires_grad_()
    every = gather(z)
    ((r+1)*every).sum().backward(retain_graph=True)
    once = z.grad.clone()
    (every + (r+1)*gather(z.T.contiguous().T)).square().sum().backward() # a second use, not contiguous
    with torch.no_grad(): plain = gather(z)
    return dict(every=every.detach(), offset=rank_offset(3), once=once, twice=z.grad - once, plain=plain, types=[gather(z.detach().to(d)).dtype for d in (torch.float64, torch.float32, torch.bfloat16)])

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

def digits_learner(**kwargs):
    set_seed(7)
    return clae_learner(get_dls('digits', bs=16, limit=149), partial(resnet8, width=4), views='digits', cbs=Batches(), **kwargs)

def learner(out):
    rank = rank_distrib()
    def save(name, **kw): torch.save(kw, out/f'{name}-{rank}.pt')

    learn = digits_learner() # batch norm, all the usual callbacks, twice
    before = [type(m) for m in learn.model.modules()],learn.dls.loaders,[type(c) for c in learn.cbs]
    first = state(learn)
    with learn.distributed():
        learn.fit_one_cycle(2, 3e-3)
        values = [list(o) for o in learn.recorder.values]
        valid = learn.validate()
        preds = learn.get_preds()
    after = [type(m) for m in learn.model.modules()],learn.dls.loaders,[type(c) for c in learn.cbs]
    one = learn.get_preds() if rank == 0 else None # alone
    if rank == 0: learn.show_views(2)
    save('digits', first=first, state=state(learn), **{k: getattr(learn.batches, k) for k in ('seen','n_iter','draws')}, same=[before[0] == after[0], all(a is b for a,b in zip(before[1], after[1], strict=True)), sorted(map(str, before[2])) == sorted(map(str, after[2]))],
         group=dist.is_initialized(), values=values, valid=list(valid), preds=preds, one=one, labels=[o[1] for o in learn.dls.valid_ds])
    with learn.distributed(): learn.fit(1)
    save('again', state=state(learn))

    items = [np.array(x[0]) for x,_ in get_dls('digits', bs=16, limit=64).train_ds] # no labels, and nothing to validate on
    set_seed(7)
    learn = clae_learner(DataBlock([ImageBlock(PILImageBW)], splitter=IndexSplitter([])).dataloaders(items, bs=16, num_workers=0), resnet8, views='digits', attack='pgd')
    with learn.distributed(): learn.fit(1, 1e-3)
    save('unlabelled', state=state(learn))

    shapes = []
    def loss(z_q, z_p): # of somebody else: this rank's batch, before normalisation
        shapes.append(tuple(z_q.shape))
        return (z_q - z_p).square().mean()
    learn = digits_learner(method=loss)
    with learn.distributed(): learn.fit(1, 1e-3)
    save('other', state=state(learn), shapes=shapes)

    learn = digits_learner() # both sets of batch norms are shared where sync_bn is; the forward needs a GPU
    bns = [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    with learn.distributed(sync_bn=True), patch.object(nn.parallel.DistributedDataParallel, '_passing_sync_batchnorm_handle'): # which refuses them on a CPU
        learn.distributed_trainer.before_fit()
        duals = dual_bns(learn.model)
        sync = [isinstance(m, nn.SyncBatchNorm) for d in duals for m in (d.clean, d.adv)]
    save('sync', sync=sync, n=len(duals), restored=all(a is b for a,b in zip(bns, [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)])) and not any(isinstance(m, nn.SyncBatchNorm) for m in learn.model.modules()))

    learn = digits_learner() # a fit that fails
    class Fail(Callback):
        def after_batch(self): raise RuntimeError('boom')
    loaders = learn.dls.loaders
    try:
        with learn.distributed(): learn.fit(1, cbs=Fail())
    except RuntimeError as e: message = str(e)
    save('fail', message=message, unwrapped=isinstance(learn.model, ContrastiveModel) and all(a is b for a,b in zip(learn.dls.loaders, loaders, strict=True)) and not dist.is_initialized())

def monitors(out):
    "Evaluation while training, steps that are skipped on all ranks when one has no finite loss, and a group that is not there"
    class Boom(nn.Module):
        def forward(self, z_q, z_p): return (z_q*z_p).sum(1).mean()*(math.inf if rank_distrib() == 1 and learn.train_iter == 1 else 1.)
    learn = digits_learner(method=Boom(), on_nonfinite='skip')
    learn.add_cbs([KNNCallback(k=5), CollapseMonitor()])
    with learn.distributed(): learn.fit(1, 1e-3)
    row = dict(zip(list(learn.recorder.metric_names)[1:-1], learn.recorder.values[-1]))
    alone = digits_learner(on_nonfinite='skip') # a launcher, and no process group
    alone.fit(1, 1e-3, cbs=Checkpoint(out/str(rank_distrib())))
    torch.save(dict(row=row, skipped=learn.check_finite.n_skipped, state=state(learn)), out/f'monitors-{rank_distrib()}.pt')

def fastai(out):
    "fastai's own context, as it is"
    learn = digits_learner()
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(1, 1e-3)
    torch.save(dict(state=state(learn), draws=learn.batches.draws), out/f'fastai-{rank_distrib()}.pt')

if __name__ == '__main__': globals()[sys.argv[1]](Path(sys.argv[2]))
