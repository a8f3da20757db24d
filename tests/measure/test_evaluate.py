"`evaluate`, `transfer` and their commands: no trace left behind, and files that give the live features."
import json
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clae_fastai.all import (DataLoaders, KNNCallback, clae_learner, evaluate, export_onnx, extract_features, get_dls,
                             load_encoder, resnet8, resnet20, set_seed, transfer)
from clae_fastai.cli import clae_eval, clae_export

# evaluating changes nothing

def random_states(): return [random.getstate(), np.random.get_state(), torch.get_rng_state()]

def state(learn):
    "Everything that training depends on"
    tensors = [*learn.model.state_dict().values(), *(v for s in learn.opt.state.values() for v in s.values())]
    tensors = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    return tensors,random_states(),learn.dls.train.rng.getstate(),[m.training for m in learn.model.modules()]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return len(a) == len(b) and all(same(x, y) for x,y in zip(a, b)) if isinstance(a, (list,tuple)) else a == b

def evaluate_twice(learn, dls):
    evaluate(learn, dls, k=20)
    evaluate(learn, dls, 'authors', k=20, epochs=2)

def watch(learn, dls): learn.add_cb(KNNCallback(k=20))

def nothing(learn, dls): pass

@pytest.mark.parametrize('data', ['digits','folder'])
def test_evaluating_changes_nothing(data, digits_dir, quiet):
    options = dict(path=digits_dir/'rgb', size=16, num_workers=0) if data == 'folder' else {}
    def two_fits(between):
        set_seed(3)
        dls = get_dls(data, limit=64, bs=32, **options)
        learn = quiet(clae_learner(dls, resnet8, attack='rfgsm', views='digits' if data == 'digits' else None))
        learn.fit(1, 1e-3)
        learn.model.train(); learn.model.head.eval() # any mode must come back
        before = state(learn)
        between(learn, dls)
        assert same(before, state(learn))
        learn.fit(1, 1e-3)
        return learn.recorder.losses,learn.recorder.values,state(learn)
    plain,evaluated,watched = map(two_fits, (nothing,evaluate_twice,watch))
    assert same(plain, evaluated)
    assert same(plain[0], watched[0]) and same(plain[2], watched[2])
    assert [v[:4] for v in plain[1]] == [v[:4] for v in watched[1]]

def test_evaluate_leaves_random_numbers_alone():
    before = random_states()
    evaluate(nn.Flatten(), 'digits', solver='adam', epochs=1, limit=100)
    assert same(random_states(), before)

def test_evaluate_a_plain_module():
    e = evaluate(nn.Flatten(), get_dls('digits', limit=100, bs=32, drop_last=False))
    assert e.settings['k'] == 100 and e.n_train == 100 and .5 < e.result < 1
    with pytest.raises(ValueError, match='no head'): evaluate(nn.Flatten(), get_dls('digits', limit=100), 'authors')

# files

def test_onnx_and_safetensors_give_the_live_features(trained, tmp_path):
    ort,onnx = pytest.importorskip('onnxruntime'),pytest.importorskip('onnx')
    learn,dls,f = trained
    live,_ = extract_features(learn, dls.valid)
    torch.testing.assert_close(extract_features(f, dls.valid)[0], live, rtol=0, atol=1e-4)
    x = torch.cat([learn.clae.normalize(b[0]) for b in dls.valid]).numpy()
    for i,source in enumerate((learn, f)):
        out = export_onnx(source, tmp_path/f'{i}.onnx')
        session = ort.InferenceSession(out)
        for n in (1, 7, len(x)):
            np.testing.assert_allclose(session.run(None, dict(images=x[:n]))[0], live[:n], rtol=0, atol=1e-4)
        meta = {o.key: o.value for o in onnx.load(out).metadata_props}
        assert meta['arch'] == 'resnet8' and json.loads(meta['mean']) == [.5,.5,.5]

def test_learner_and_file_evaluate_alike(trained):
    learn,dls,f = trained
    a,b = evaluate(learn, dls, k=20),evaluate(f, dls, k=20)
    assert (a.knn, a.result) == pytest.approx((b.knn, b.result), abs=.03) and a.n_classes == 10
    a,b = (evaluate(model, dls, 'authors', knn_on='h', k=20, epochs=2) for model in (learn, f))
    assert (a.knn, *a.probe.curve) == pytest.approx((b.knn, *b.probe.curve), abs=.03)

@pytest.fixture
def pets(tmp_path):
    "The layout of Oxford Pets, with two breeds"
    folder = tmp_path/'oxford-iiit-pet'
    for sub in ('images','annotations'): (folder/sub).mkdir(parents=True)
    for part,start in (('trainval',0), ('test',3)):
        names = [(f'{breed}_{i}',c)
                 for c,breed in enumerate(['Abyssinian','american_bulldog'], 1) for i in range(start, start+3)]
        (folder/'annotations'/f'{part}.txt').write_text(''.join(f'{name} {c} {c} 1\n' for name,c in names))
        for name,c in names: Image.new('RGB', (40,30), (60*c,0,10*c)).save(folder/'images'/f'{name}.jpg')
    return tmp_path

def test_transfer_runs_the_rest(trained, pets):
    "A set that is not there, or does not suit the encoder, costs the others nothing"
    _,_,f = trained
    t = transfer(f, ['flowers','pets','digits'], pets,
        download=False, k=3, solver='adam', epochs=2, bs=2, num_workers=0)
    assert list(t.missing) == ['flowers','digits'] and list(t.results) == ['pets'] and 'missing' in str(t)
    assert '3 channels' in t.missing['digits']
    assert t.results['pets'].probe.metric == 'mean_per_class' and t.results['pets'].n_train == 6
    assert json.loads(t.to_json())['results']['pets']['dataset'] == 'pets'
    with pytest.raises(ValueError, match='3 channels'): transfer(f, 'digits')
    with pytest.raises(ValueError, match='no protocol'): transfer(f, ['pets'], pets, protocol='x')
    with pytest.raises(ValueError, match="no data set 'pet'"): transfer(f, ['pets','pet'], pets)

def test_export_that_cannot_be_written(trained, tmp_path):
    with pytest.raises(OSError, match='nowhere'): trained[0].export_encoder(tmp_path/'nowhere'/'e.safetensors')

# bad input

def test_bad_data(trained, digits_dir):
    learn,dls,f = trained
    flat = get_dls('folder', digits_dir/'flat', bs=32, size=16, num_workers=0)
    with pytest.raises(ValueError, match='no labels'): evaluate(learn, DataLoaders(flat.train, flat.train), k=5)
    with pytest.raises(ValueError, match='no labels'): evaluate(learn, flat, k=5)
    for model in (learn, f):
        with pytest.raises(ValueError, match='3 channels, and these have 1'): evaluate(model, 'digits')
    with pytest.raises(ValueError, match='labelled'): clae_learner(flat, resnet8, cbs=KNNCallback(k=5)).fit(1)

def test_a_file_of_another_architecture_names_the_keys(trained, tmp_path):
    _,dls,f = trained
    with pytest.raises(ValueError, match='does not fit resnet34: it misses layer1.1.bn1.bias .* more, '
                                         'has in another shape bn1.bias'):
        load_encoder(f, 'resnet34')
    deeper = clae_learner(dls, resnet20).export_encoder(tmp_path/'e.safetensors')
    with pytest.raises(ValueError, match='does not fit resnet8: it has besides layer1.1.bn1.bias .* more'):
        load_encoder(deeper, 'resnet8')

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

def test_eval_and_export_commands(tmp_path, cli, command):
    def succeed(name, *args):
        res = cli(name, *args)
        assert not res.returncode, res.stderr
        return res.stdout
    succeed('clae_train', '--epochs', 1, '--limit', 128)
    run = tmp_path/'runs'/'digits-simclr-1'
    for args in ([], ['--protocol', 'authors', '--knn-on', 'h', '--k', 5]):
        out = succeed('clae_eval', 'digits-simclr-1', *args)
        assert 'linear probe' in out and '\r' not in out
    e = json.loads((run/'eval-digits-honest.json').read_text())
    assert (e['settings']['k'] == 200 and e['n_test'] == 450 and e['result'] == e['probe']['final'] and
            'torch' in e['versions'])
    a = json.loads((run/'eval-digits-authors.json').read_text())
    assert a['result'] == a['probe']['best_on_test'] == max(a['probe']['curve']) and len(a['probe']['curve']) == 1000
    succeed('clae_export', 'digits-simclr-1', '--format', 'onnx', '--out', 'e.onnx')
    assert (tmp_path/'e.onnx').exists()
    assert 'overwritten' in command(clae_export, run, '--format', 'safetensors', '--out', 'e.onnx')
    message = command(clae_eval, 'digits-simclr-1', '--protocol', 'authors')
    assert 'no head' in message and '--knn-on h --probe-on h' in message

@pytest.mark.slow
def test_photographs(cifar_dir, tmp_path):
    "On CIFAR-10 images even a little training beats chance, and the file agrees with the learner"
    options = dict(path=cifar_dir, limit=1000, num_workers=0)
    learn = clae_learner(get_dls('folder', bs=64, **options), 'resnet8')
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 3e-3)
    a,b = evaluate(learn, learn.dls),evaluate(learn.export_encoder(tmp_path/'encoder.safetensors'), 'folder', **options)
    assert a.knn > .15 and a.result > .2 and a.n_test == 2000
    assert (a.knn, a.result) == pytest.approx((b.knn, b.result), abs=.01)
