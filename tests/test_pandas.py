"No argument of pandas' that a later version drops; and fastai, which is behind, is kept from it by the requirements."
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clae_fastai.all import (
    bn_statistics, clae_learner, datasets, get_dls, intervals, loss_vs_eps, plot_losses, resnet8)

@pytest.fixture(autouse=True)
def strict():
    "Plans of pandas are errors"
    with warnings.catch_warnings():
        for kind in (FutureWarning, getattr(pd.errors, 'PandasChangeWarning', FutureWarning)):
            warnings.simplefilter('error', kind)
        yield

def test_tables(quiet, tmp_path):
    learn = quiet(clae_learner(get_dls('digits', bs=32, limit=96), resnet8, views='digits'))
    learn.fit(1)
    assert len(datasets()) and len(learn.show_views(2).axes)
    assert len(intervals(loss_vs_eps(learn, eps=[.03], n_batches=2)))
    assert len(bn_statistics(learn))
    pd.DataFrame(dict(epoch=[0], train_loss=[1.], loss_aug=[1.])).to_csv(tmp_path/'history.csv', index=False)
    plot_losses(tmp_path/'history.csv')

def test_trials_are_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.random(20_000)*10.**rng.integers(-5, 5, 20_000)
    pd.DataFrame(dict(x=x)).to_csv(tmp_path/'t.csv', index=False)
    assert (pd.read_csv(tmp_path/'t.csv', engine='python').x == x).all() # as the experiments do

def test_the_requirement():
    line = re.search('^requirements = (.*)$', (Path(__file__).parents[1]/'settings.ini').read_text(), re.M)[1]
    assert 'pandas<4' in line.split()
