"""`fine_tune`, two fits in one call, is resumed in whichever of them it was interrupted;
a finished run says how it is trained longer."""
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from fastai.vision.all import Callback, set_seed

from clae_fastai.all import (
    Checkpoint, Resume, checkpoints, clae_learner, encoder_learner, get_dls, last_checkpoint, load_state, resnet8)

class Stop(Callback):
    order,run_valid,n = 2000,False,0
    def __init__(self, at): self.at = at
    def after_batch(self):
        self.n += 1
        if self.n == self.at: raise InterruptedError('stopped')

def learner(quiet):
    set_seed(0)
    dls = get_dls('digits', bs=32, limit=128) # four batches an epoch
    return quiet(encoder_learner(dls, clae_learner(dls, resnet8, views='digits')))

def tune(quiet, *cbs, epochs=2, **kwargs):
    learn = learner(quiet)
    set_seed(1)
    learn.fine_tune(epochs, cbs=cbs, **kwargs)
    return learn

def assert_same(a, b):
    for part in ('model','opt'):
        for x,y in zip(*(torch.utils._pytree.tree_leaves(getattr(o, part).state_dict()) for o in (a, b)), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert a.recorder.values == b.recorder.values and a.recorder.lrs == b.recorder.lrs

@pytest.mark.parametrize('kwargs', [dict(), dict(epochs=1), dict(epochs=1, freeze_epochs=2)])
@pytest.mark.parametrize('at', [3,4,5,6,7,8,10])
def test_same_weights(at, kwargs, quiet, tmp_path, capsys):
    "Stopped in either fit, inside an epoch or after it, and once more"
    whole,frozen = tune(quiet, **kwargs),4*kwargs.get('freeze_epochs', 1)
    at = min(at, frozen + 4*kwargs.get('epochs', 2))
    with pytest.raises(InterruptedError): tune(quiet, Checkpoint(tmp_path, every_batches=2), Stop(at), **kwargs)
    state = last_checkpoint(tmp_path)[1]
    assert len(state['earlier_fits']) == (at >= frozen+2) # it had saved by then
    capsys.readouterr()
    resumed = tune(quiet, Checkpoint(tmp_path, every_batches=2), Resume(tmp_path), **kwargs)
    assert capsys.readouterr().err.count('passed over') == len(state['earlier_fits'])
    assert_same(whole, resumed)

def test_stopped_twice(quiet, tmp_path):
    whole = tune(quiet)
    for at in (7,4): # the batches that are loaded again are not counted
        with pytest.raises(InterruptedError):
            tune(quiet, Checkpoint(tmp_path, every_batches=1), *resume(tmp_path), Stop(at))
    assert_same(whole, tune(quiet, Resume(tmp_path)))

def resume(folder): return [Resume(folder)] if checkpoints(folder) else []

def test_only_what_was_done_is_passed_over(quiet, tmp_path):
    with pytest.raises(InterruptedError): tune(quiet, Checkpoint(tmp_path), Stop(9))
    with pytest.raises(ValueError, match='is of another run'):
        tune(quiet, Resume(tmp_path), freeze_epochs=3) # another first fit
    with pytest.raises(ValueError, match='is of another run'):
        tune(quiet, Resume(tmp_path), epochs=3) # another second one

def test_a_second_fit_by_itself(quiet, tmp_path):
    "As a notebook does, whose first fit is not run again"
    def second(*cbs):
        learn = learner(quiet)
        learn.unfreeze()
        set_seed(2)
        learn.fit(2, 1e-3, cbs=cbs)
        return learn
    learn = learner(quiet)
    learn.fit(1, 1e-2, cbs=(ck := Checkpoint(tmp_path)))
    whole = second()
    with pytest.raises(InterruptedError): second(ck, Stop(6))
    assert_same(second(Resume(tmp_path)), whole)

def test_a_finished_run(quiet, tmp_path):
    def fit(n, *cbs):
        set_seed(0)
        learn = quiet(clae_learner(get_dls('digits', bs=32, limit=96), resnet8, views='digits'))
        learn.fit(n, 1e-3, cbs=cbs)
        return learn
    done = fit(1, Checkpoint(tmp_path))
    with pytest.raises(ValueError, match='epochs: 1, now 2.*To train a finished run longer.*--extend') as e:
        fit(2, Resume(tmp_path))
    file = checkpoints(tmp_path)[-1]
    assert f"load_checkpoint('{file}')" in str(e.value) # two lines of Python
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=96), resnet8, views='digits'))
    load_state(learn.model, last_checkpoint(tmp_path)[1]['model'])
    assert all(torch.equal(v, done.model.state_dict()[k]) for k,v in learn.model.state_dict().items())
    with pytest.raises(InterruptedError): fit(3, Checkpoint(tmp_path/'b'), Stop(5))
    with pytest.raises(ValueError, match='epochs: 3, now 4') as e: fit(4, Resume(tmp_path/'b'))
    assert '--extend' not in str(e.value) # it is not finished

script = '''
import sys
from fastai.vision.all import Callback, ProgressCallback, noop, set_seed
import safetensors.torch
from clae_fastai.all import *
folder,out,pause = Path(sys.argv[1]),Path(sys.argv[2]),float(sys.argv[3])
class Slow(Callback):
    run_valid = False
    def after_batch(self): time.sleep(pause)
torch.set_num_threads(1)
set_seed(0)
dls = get_dls('digits', bs=32, limit=256)
learn = encoder_learner(dls, clae_learner(dls, resnet8, views='digits'))
learn.remove_cb(ProgressCallback)
learn.logger = noop
set_seed(1)
learn.fine_tune(2, freeze_epochs=2, cbs=[
    Checkpoint(folder, every_batches=1), Slow(), *([Resume(folder)] if checkpoints(folder) else [])])
safetensors.torch.save_file(learn.model.state_dict(), out)
'''

@pytest.mark.slow
def test_killed(tmp_path):
    """SIGKILL at random moments, twice in each of the two fits;
    the end is that of a process that nobody killed, byte by byte"""
    (file := tmp_path/'tune.py').write_text(script)
    def start(name, pause):
        return subprocess.Popen(
            [sys.executable, '-W', 'ignore', file, tmp_path/name, tmp_path/f'{name}.safetensors', str(pause)])
    assert start('whole', 0).wait(300) == 0
    rng,folder = random.Random(0),tmp_path/'killed'
    for i in range(4): # 16 batches in the first fit, 16 in the second
        p = start('killed', .05)
        def in_fit(): return len([*folder.glob('earlier-*')]) if folder.exists() else 0
        def newest(): return checkpoints(folder)[-1].name if folder.exists() and checkpoints(folder) else ''
        before,end = newest(),time.monotonic() + 120
        while (newest() == before or in_fit() < i//2) and p.poll() is None:
            assert time.monotonic() < end
            time.sleep(.005)
        time.sleep(rng.uniform(0, .2))
        p.kill()
        assert p.wait() == -signal.SIGKILL, 'it was faster'
    assert in_fit() == 1
    assert start('killed', 0).wait(300) == 0
    assert (tmp_path/'killed.safetensors').read_bytes() == (tmp_path/'whole.safetensors').read_bytes()
