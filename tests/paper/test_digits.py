"The demonstration, from the command line, over three seeds."
import json

import numpy as np
import pytest

@pytest.mark.slow
def test_trained_beats_pixels_and_the_untrained_encoder(cli):
    rows = []
    for seed in range(3):
        r = cli('clae_train', '--seed', seed, '--name', f'seed{seed}')
        assert r.returncode == 0, r.stderr
        s = json.loads((cli.cwd/'runs'/f'seed{seed}'/'summary.json').read_text())
        rows.append({enc: [v[n]['mean'] for n in ('1','5')] for enc,v in s['metrics']['knn'].items()})
    (raw1,raw5),(un1,un5),(enc1,enc5) = (np.mean([r[k] for r in rows], 0) for k in ('raw','untrained','encoder'))
    print(f'raw {raw1:.3f} {raw5:.3f}, untrained {un1:.3f} {un5:.3f}, trained {enc1:.3f} {enc5:.3f}')
    assert enc1 > raw1 + .08 and enc5 > raw5 + .04
    assert enc1 > un1 + .15 and enc5 > un5 + .15
