"""The table of fastai's callbacks in the documentation says what they do: each is trained with, on every kind of data.
`python tests/train/test_callback_table.py` makes the table."""
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from fastai.vision.all import Callback, DataLoaders, noop
from torch.utils import data

from clae_fastai.all import FileDL, FileImages, MemoryImages, clae_learner, image_dls, memory_dls, resnet8

page = Path(__file__).parents[2]/'nbs'/'16b_train.callbacks.ipynb'
names = {} # of fastai's callbacks, and what they are written with
modules = ('core data fp16 hook mixup progress schedule tracker rnn training preds '
           'channelslast tensorboard wandb').split()
for module in [f'callback.{o}' for o in modules] + ['learner']:
    with contextlib.suppress(ImportError): names |= vars(importlib.import_module(f'fastai.{module}'))

# how they are written; those that stand for themselves need no arguments
written = '''
ActivationStats() BnFreeze() CSVLogger() CastToTensor() ChannelsLast() CollectDataCallback() CutMix()
EarlyStoppingCallback() EarlyStoppingCallback(monitor='train_loss') FetchPredsCallback() GradientAccumulation(8)
GradientClip() MCDropoutCallback() MixUp() MixedPrecision() MixedPrecision(amp_mode='bf16') ModelResetter()
ModelToHalf() NonNativeMixedPrecision() ParamScheduler({'lr':SchedCos(1e-3,0)}) ProgressCallback() RNNCallback()
RNNRegularizer(1.,1.) ReduceLROnPlateau() SaveModelCallback() ShortEpochCallback() ShowGraphCallback() SkipToEpoch(1)
TensorBoardCallback() TensorBoardCallback(projector=True) TensorBoardProjectorCallback() TerminateOnNaNCallback()
TrackerCallback() WandbCallback(log='all')
'''.split()
elsewhere = {'LRFinder','DistributedTrainer','ParallelTrainer', # have their own tests, or need several GPUs
    'Callback','HookCallback','TrackerCallback','MixHandler','TensorBoardBaseCallback', # bases
    'TrainEvalCallback','Recorder','GatherPredsCallback'} # in every learner, or in every prediction

def images(kind, labelled, n_valid=8):
    x,y = torch.randint(256, (16,3,16,16), dtype=torch.uint8),torch.arange(16)%2
    labels,names = (y,['a','b']) if labelled else (None,[])
    if kind == 'memory': return memory_dls(whole := MemoryImages(x, labels, names), whole.take(slice(0,n_valid)), bs=8)
    if kind == 'files':
        whole = FileImages([*x], 16, labels, names)
        return image_dls(whole, whole.take(slice(0,n_valid)), FileDL, bs=8, num_workers=0)
    dataset = data.TensorDataset(x, y) if labelled else data.TensorDataset(x)
    valid = data.Subset(dataset, range(n_valid))
    return DataLoaders(data.DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True),
                       data.DataLoader(valid, batch_size=8))

class Stepped(Callback):
    n = 0
    def after_step(self): self.n += 1

def outcome(text, dls):
    "'works', or in which words it is refused"
    learn = clae_learner(dls, resnet8, every=1)
    learn.logger,stepped = noop,Stepped()
    with (contextlib.redirect_stdout(io.StringIO()) as said,
          learn.no_bar() if 'ShowGraph' not in text else contextlib.nullcontext()):
        if text.startswith('Wandb'):
            import wandb
            wandb.init(mode='offline', project='p', dir='.', settings=wandb.Settings(silent=True))
        try: learn.fit(2, 1e-3, cbs=[eval(text, names), stepped])
        except Exception as e:
            assert isinstance(e, ValueError) and stepped.n == 0, repr(e)
            return str(e).strip().splitlines()[-1].strip()
        finally:
            if text.startswith('Wandb'): wandb.finish()
    assert stepped.n and 'WandbCallback' not in said.getvalue(), said.getvalue() # as it complains
    return 'works'

def row(text):
    kinds = [(kind,labelled) for kind in ('memory','files','PyTorch') for labelled in (True,False)]
    said = ({outcome(text, images(*kind)) for kind in kinds},
            {outcome(text, images('memory', labelled, 0)) for labelled in (True,False)})
    assert [len(o) for o in said] == [1,1], said # whatever the images
    refused = {o for outcomes in said for o in outcomes if o != 'works'}
    cells = ['works' if 'works' in o else 'refused' for o in said]
    return f"| `{text}` | {' | '.join(cells)} | {' '.join(refused)} |"

def there(text): return text.partition('(')[0] in names

@pytest.fixture(scope='module')
def table():
    cells = json.loads(page.read_text())['cells']
    return [o.rstrip() for c in cells for o in c['source'] if o.startswith('| `')]

@pytest.mark.slow
@pytest.mark.parametrize('text', written)
def test_row(text, table, tmp_path, monkeypatch):
    if not there(text): pytest.skip(f'{text} needs a package that is not here')
    monkeypatch.chdir(tmp_path)
    assert row(text) in table

def test_no_callback_is_missing(table):
    there = {re.match(r'\| `(\w+)', o)[1] for o in table}
    assert there == {o.partition('(')[0] for o in written}
    classes = {n: o for n,o in names.items() if inspect.isclass(o) and issubclass(o, Callback)}
    of_fastai = {n for n,o in classes.items() if o.__module__.removeprefix('fastai.callback.') in modules}
    assert of_fastai and of_fastai <= there | elsewhere, of_fastai - there - elsewhere

if __name__ == '__main__':
    os.chdir(tempfile.mkdtemp())
    print('| callback | | without validation images | what is said |\n|---|---|---|---|')
    for o in written: print(row(o), flush=True)
