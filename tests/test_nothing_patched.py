"""Importing the library changes nothing for other learners: fastai's classes, functions and dispatch tables
are as they were."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

here = Path(__file__).parent
pytest.importorskip('accelerate', reason="needs pip install -e '.[test]'")

def changes(*names, path=here.parent):
    "What importing these modules changes about fastai, in a process of its own"
    env = {**os.environ, 'PYTHONPATH': f'{path}{os.pathsep}{here.parent}', 'PYTHONWARNINGS': 'ignore'}
    res = subprocess.run([sys.executable, here/'patches_worker.py', *names], capture_output=True, text=True, env=env)
    assert res.returncode == 0, res.stderr[-3000:]
    return json.loads(res.stdout.splitlines()[-1])

def test_nothing_is_patched():
    "But for methods that are added to `Learner`"
    names = [n for n in ('clae_fastai.all','clae_fastai.paper.experiments','clae_fastai.runs','clae_fastai.cli')
             if find_spec(n)]
    added = 'distributed','embed','export_encoder','show_views'
    assert changes(*names) == [f'fastai.learner.Learner.{n} is new' for n in added]

patches = '''
import fastai.distributed, fastai.learner, fastai.metrics, fastai.torch_core
from fastai.vision.all import *
@patch
def before_fit(self:MixedPrecision): pass
@patch(as_prop=True)
def training(self:Learner): pass
@patch
def extra(self:Learner): pass
@patch
def to(self:DataLoaders, device): pass
fastai.torch_core.maybe_gather = print
fastai.distributed.rank_distrib = print
Recorder.order = 3
fastai.torch_core.to_np.__code__ = (lambda x: x).__code__
del fastai.learner.Learner.validate
del fastai.metrics.accuracy
class Strange: pass
@dispatch
def show_batch(x:Strange, y, samples): pass
@Normalize
def encodes(self, x:Strange): pass
@IntToFloatTensor
def decodes(self, x:Strange): pass
defaults.strange = 1
'''
found = '''fastai.callback.fp16.MixedPrecision.before_fit is another
fastai.data.core.DataLoaders.to is another
fastai.data.core.show_batch is another
fastai.data.transforms.IntToFloatTensor.decodes is another
fastai.data.transforms.Normalize.encodes is another
fastai.distributed.rank_distrib is another
fastai.learner.Learner.extra is new
fastai.learner.Learner.training is new
fastai.learner.Learner.validate is gone
fastai.learner.Recorder.order is another
fastai.metrics.accuracy is gone
fastai.torch_core.maybe_gather is another
fastai.torch_core.to_np is another
fastcore.foundation.defaults is another'''.splitlines()

def test_patches_are_found(tmp_path):
    (tmp_path/'patching.py').write_text(patches)
    got = changes('patching', path=tmp_path)
    assert [o for o in found if o not in got] == []
