"fastai's interpretation of a classifier that was fine-tuned on our data sets agrees with scikit-learn."
import numpy as np
import pytest
from fastai.vision.all import ClassificationInterpretation, accuracy, set_seed
from sklearn.metrics import classification_report, confusion_matrix

from clae_fastai.all import clae_learner, encoder_learner, get_dls, resnet8

@pytest.fixture(scope='module', params=['memory','files'])
def classifier(request, digits_dir):
    set_seed(0)
    options = dict(bs=32, size=16) if request.param == 'memory' else dict(bs=32, size=72, num_workers=0)
    dls = get_dls(digits_dir/'grey', **options)
    learn = encoder_learner(dls, clae_learner(dls, resnet8), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn

def test_agrees_with_scikit_learn(classifier, capsys):
    with classifier.no_bar():
        interp = ClassificationInterpretation.from_learner(classifier)
        preds,targs = classifier.get_preds()
        found = preds.argmax(1)
        matrix = interp.confusion_matrix()
        assert matrix.shape == (10,10) and (matrix == confusion_matrix(targs, found, labels=range(10))).all()
        off = matrix - np.diag(np.diag(matrix))
        confused = interp.most_confused()
        assert sum(n for _,_,n in confused) == off.sum() and confused[0][2] == off.max()
        assert all(off[int(a),int(b)] == n for a,b,n in confused)
        capsys.readouterr()
        interp.print_classification_report()
        names = [str(o) for o in range(10)]
        assert (capsys.readouterr().out.strip() ==
                classification_report(targs, found, labels=range(10), target_names=names).strip())

def test_top_losses(classifier):
    with classifier.no_bar():
        interp = ClassificationInterpretation.from_learner(classifier)
        losses,idx,items = interp.top_losses(3, items=True)
        dataset = classifier.dls.valid_ds
        assert [o.label for o in items] == [dataset.vocab[int(dataset.labels[i])] for i in idx]
        assert losses[0] == interp.losses.max()
        inps,preds,targs,_,again = interp[idx]
        assert (targs == dataset.labels[idx]).all() and (again == losses).all()
        loss = -preds.log().gather(1, targs[:,None]).flatten()
        np.testing.assert_allclose(loss, losses, rtol=1e-3)
        interp.plot_top_losses(3)
        interp.plot_confusion_matrix()
        interp.show_results([0,1])
