"Watching changes nothing, and costs something only where it looks."
import clae_fastai.measure.monitors as monitors
from clae_fastai.data.catalogue import get_dls
from clae_fastai.measure.features import extract_features
from clae_fastai.measure.monitors import KNNCallback
from clae_fastai.method.models import resnet8
from clae_fastai.train.learner import clae_learner

def test_the_callback_works_only_on_its_epochs(monkeypatch, quiet):
    calls = []
    def counted(learn, *args, **kwargs):
        calls.append(learn.epoch)
        return extract_features(learn, *args, **kwargs)
    monkeypatch.setattr(monitors, 'extract_features', counted)
    learn = quiet(clae_learner(get_dls('digits', bs=64, limit=64), resnet8, views='digits'))
    learn.fit(4, 1e-3, cbs=KNNCallback(every=2, k=5))
    assert calls == [1,1,3,3] and [v[4] == v[4] for v in learn.recorder.values] == [False,True,False,True]
    learn.fit(1)
    assert 'knn' not in learn.recorder.metric_names
    learn.add_cb(KNNCallback(k=5))
    learn.lr_find(num_it=5, show_plot=False) # an epoch each
    learn.validate()
    assert len(calls) == 4
