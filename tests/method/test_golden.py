"The public pieces against numbers from the authors' code, in float64."
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from clae_fastai.all import (
    FGSM, Callback, CLAECallback, CLAELoss, ContrastiveModel, DataLoader, DataLoaders, Learner, NTXentLoss,
    OptimWrapper, PlainLoss, Recorder, UELLoss, adversarial_bn, convert_dual_bn, frozen_bn_stats, knn_predict, partial,
    projection_head)

losses = dict(plain=PlainLoss, uel=UELLoss, simclr=NTXentLoss)
sgd,adam = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9),partial(OptimWrapper, opt=torch.optim.Adam)
# optimiser, learning rate, weight decay
training = dict(plain=(sgd,.03,5e-4), uel=(sgd,.03,5e-4), simclr=(adam,3e-4,0.))

def small_encoder():
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 8, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(8), relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), bn2=nn.BatchNorm2d(16), relu2=nn.ReLU()))

def model_of(d, method):
    "The golden network, in its initial state"
    model = convert_dual_bn(ContrastiveModel(
        small_encoder(), projection_head(16, 'mlp' if method == 'simclr' else 'linear', 8))).double()
    state = {rename(k[5:]): torch.tensor(d[k]) for k in d if k.startswith('init/')}
    model.load_state_dict(state)
    return model

def rename(k): return k if k.startswith('head') else f'encoder.{k}'

def rename_last(k):
    "`step0/grad/conv1.weight` as it is called in our model"
    *parts,name = k.split('/')
    return '/'.join([*parts, rename(name) if len(parts) > 1 else name])

def close(a, b): np.testing.assert_allclose(torch.as_tensor(a).detach().numpy(), b, rtol=0, atol=1e-9)

@pytest.mark.parametrize('method', losses)
def test_loss_and_its_gradients(golden, method):
    d = golden(f'step_{method}')
    for i in range(3):
        z_q,z_p = (torch.tensor(d[f'loss{i}/{k}'], requires_grad=True) for k in ('z_q','z_p'))
        loss = losses[method]()(z_q, z_p)
        loss.backward()
        for name,got in dict(loss=loss, grad_z_q=z_q.grad, grad_z_p=z_p.grad).items(): close(got, d[f'loss{i}/{name}'])

def attacked(d, method, device='cpu'):
    "The first step's adversary"
    model = model_of(d, method).train().to(device)
    with adversarial_bn(model), frozen_bn_stats(model):
        return FGSM(.03)(model, torch.tensor(d['step0/x_q'], device=device), losses[method]())

def three_steps(d, method, device='cpu'):
    """`CLAECallback` in a plain `Learner`: each step's adversary, losses, gradients and parameters,
    by their names in `d`"""
    t = lambda i, k: torch.tensor(d[f'step{i}/{k}'], device=device)
    seen = {}
    def views(x): return t(learn.iter, 'x_q'),t(learn.iter, 'x_p')
    class Record(Callback):
        order = 20
        def keep(self, **tensors): seen.update({f'step{self.iter}/{k}': v.detach().clone() for k,v in tensors.items()})
        def before_step(self):
            grads = {f'grad/{k}': p.grad for k,p in self.model.named_parameters()}
            self.keep(x_adv=self.learn.xb[2], loss_aug=self.loss_func.loss_aug, loss_adv=self.loss_func.loss_adv,
                      **grads)
        def after_step(self): self.keep(**{f'param/{k}': p for k,p in self.model.named_parameters()})
    dls = DataLoaders(DataLoader([(torch.zeros(3,12,12),)]*48, bs=16, device=device),
                      DataLoader([], bs=16), device=device)
    opt_func,lr,wd = training[method]
    learn = Learner(dls, model_of(d, method).to(device), CLAELoss(losses[method](), alpha=.7), opt_func=opt_func,
                    cbs=[CLAECallback(views, FGSM(.03)), Record()], wd_bn_bias=True)
    learn.remove_cb(Recorder) # which smooths losses in float32 only
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=lr, wd=wd)
    names = {rename_last(k): k for k in d if k.startswith('step') and not k.endswith(('x_q','x_p'))}
    assert len(names) == 3*(3 + 2*len(list(learn.model.parameters()))) and names.keys() == seen.keys()
    return {names[k]: v for k,v in seen.items()}

@pytest.mark.parametrize('method', losses)
def test_attack(golden, method):
    d = golden(f'step_{method}')
    assert torch.equal(attacked(d, method), torch.tensor(d['step0/x_adv']))

@pytest.mark.parametrize('method', losses)
def test_three_steps_of_training(golden, method):
    d = golden(f'step_{method}')
    for k,got in three_steps(d, method).items(): close(got, d[k])

def test_knn(golden):
    d = golden('knn')
    a,y,b,t = (torch.tensor(d[k]) for k in ('train_features','train_labels','test_features','test_labels'))
    for k in (1,5,200):
        for temp in (.1,.5):
            accuracy = (knn_predict(a, y, b, k, temp) == t).double().mean()
            close(100*accuracy, d[f'accuracy/k{k}_t{temp}'])
