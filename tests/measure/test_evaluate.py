"Evaluation: nearest neighbours and linear probes against scikit-learn and the slow way, no trace left behind, and files that give the live features."
import json
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from test_data import pets

from clae_fastai.all import (DataLoaders, KNNCallback, KNNClassifier, clae_learner, evaluate, export_onnx, extract_features, few_label_knn, get_dls, knn_predict, linear_probe,
                             load_encoder, resnet8, resnet18, set_seed, transfer)
from clae_fastai.cli import clae_eval, clae_export

def blobs(n, d, n_classes, seed=0, spread=1.):
    "Features around a centre for each class, behind a ReLU as an encoder's are"
    g = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(n_classes, d))
    y = g.permutation(np.arange(n)%n_classes)
    return torch.tensor(np.maximum(centres[y] + spread*g.normal(size=(n,d)) + 1, 0), dtype=torch.float32),torch.tensor(y)

# nearest neighbours

@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 80), d=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99), coarse=st.booleans(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_chunk_size_never_changes_a_prediction(n, d, data, seed, coarse, dtype):
    "Nor do ties: coarse features have many, and zero vectors"
    g = torch.Generator().manual_seed(seed)
    draw = (lambda *s: torch.randint(-1, 2, s, generator=g).to(dtype)) if coarse else (lambda *s: torch.randn(s, generator=g).to(dtype))
    bank,x,y = draw(n, d),draw(13, d),torch.randint(-2, 3, (n,), generator=g)
    k,budget = data.draw(st.integers(1, n)),data.draw(st.floats(1e-6, .01))
    whole = knn_predict(bank, y, x, k)
    assert torch.equal(whole, knn_predict(bank, y, x, k, budget=budget))
    assert torch.equal(whole, torch.cat([knn_predict(bank, y, o[None], k) for o in x]))

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('k,temperature', [(1,.1), (7,.1), (50,.5), (400,.07)])
def test_knn_classifier_is_scikit_learns(seed, k, temperature):
    (x,y),(tx,ty) = blobs(400, 24, 7, seed, 3),blobs(150, 24, 7, seed+50, 3)
    ours = KNNClassifier(k, temperature).fit(x, y)
    theirs = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=lambda dist: np.exp((1-dist)/temperature)).fit(x.double(), y)
    np.testing.assert_array_equal(ours.predict(tx), theirs.predict(tx.double()))
    assert ours.score(tx, ty) == pytest.approx(theirs.score(tx.double(), ty))

def test_half_precision_bank():
    (x,y),(tx,ty) = blobs(500, 64, 5, 0, 2),blobs(200, 64, 5, 1, 2)
    exact = (knn_predict(x, y, tx, 20) == ty).float().mean()
    for dtype in (torch.float16,torch.bfloat16):
        assert (knn_predict(x.to(dtype), y, tx.to(dtype), 20) == ty).float().mean() == pytest.approx(float(exact), abs=.02)
        assert torch.equal(knn_predict(x.to(dtype), y, tx, 20), knn_predict(x.to(dtype).double(), y, tx, 20)) # their rounding, and no more

def test_few_labels():
    (x,y),(tx,ty) = blobs(600, 16, 6),blobs(120, 16, 6, 1)
    res = few_label_knn(x, y, tx, ty, draws=5)
    assert list(res) == ['1','5','10','1%','10%','all'] and [len(v['values']) for v in res.values()] == [5]*5 + [1]
    for v in res.values(): assert v['mean'] == pytest.approx(np.mean(v['values'])) and v['std'] == pytest.approx(np.std(v['values']))
    assert res['1']['values'] == res['1%']['values'] and res['10']['values'] == res['10%']['values'] # 100 images a class
    assert res['1']['mean'] < res['10']['mean'] < res['all']['mean'] + .05

# linear probe

def rerun_encoder(encoder, images, y, n_classes, epochs, bs, lr, seed):
    "The authors' way: the encoder runs on every batch of every epoch"
    torch.manual_seed(seed)
    linear = nn.Linear(encoder(images[:2]).shape[1], n_classes)
    opt,g = torch.optim.Adam(linear.parameters(), lr=lr),torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        perm = torch.randperm(len(images), generator=g)
        for i in range(len(images)//bs):
            idx = perm[i*bs:(i+1)*bs]
            with torch.no_grad(): h = encoder(images[idx])
            loss = F.cross_entropy(linear(h), y[idx])
            opt.zero_grad(); loss.backward(); opt.step()
    return linear

def test_adam_follows_the_loop_that_reruns_the_encoder():
    dls = get_dls('digits', bs=64, limit=300)
    learn = clae_learner(dls, resnet8, views='digits')
    (h,y),test = (extract_features(learn, dl) for dl in dls.loaders)
    images = torch.cat([learn.clae.normalize(b[0]) for b in dls.train.new(shuffle=False, drop_last=False)])
    p = linear_probe((h,y), test, 'adam', epochs=3, bs=32, seed=5)
    ref = rerun_encoder(learn.model.encoder.eval(), images, y, 10, 3, 32, 3e-4, 5)
    torch.testing.assert_close(p.linear.weight, ref.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(p.linear.bias, ref.bias, rtol=0, atol=1e-6)
    assert p.curve[-1] == p.final == pytest.approx(float((ref(test[0]).argmax(1) == test[1]).float().mean()))

@pytest.mark.parametrize('l2', [1e3, 1., 1e-3])
@pytest.mark.parametrize('spread', [1., 4.]) # separable, and not
def test_lbfgs_reaches_scikit_learns_loss(l2, spread):
    x,y = blobs(600, 40, 6, spread=spread)
    p = linear_probe((x,y), (x,y), l2s=[l2])
    m = LogisticRegression(C=1/l2, tol=1e-10, max_iter=20000).fit(x.double(), y)
    def loss(w, b): return float(F.cross_entropy(F.linear(x.double(), w, b), y, reduction='sum') + l2/2*w.square().sum())
    ours,theirs = loss(p.linear.weight.data, p.linear.bias.data),loss(torch.tensor(m.coef_), torch.tensor(m.intercept_))
    assert ours == pytest.approx(theirs, rel=1e-4)

def test_the_penalty_is_chosen_without_the_test_set():
    train,(tx,ty) = blobs(300, 20, 4, 0, 2),blobs(200, 20, 4, 1, 2)
    a,b = linear_probe(train, (tx,ty)),linear_probe(train, (tx[:50],ty.flip(0)[:50]))
    assert a.settings == b.settings and torch.equal(a.linear.weight, b.linear.weight) and len(a.settings['l2s']) == len(a.curve) == 45
    assert 1e-6 == pytest.approx(min(a.settings['l2s'])) and 1e5 == pytest.approx(max(a.settings['l2s']))
    assert a.curve[a.settings['l2s'].index(a.settings['l2'])] == max(a.curve) and a.best_on_test is None
    assert a.final > .6 and a.final == a.top1 and a.top5 is None

def test_best_on_test_is_not_the_headline():
    p = linear_probe(blobs(200, 10, 8, 0, 3), blobs(100, 10, 8, 1, 3), 'adam', epochs=40, bs=50, lr=.05)
    assert p.final == p.curve[-1] and p.best_on_test == max(p.curve) == p.curve[p.best_epoch-1]
    j = json.loads(p.to_json())
    assert j['final'] == p.final and j['settings'] == dict(solver='adam', seed=0, epochs=40, bs=50, lr=.05)

# evaluating changes nothing

def state(learn):
    "Everything that training depends on"
    opt = [v for s in learn.opt.state.values() for v in s.values()]
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in [*learn.model.state_dict().values(), *opt]],[random.getstate(), np.random.get_state(), torch.get_rng_state(), learn.dls.train.rng.getstate()],[m.training for m in learn.model.modules()]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x,y in zip(a, b)) if isinstance(a, (list,tuple)) else a == b

@pytest.mark.parametrize('data', ['digits','folder'])
def test_evaluating_changes_nothing(data, digits_dir, quiet):
    def two_fits(between):
        set_seed(3)
        dls = get_dls(data, **(dict(path=digits_dir/'rgb', size=16, num_workers=0) if data == 'folder' else dict(limit=128)), bs=32)
        learn = quiet(clae_learner(dls, resnet8, attack='rfgsm', **({} if data == 'folder' else dict(views='digits'))))
        learn.fit(1, 1e-3)
        learn.model.train(); learn.model.head.eval() # any mode must come back
        before = state(learn)
        between(learn, dls)
        assert same(before, state(learn))
        learn.fit(1, 1e-3)
        return learn.recorder.losses,learn.recorder.values,state(learn)
    def check(learn, dls):
        evaluate(learn, dls, k=20)
        evaluate(learn, dls, 'authors', k=20, epochs=2)
    def with_callback(learn, dls): learn.add_cb(KNNCallback(k=20))
    plain,evaluated,watched = (two_fits(o) for o in (lambda learn, dls: None, check, with_callback))
    assert same(plain, evaluated)
    assert same(plain[0], watched[0]) and same(plain[2], watched[2]) and [v[:4] for v in plain[1]] == [v[:4] for v in watched[1]]

def test_the_callback_works_only_on_its_epochs(monkeypatch, quiet):
    import clae_fastai.measure.evaluate as ev
    calls,real = [],ev.extract_features
    monkeypatch.setattr(ev, 'extract_features', lambda learn, *args: calls.append(learn.epoch) or real(learn, *args))
    learn = quiet(clae_learner(get_dls('digits', bs=64, limit=64), resnet8, views='digits'))
    learn.fit(5, 1e-3, cbs=KNNCallback(every=2, k=5))
    assert calls == [1,1,3,3] and [v[4] == v[4] for v in learn.recorder.values] == [False,True,False,True,False]
    learn.fit(1)
    assert 'knn' not in learn.recorder.metric_names
    learn.add_cb(KNNCallback(k=5))
    learn.lr_find(num_it=20, show_plot=False) # an epoch each
    learn.validate()
    assert len(calls) == 4

# files

@pytest.fixture(scope='module')
def trained(digits_dir, tmp_path_factory):
    "A ResNet-18 after one epoch, and its file"
    dls = get_dls('folder', digits_dir/'rgb', bs=32, size=16, num_workers=0)
    learn = clae_learner(dls, resnet18)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn,dls,learn.export_encoder(tmp_path_factory.mktemp('run')/'encoder.safetensors')

def test_onnx_and_safetensors_give_the_live_features(trained, tmp_path):
    ort,onnx = pytest.importorskip('onnxruntime'),pytest.importorskip('onnx')
    learn,dls,f = trained
    live,_ = extract_features(learn, dls.valid)
    torch.testing.assert_close(extract_features(f, dls.valid)[0], live, rtol=0, atol=1e-4)
    for i,source in enumerate((learn, f)):
        out = export_onnx(source, tmp_path/f'{i}.onnx')
        session = ort.InferenceSession(out)
        x = torch.cat([learn.clae.normalize(b[0]) for b in dls.valid]).numpy()
        for n in (1, 7, len(x)): np.testing.assert_allclose(session.run(None, dict(images=x[:n]))[0], live[:n], rtol=0, atol=1e-4)
        meta = {o.key: o.value for o in onnx.load(out).metadata_props}
        assert meta['arch'] == 'resnet18' and json.loads(meta['mean']) == [.5,.5,.5]

def test_learner_and_file_evaluate_alike(trained):
    learn,dls,f = trained
    a,b = evaluate(learn, dls, k=20),evaluate(f, dls, k=20)
    assert (a.knn, a.result) == pytest.approx((b.knn, b.result), abs=.03) and a.n_classes == 10
    a,b = (evaluate(o, dls, 'authors', knn_on='h', k=20, epochs=2) for o in (learn, f))
    assert (a.knn, *a.probe.curve) == pytest.approx((b.knn, *b.probe.curve), abs=.03)

def test_transfer_runs_the_rest(trained, tmp_path):
    _,_,f = trained
    pets(tmp_path)
    t = transfer(f, ['flowers','pets'], tmp_path, download=False, k=3, solver='adam', epochs=2, bs=2, num_workers=0)
    assert list(t.missing) == ['flowers'] and list(t.results) == ['pets'] and 'missing' in str(t)
    assert t.results['pets'].probe.metric == 'mean_per_class' and t.results['pets'].n_train == 6 and json.loads(t.to_json())['results']['pets']['dataset'] == 'pets'

def test_transfer_keeps_what_it_has(trained, tmp_path):
    "A set that does not suit the encoder costs the others nothing"
    _,_,f = trained
    pets(tmp_path)
    t = transfer(f, ['pets','digits'], tmp_path, download=False, k=3, solver='adam', epochs=2, bs=2, num_workers=0)
    assert list(t.results) == ['pets'] and '3 channels' in t.missing['digits']
    with pytest.raises(ValueError, match='3 channels'): transfer(f, 'digits')
    with pytest.raises(ValueError, match='no protocol'): transfer(f, ['pets'], tmp_path, protocol='x')

def test_evaluate_a_plain_module():
    e = evaluate(nn.Flatten(), get_dls('digits', limit=100, bs=32, drop_last=False))
    assert e.settings['k'] == 100 and e.n_train == 100 and .5 < e.result < 1
    with pytest.raises(ValueError, match='no head'): evaluate(nn.Flatten(), get_dls('digits', limit=100), 'authors')

def test_evaluate_leaves_random_numbers_alone(trained):
    before = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    evaluate(nn.Flatten(), 'digits', solver='adam', epochs=1)
    assert (random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()) == before

def test_export_that_cannot_be_written(quiet, tmp_path):
    learn = clae_learner(get_dls('digits', bs=32, limit=64), resnet8, views='digits')
    with pytest.raises(OSError, match='nowhere'): learn.export_encoder(tmp_path/'nowhere'/'e.safetensors')

# bad input

def test_bad_features():
    (x,y),(tx,ty) = blobs(60, 5, 3),blobs(30, 5, 3, 1)
    bad = x.clone(); bad[[4,9]] = torch.nan; bad[11,2] = torch.inf
    use = dict(knn=lambda a, b: knn_predict(*a, b[0], 5), probe=linear_probe, few=lambda a, b: few_label_knn(*a, *b))
    for name,f in use.items():
        with pytest.raises(ValueError, match='3 of the 60 training features .* rows 4, 9, 11:'): f((bad,y), (tx,ty))
        with pytest.raises(ValueError, match='rows 4, 9, 11:'): f((x,y), (bad,y))
        with pytest.raises(ValueError, match='same encoder'): f((x,y), (tx[:,:3],ty))
        with pytest.raises(ValueError, match='60 training features and 59 labels'): f((x,y[1:]), (tx,ty))
        with pytest.raises(ValueError, match=r'\(N,F\)'): f((x[:0],y[:0]), (tx,ty))
        if name != 'knn':
            with pytest.raises(ValueError, match='not in the training set, those numbered 2:'): f((x[y<2],y[y<2]), (tx,ty))

@pytest.mark.parametrize('wrong,words', [(dict(solver='adam', epochs=0), 'epochs .* 0, 256'), (dict(solver='adam', bs=0), 'bs .* 0 and'), (dict(solver='adam', lr=0.), 'lr above 0'), (dict(solver='adam', lr=float('nan')), 'lr above 0'), (dict(l2s=[]), 'one penalty or more'), (dict(l2s=[1.,-1.]), '0 or above')])
def test_bad_probe_settings(wrong, words):
    with pytest.raises(ValueError, match=words): linear_probe(blobs(60, 5, 3), blobs(30, 5, 3, 1), **wrong)

def test_bad_data(trained, digits_dir):
    learn,dls,f = trained
    flat = get_dls('folder', digits_dir/'flat', bs=32, size=16, num_workers=0)
    with pytest.raises(ValueError, match='no labels'): evaluate(learn, DataLoaders(flat.train, flat.train), k=5)
    with pytest.raises(ValueError, match='empty'): evaluate(learn, flat, k=5)
    for o in (learn, f):
        with pytest.raises(ValueError, match='3 channels, and these have 1'): evaluate(o, 'digits')
    with pytest.raises(ValueError, match='labelled'): clae_learner(flat, resnet8, cbs=KNNCallback(k=5)).fit(1)

def test_a_file_of_another_architecture_names_the_keys(trained):
    _,_,f = trained
    with pytest.raises(ValueError, match='does not fit resnet34: it misses layer1.2.bn1.bias .* more'): load_encoder(f, 'resnet34')
    with pytest.raises(ValueError, match=r'has besides .*, has in another shape'): load_encoder(f, 'resnet20')

class Bomb:
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return open, (self.file, 'w')

def test_pickles_are_refused(tmp_path, command):
    f,out = tmp_path/'encoder.pth',tmp_path/'boom'
    torch.save(Bomb(out), f)
    (tmp_path/'encoder.pkl').write_bytes(pickle.dumps(Bomb(out)))
    for g in (f, tmp_path/'encoder.pkl'):
        for use in (evaluate, lambda g, data: extract_features(g, get_dls(data).valid)):
            with pytest.raises(ValueError, match='pickles .* not read'): use(g, 'digits')
        for args in ((clae_eval, g), (clae_export, g, '--out', 'x.safetensors')): assert 'pickles' in command(*args)
    assert not out.exists()

# commands

def test_eval_and_export_commands(cli):
    assert cli('clae_train', '--epochs', 1, '--limit', 128).returncode == 0
    run = cli.cwd/'runs'/'digits-simclr-1'
    for args in ([], ['--protocol', 'authors', '--knn_on', 'h', '--k', 5]):
        r = cli('clae_eval', 'digits-simclr-1', *args)
        assert r.returncode == 0 and 'linear probe' in r.stdout and '\r' not in r.stdout, r.stderr
    e = json.loads((run/'eval-digits-honest.json').read_text())
    assert e['settings']['k'] == 200 and e['n_test'] == 450 and e['result'] == e['probe']['final'] and 'torch' in e['versions']
    a = json.loads((run/'eval-digits-authors.json').read_text())
    assert a['result'] == a['probe']['best_on_test'] == max(a['probe']['curve']) and len(a['probe']['curve']) == 1000
    r = cli('clae_export', 'digits-simclr-1', '--format', 'onnx', '--out', 'e.onnx')
    assert r.returncode == 0 and (cli.cwd/'e.onnx').exists(), r.stderr
    r = cli('clae_export', run, '--format', 'safetensors', '--out', 'e.onnx')
    assert r.returncode == 2 and 'overwritten' in r.stderr and 'Traceback' not in r.stderr
    r = cli('clae_eval', 'digits-simclr-1', '--protocol', 'authors')
    assert r.returncode == 2 and 'no head' in r.stderr and '--knn_on h' in r.stderr and 'Traceback' not in r.stderr

@pytest.mark.slow
def test_photographs(cifar_dir, tmp_path):
    "On CIFAR-10 images even a little training beats chance, and the file agrees with the learner"
    dls = get_dls('folder', cifar_dir, bs=64, limit=1000, num_workers=0)
    learn = clae_learner(dls, 'resnet8')
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 3e-3)
    a,b = evaluate(learn, dls),evaluate(learn.export_encoder(tmp_path/'encoder.safetensors'), 'folder', path=cifar_dir, limit=1000, num_workers=0)
    assert a.knn > .15 and a.result > .2 and a.n_test == 2000
    assert (a.knn, a.result) == pytest.approx((b.knn, b.result), abs=.01)
