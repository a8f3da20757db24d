"What TensorBoard and Weights & Biases get of a contrastive training, and `show_results`."
import pytest
import torch
from fastai.vision.all import DataLoader, DataLoaders, Learner, MSELossFlat, nn, noop

from clae_fastai.all import CollapseMonitor, KNNCallback, MemoryImages, clae_learner, memory_dls, resnet8

def learner(quiet, path, labels=True, n_valid=8, **kwargs):
    x = torch.randint(256, (32,3,16,16), dtype=torch.uint8)
    images = MemoryImages(x, torch.arange(32)%2 if labels else None, ['a','b'] if labels else ())
    return quiet(clae_learner(memory_dls(images, images.take(slice(0,n_valid)), bs=8, path=path), resnet8, **kwargs))

def logged(folder):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    acc = events.EventAccumulator(str(folder)).Reload()
    return ({tag: [o.step for o in acc.Scalars(tag)] for tag in acc.Tags()['scalars']},
            {t: len(acc.Images(t)) for t in acc.Tags()['images']})

@pytest.mark.parametrize('labels', [True,False])
@pytest.mark.parametrize('n_valid', [0,8])
def test_tensorboard(labels, n_valid, quiet, tmp_path):
    tensorboard = pytest.importorskip('fastai.callback.tensorboard')
    cb = tensorboard.TensorBoardCallback(log_dir=tmp_path/'log')
    learner(quiet, tmp_path, labels, n_valid).fit(2, 1e-3,
        cbs=[cb, *([KNNCallback()] if labels and n_valid else []), CollapseMonitor()])
    scalars,images = logged(tmp_path/'log')
    columns = {'loss_aug','loss_adv',*CollapseMonitor.names} | {'valid_loss'}
    if not n_valid: columns -= {'valid_loss','rankme'}
    if labels and n_valid: columns.add('knn')
    assert {k for k,steps in scalars.items() if steps == [4,8]} == columns # at the end of each epoch
    assert {'train_loss','lr_0'} <= scalars.keys() and images == {'views': 2}

def test_training_is_the_same(quiet, tmp_path):
    "Whoever looks on"
    tensorboard = pytest.importorskip('fastai.callback.tensorboard')
    def weights(*cbs):
        torch.manual_seed(0)
        learn = learner(quiet, tmp_path, views='digits')
        learn.dls.train.rng.seed(0)
        learn.fit(2, 1e-3, cbs=cbs)
        return learn.model.state_dict()
    a,b = weights(),weights(tensorboard.TensorBoardCallback(log_dir=tmp_path/'log'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_others_log_as_before(quiet, tmp_path):
    "Nothing but the callback in a learner of ours is changed"
    tensorboard = pytest.importorskip('fastai.callback.tensorboard')
    tb = tensorboard.TensorBoardCallback
    learner(quiet, tmp_path).fit(1, cbs=tb(log_dir=tmp_path/'a'))
    assert tb().log_preds and tb().trace_model and tb.after_epoch is not noop
    loader = DataLoader([(torch.rand(3),torch.rand(1))]*8, bs=4)
    other = quiet(Learner(DataLoaders(loader, loader), nn.Linear(3, 1), MSELossFlat(), path=tmp_path))
    other.fit(1, cbs=tb(log_dir=tmp_path/'b', trace_model=False, log_preds=False))
    scalars,images = logged(tmp_path/'b')
    assert 'valid_loss' in scalars and not images

@pytest.mark.parametrize('labels', [True,False])
def test_wandb(labels, quiet, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback
    monkeypatch.chdir(tmp_path)
    rows,run = {},wandb.init(mode='offline', project='p', dir=tmp_path, settings=wandb.Settings(silent=True))
    log = wandb.log # of this run
    def _log(values, *args, **kwargs):
        for k,v in values.items(): rows.setdefault(k, []).append(v)
        log(values, *args, **kwargs)
    monkeypatch.setattr(wandb, 'log', _log)
    try: learner(quiet, tmp_path, labels, 8 if labels else 0).fit(2, 1e-3, cbs=WandbCallback())
    finally: run.finish()
    counts = dict(views=2, loss_aug=2, loss_adv=2, lr_0=8)
    assert {k: len(rows[k]) for k in counts} == counts
    assert type(rows['views'][0]) is wandb.Image
    assert 'WandbCallback' not in capsys.readouterr().out

def test_show_results(quiet, tmp_path):
    learn = learner(quiet, tmp_path)
    fig = learn.show_results(max_n=2)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert titles == ['original','view A','view B','adversary','change'] and len(fig.axes) == 10
    assert len(learn.show_results(ds_idx=1, max_n=3).axes) == 15
    assert len(learn.show_results(dl=learn.dls.valid, max_n=1).axes) == 5
    unlabelled = learner(quiet, tmp_path, False, 0, eps=0)
    assert len(unlabelled.show_results(max_n=2).axes) == 6
