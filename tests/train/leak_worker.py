"""Many short epochs on digits for SECONDS, with everything that a long run has: `python leak_worker.py SECONDS FOLDER`.
Prints the peak memory after the first third (at most a minute) and at the end."""
import sys
import time

from fastai.vision.all import Callback, CancelFitException, noop

from clae_fastai.method.attacks import RFGSM
from clae_fastai.train.checkpoint import Checkpoint
from clae_fastai.data.catalogue import get_dls
from clae_fastai.measure.monitors import CollapseMonitor, KNNCallback
from clae_fastai.train.learner import clae_learner
from clae_fastai.method.models import resnet8

def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))

class Watch(Callback):
    order = 2000
    def __init__(self, seconds): self.start,self.seconds,self.first = time.time(),seconds,None
    def after_epoch(self):
        passed = time.time() - self.start
        if self.first is None and passed > min(60, self.seconds/3): self.first = peak(),self.epoch
        if passed > self.seconds: raise CancelFitException

if __name__ == '__main__':
    seconds,folder = float(sys.argv[1]),sys.argv[2]
    watch = Watch(seconds)
    cbs = [Checkpoint(folder, every_batches=2), KNNCallback(every=3, k=20), CollapseMonitor(), watch]
    learn = clae_learner(get_dls('digits', bs=32, limit=128), resnet8, views='digits', attack=RFGSM(.03), cbs=cbs)
    learn.logger = noop
    with learn.no_bar(): learn.fit(10**6, 1e-3)
    print(*watch.first, peak(), learn.epoch)
