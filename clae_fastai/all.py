"Everything a user needs: `from clae_fastai.all import *`. (Written by hand, as fastai's own `all` modules are.)"
from fastai.vision.all import *
from clae_fastai.distributed import *
from clae_fastai.losses import *
from clae_fastai.dualbn import *
from clae_fastai.attacks import *
from clae_fastai.views import *
from clae_fastai.models import *
from clae_fastai.data import *
from clae_fastai.callback import *
from clae_fastai.learner import *
from clae_fastai.evaluate import *
from clae_fastai.checkpoint import *
from clae_fastai.analysis import *
