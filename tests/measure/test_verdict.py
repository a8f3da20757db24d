"What a training without labels says about itself, told apart on real short runs."
import math

import pytest
import torch
from torch import nn

from clae_fastai.all import CollapseMonitor, clae_learner, effective_rank, extract_features, get_dls, resnet8, set_seed

class Constant(nn.Module):
    "A head whose embeddings are all equal, whatever comes in and is learnt"
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(16))
    def forward(self, h): return self.bias + 0*h[:,:16]

def run(quiet, method, epochs, lr=3e-3, **kwargs):
    set_seed(0)
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=640), resnet8, method, views='digits', **kwargs))
    learn.fit_one_cycle(epochs, lr, cbs=(monitor := CollapseMonitor()))
    return monitor.verdict

@pytest.mark.parametrize('method', ['plain','uel','simclr'])
def test_states(quiet, method):
    "Healthy, too short, not learning and collapsed runs of each method"
    assert run(quiet, method, 12).state == 'learning'
    assert run(quiet, method, 2).state == 'still falling'
    assert run(quiet, method, 2, 1e-12).state == 'not learning'
    assert run(quiet, method, 2, head=Constant()).state == 'collapsed'
