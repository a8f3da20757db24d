"`encoder_learner`: a normal fastai Learner on labelled images, with an encoder as its body."
import pytest
import torch
from fastai.vision.all import Normalize, PILImage, accuracy, get_image_files, load_learner, set_seed

from clae_fastai.all import clae_learner, encoder_learner, evaluate, extract_features, get_dls, resnet8, resnet18

@pytest.fixture(scope='module')
def dls(digits_dir): return get_dls('folder', digits_dir/'rgb', bs=32, size=16, num_workers=0)

@pytest.fixture(scope='module')
def pretrained(dls):
    set_seed(0)
    learn = clae_learner(dls, resnet8)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3)
    return learn

def convs(learn): return [m.weight.detach().clone() for m in learn.model[0].modules() if isinstance(m, torch.nn.Conv2d)]

def test_fine_tune_predict_and_lr_find(pretrained, dls, quiet, digits_dir, tmp_path):
    set_seed(1)
    learn = quiet(encoder_learner(dls, pretrained, metrics=accuracy, path=tmp_path))
    before = convs(learn)
    learn.fit_one_cycle(1, 3e-3)
    assert all(torch.equal(a, b) for a,b in zip(before, convs(learn))) # frozen
    learn.fine_tune(8, 3e-3)
    assert not any(torch.equal(a, b) for a,b in zip(before, convs(learn)))
    assert learn.recorder.values[-1][2] > .5
    file = get_image_files(digits_dir/'rgb'/'3')[0]
    label,i,p = learn.predict(file)
    assert label in dls.vocab and p.sum() == pytest.approx(1, abs=1e-5) and p.argmax() == i
    learn.lr_find(num_it=5, show_plot=False)
    learn.export('model.pkl')
    assert load_learner(tmp_path/'model.pkl').predict(file)[0] == label

def test_the_body_is_the_encoder(pretrained, dls, tmp_path):
    h,_ = extract_features(pretrained, dls.valid)
    file = pretrained.export_encoder(tmp_path/'encoder.safetensors')
    before = {k: v.clone() for k,v in pretrained.model.state_dict().items()}
    for source in (pretrained, file):
        learn = encoder_learner(dls, source)
        body,_ = extract_features(learn, learn.dls.valid)
        torch.testing.assert_close(body, h, rtol=0, atol=1e-5)
        assert [len(list(g)) for g in learn.splitter(learn.model)] == [len(list(m.parameters())) for m in learn.model]
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
        after = pretrained.model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before) # a copy was tuned

def test_the_callers_dls_is_not_changed(pretrained, dls):
    tfms = [list(dl.after_batch.fs) for dl in dls.loaders]
    learn = encoder_learner(dls, pretrained)
    assert ([list(dl.after_batch.fs) for dl in dls.loaders] == tfms and
            not any(isinstance(o, Normalize) for o in tfms[0]))
    assert [sum(isinstance(o, Normalize) for o in dl.after_batch.fs) for dl in learn.dls.loaders] == [1,1]

def test_the_model_takes_the_learners_batches(pretrained, dls, quiet):
    "As `vision_learner`'s does"
    learn = quiet(encoder_learner(dls, pretrained))
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad(): p = learn.model.eval()(x).softmax(1)
    torch.testing.assert_close(learn.get_preds()[0][:len(x)], torch.Tensor(p), rtol=0, atol=1e-5)

def normalised(digits_dir, mean):
    normalize = Normalize.from_stats([mean]*3, [.5]*3, cuda=False)
    return get_dls('folder', digits_dir/'rgb', bs=32, size=16, num_workers=0, batch_tfms=normalize)

def test_normalised_once(pretrained, dls, digits_dir, quiet, capsys):
    "As in training, or as the DataLoaders do; whichever loader comes later"
    capsys.readouterr()
    for mean,said in ((.5, False), (.2, True)):
        own = normalised(digits_dir, mean)
        learn = quiet(encoder_learner(own, pretrained))
        assert ('is kept' in capsys.readouterr().out) == said
        x = own.valid.one_batch()[0]
        with torch.no_grad(): expected = learn.model.eval()(x).softmax(1)
        for loader in (own,dls):
            p,_ = learn.get_preds(dl=loader.valid)
            torch.testing.assert_close(p[:len(x)], torch.Tensor(expected), rtol=0, atol=1e-4)

def test_any_loader_of_the_callers(pretrained, dls, digits_dir, quiet):
    "`dls.test_dl(files)` of the `dls` that were given, and of others"
    learn = quiet(encoder_learner(dls, pretrained, metrics=accuracy))
    learn.fine_tune(2, 3e-3)
    files = get_image_files(digits_dir/'rgb')[:20]
    p,_ = learn.get_preds(dl=learn.dls.test_dl(files))
    for other in (dls, normalised(digits_dir, .5), normalised(digits_dir, .2)):
        torch.testing.assert_close(learn.get_preds(dl=other.test_dl(files))[0], p, rtol=0, atol=1e-4)
    assert learn.validate(dl=dls.valid) == learn.validate()
    again = get_dls('folder', digits_dir/'rgb', bs=16, size=16, num_workers=0)
    learn.dls = again # as where memory is short
    torch.testing.assert_close(learn.get_preds(dl=again.test_dl(files))[0], p, rtol=0, atol=1e-5)

def test_features_of_a_classifier_are_its_bodys(pretrained, dls, quiet):
    learn = quiet(encoder_learner(dls, pretrained))
    h = extract_features(pretrained, dls.valid)[0]
    torch.testing.assert_close(extract_features(learn, dls.valid)[0], h, rtol=0, atol=1e-5)
    assert evaluate(learn, dls).knn == evaluate(pretrained, dls).knn

def test_all_predictions_of_a_shuffled_loader(quiet):
    few = get_dls('digits', limit=100, bs=32, drop_last=False)
    learn = quiet(encoder_learner(few, clae_learner(few, resnet8, views='digits')))
    p,y = learn.get_preds(dl=few.train)
    assert len(p) == len(y) == 100
    torch.testing.assert_close(p, learn.get_preds(dl=few.train.new(shuffle=False))[0])

@pytest.mark.parametrize('arch', [resnet18, 'mobilenet_v3_small', 'timm:convnext_atto'])
def test_any_architecture(arch, dls, quiet):
    if str(arch).startswith('timm:'):
        pytest.importorskip('timm')
        arch = arch[5:]
    small = get_dls('folder', dls.path, bs=16, size=32, limit=32, num_workers=0)
    learn = quiet(encoder_learner(small, clae_learner(small, arch)))
    learn.unfreeze()
    learn.fit(1)
    assert learn.predict(PILImage.create(get_image_files(dls.path)[0]))[2].shape == (10,)

def test_digits(quiet):
    dls = get_dls('digits', bs=64, limit=256)
    learn = quiet(encoder_learner(dls, clae_learner(dls, resnet8, views='digits'), metrics=accuracy))
    learn.fine_tune(1)
    assert learn.predict(dls.valid_ds[0][0])[2].shape == (10,)

def test_bad_input(pretrained, digits_dir, tmp_path):
    flat = get_dls('folder', digits_dir/'flat', bs=32, size=16, num_workers=0)
    with pytest.raises(ValueError, match='no classes'): encoder_learner(flat, pretrained)
    with pytest.raises(ValueError, match='3 channels, and these have 1'): encoder_learner(get_dls('digits'), pretrained)
    (tmp_path/'e.safetensors').write_bytes(b'\x80\x04K\x01.')
    with pytest.raises(ValueError, match='pickles'): encoder_learner(flat, tmp_path/'e.safetensors')
