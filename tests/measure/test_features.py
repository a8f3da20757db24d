"Nearest neighbours against scikit-learn and lightly, few labels, and features that are refused."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn_predict
from sklearn.neighbors import KNeighborsClassifier

from clae_fastai.measure.features import KNNClassifier, few_label_knn, knn_accuracy, knn_predict
from clae_fastai.measure.probe import linear_probe

def scikit_learn(bank, y, queries, k, temperature):
    model = KNeighborsClassifier(k, metric='cosine', algorithm='brute',
        weights=lambda dist: np.exp((1-dist)/temperature))
    return torch.tensor(model.fit(bank.double(), y).predict(queries.double()))

def lightly(bank, y, queries, k, temperature):
    queries,bank = F.normalize(queries.double(), dim=1),F.normalize(bank.double(), dim=1)
    return lightly_knn_predict(queries, bank.T, y, int(y.max())+1, k, temperature)[:,0]

def votes(bank, y, queries, k, temperature):
    "Share of the votes that each class gets, and for which queries the k-th neighbour is clearly nearer than the next"
    sim = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    sim,idx = sim.topk(min(k+1, len(bank)))
    clear = sim[:,k-1] - sim[:,k] > 1e-6 if k < len(bank) else torch.ones(len(queries), dtype=torch.bool)
    weights = ((sim[:,:k] - sim[:,:1])/temperature).exp()
    share = torch.zeros(len(queries), int(y.max())+1).double().scatter_add(1, y[idx[:,:k]], weights)
    return share/share.sum(1, keepdim=True),clear

def check_against_oracles(bank, y, queries, k, temperature):
    """Where votes differ by 1e-5 or more, all three agree; elsewhere ours is one of the best.
    How many queries were clear?"""
    ours = knn_predict(bank, y, queries, k, temperature)
    share,clear = votes(bank, y, queries, k, temperature)
    best = share.amax(1, keepdim=True)
    good = share > best - 1e-5
    assert good.gather(1, ours[:,None])[clear].all()
    decided = clear & (good.sum(1) == 1)
    for oracle in (scikit_learn, lightly):
        assert torch.equal(ours[decided], oracle(bank, y, queries, k, temperature)[decided])
    return int(decided.sum())

dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 80), d=st.integers(2, 33), n_classes=st.integers(1, 6), k=st.integers(1, 80),
       seed=st.integers(0, 999), temperature=st.sampled_from([.05,.1,.5]), dtype=st.sampled_from(dtypes),
       query_dtype=st.sampled_from(dtypes), length=st.sampled_from([1e-3,1.,100.]))
def test_knn_is_scikit_learns_and_lightlys(n, d, n_classes, k, seed, temperature, dtype, query_dtype, length):
    "Of any floating point types: half precision as it is, computed in float32"
    g = torch.Generator().manual_seed(seed)
    bank = (torch.randn(n, d, generator=g)*(length*torch.rand(n, 1, generator=g) + .01)).to(dtype)
    queries = torch.randn(17, d, generator=g).to(query_dtype)
    check_against_oracles(bank, torch.randint(n_classes, (n,), generator=g), queries, min(k, n), temperature)

@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 60), d=st.integers(1, 5), seed=st.integers(0, 999), dtype=st.sampled_from(dtypes))
def test_equal_directions_and_zero_vectors(n, d, seed, dtype):
    "All vote, so that it does not matter which of equal neighbours is the k-th"
    g = torch.Generator().manual_seed(seed)
    bank,queries = (torch.randint(-1, 2, (m,d), generator=g).to(dtype) for m in (n,13))
    check_against_oracles(bank, torch.randint(4, (n,), generator=g), queries, n, .1)

def test_more_similarities_than_one_chunk(blobs):
    "30,000 x 2,500 are three chunks, the last of them smaller"
    (bank,y),(queries,_) = blobs(30_000, 16, 7, 0, 3),blobs(2500, 16, 7, 1, 3)
    ours = knn_predict(bank, y, queries, 20)
    parts = torch.cat([knn_predict(bank, y, part, 20) for part in (queries[:3],queries[3:100],queries[100:])])
    share,clear = votes(bank, y, queries, 20, .1)
    undecided = ~clear | (share.topk(2).values.diff().abs().flatten() < 1e-5)
    assert undecided.sum() < 25
    assert (torch.equal(ours[~undecided], parts[~undecided]) and
            torch.equal(ours[~undecided], share.argmax(1)[~undecided]))

@pytest.mark.parametrize('k,temperature', [(1,.1), (7,.1), (50,.5), (400,.07)])
def test_knn_classifier(blobs, k, temperature):
    (x,y),(tx,ty) = blobs(400, 24, 7, k, 3),blobs(150, 24, 7, k+50, 3)
    ours = KNNClassifier(k, temperature).fit(x, y)
    theirs = scikit_learn(x, y, tx, k, temperature)
    np.testing.assert_array_equal(ours.predict(tx), theirs)
    accuracy = pytest.approx(float((theirs == ty).float().mean()))
    assert ours.score(tx, ty) == accuracy and knn_accuracy((x,y), (tx,ty), k, temperature) == accuracy
    assert check_against_oracles(x, y, tx, k, temperature) > 145

def test_labels_of_any_integers(blobs):
    (x,y),(tx,_) = blobs(200, 8, 5),blobs(50, 8, 5, 1)
    names = torch.tensor([-7,3,40,41,10**12])
    assert torch.equal(knn_predict(x, names[y], tx, 9), names[knn_predict(x, y, tx, 9)])

def test_half_precision_costs_little(blobs):
    train,(tx,ty) = blobs(500, 64, 5, 0, 2),blobs(200, 64, 5, 1, 2)
    exact = knn_accuracy(train, (tx,ty), 20)
    for dtype in (torch.float16,torch.bfloat16):
        assert knn_accuracy((train[0].to(dtype),train[1]), (tx.to(dtype),ty), 20) == pytest.approx(exact, abs=.02)

def test_few_labels(blobs):
    (x,y),(tx,ty) = blobs(600, 16, 6),blobs(120, 16, 6, 1)
    res = few_label_knn(x, y, tx, ty, draws=5)
    assert list(res) == ['1','5','10','1%','10%','all'] and [len(v['values']) for v in res.values()] == [5]*5 + [1]
    for v in res.values():
        assert v['mean'] == pytest.approx(np.mean(v['values'])) and v['std'] == pytest.approx(np.std(v['values']))
    # 100 images a class
    assert res['1']['values'] == res['1%']['values'] and res['10']['values'] == res['10%']['values']
    assert res['1']['mean'] < res['10']['mean'] < res['all']['mean'] + .05

def test_bad_features(blobs):
    (x,y),(tx,ty) = blobs(60, 5, 3),blobs(30, 5, 3, 1)
    bad = x.clone()
    bad[[4,9]],bad[11,2] = torch.nan,torch.inf
    use = dict(knn=lambda a, b: knn_predict(*a, b[0], 5), probe=linear_probe, few=lambda a, b: few_label_knn(*a, *b))
    for name,f in use.items():
        with pytest.raises(ValueError, match=r'3 of the 60 training features .* rows \[4, 9, 11\]'): f((bad,y), (tx,ty))
        with pytest.raises(ValueError, match=r'rows \[4, 9, 11\]'): f((x,y), (bad,y))
        with pytest.raises(ValueError, match='same encoder'): f((x,y), (tx[:,:3],ty))
        with pytest.raises(ValueError, match=r'60 training features .* \(59,\)'): f((x,y[1:]), (tx,ty))
        with pytest.raises(ValueError, match=r'\(N,F\)'): f((x[:0],y[:0]), (tx,ty))
        with pytest.raises(ValueError, match=r'\(N,F\)'): f((x,y), (tx[0],ty))
        if name != 'knn':
            with pytest.raises(ValueError, match=r'not in the training set, such as \[2\]'): f((x[y<2],y[y<2]), (tx,ty))

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(),
                    reason='the largest size of a process is read from /proc')
def test_memory():
    "Neither kNN nor the probe copies the features, which are 117 MiB here; kNN has 69 MiB of similarities"
    script = Path(__file__).parents[2]/'benchmarks'/'bench_memory.py'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '4000000'} # what is freed is gone
    out = subprocess.run([sys.executable, script, '30000', '1024', '10'],
        env=env, capture_output=True, text=True, check=True).stdout
    extra = {row['what']: row['MiB'] for row in map(json.loads, out.splitlines())}
    assert 60 < extra['kNN'] < 140 and 10 < extra['probe'] < 90, extra
