"The demonstration: `clae_train` as it is, for one seed. `benchmarks/digits.py` has five."
import json

import numpy as np
import pytest

from clae_fastai.cli import clae_train

@pytest.mark.slow
def test_trained_beats_pixels_and_the_untrained_encoder(tmp_path, monkeypatch):
    """Margins are three standard deviations over the seeds of results/digits.csv below their means:
    .109 (.013) and .062 (.007) above pixels, .367 (.019) and .317 (.031) above the untrained encoder"""
    monkeypatch.chdir(tmp_path)
    clae_train(seed=0, name='digits')
    knn = json.loads((tmp_path/'runs'/'digits'/'summary.json').read_text())['metrics']['knn']
    raw,untrained,trained = (np.array([knn[o][n]['mean'] for n in ('1','5')]) for o in ('raw','untrained','encoder'))
    print(f'{raw=} {untrained=} {trained=}')
    assert (trained > raw + [.07,.04]).all() and (trained > untrained + [.3,.22]).all()
    assert (untrained < raw).all() # and would not pass
