"What the tests share: small data, golden vectors, and real photographs where they are at hand."
import os, subprocess, sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use('Agg')
# two processes with all threads each are many times slower
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
here = Path(__file__).parent

# Where a new version of fastai, fastcore or nbdev is felt first: files, or tests of a file. Marked here, so that it is one list
newest = """
    test_cli.py::test_runs_twice_and_leaves_the_run_folder
    test_nothing_patched.py
    method/test_golden.py
    method/test_method_matrix.py::test_two_steps_of_everything
    method/test_method_matrix.py::test_precision_is_what_it_says
    data/test_images.py::test_fastai_finds_what_it_expects
    train/test_learner.py::test_life_of_a_learner
    train/test_learner.py::test_predict
    train/test_learner.py::test_another_device_after_loading
    train/test_encoder_learner.py
    train/test_checkpoint.py::test_random_item_transforms
    train/test_checkpoint.py::test_optimisers
    train/test_checkpoint.py::test_float16_scaler
    measure/test_evaluate.py::test_the_callback_works_only_on_its_epochs
""".split()

def pytest_collection_modifyitems(items):
    for o in items:
        name = o.nodeid.removeprefix('tests/').partition('[')[0]
        if name in newest or name.partition('::')[0] in newest: o.add_marker('newest')

def pytest_addoption(parser): parser.addoption('--leak-minutes', type=float, default=1, help='length of the leak test')

@pytest.fixture(scope='session')
def golden(): return lambda name: np.load(here/'golden'/f'{name}.npz')

@pytest.fixture(scope='session')
def cifar_dir(tmp_path_factory):
    "10,000 training and 2,000 test images of CIFAR-10 as an image folder; skipped where the file is not at hand"
    data = here.parent.parent/'shared'/'data'
    if not (data/'cifar10_12k.npz').exists(): pytest.skip('the CIFAR-10 images are not here')
    out = tmp_path_factory.mktemp('cifar')
    subprocess.run([sys.executable, data/'unpack_cifar10.py', out], check=True)
    return out

@pytest.fixture
def cli(tmp_path):
    "Run one of our commands in an empty folder: `cli('clae_train', '--epochs', '1')`"
    def run(cmd, *args, timeout=900):
        exe = Path(sys.executable).with_name(cmd)
        env = {**os.environ, 'PYTHONWARNINGS': 'ignore'}
        return subprocess.run([exe, *map(str, args)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=env)
    run.cwd = tmp_path
    return run

def tree(folder): return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in sorted(folder.rglob('*'))}

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A command in this process, as the shell would call it: `command(clae_train, '--eps', 'x')` asserts that it fails as it
    should, and returns the message"""
    def _command(func, *args):
        monkeypatch.setattr(sys, 'argv', [func.__name__, *map(str, args)])
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        with pytest.raises(SystemExit) as e: func()
        out,err = capsys.readouterr()
        assert e.value.code == 2 and 'Traceback' not in err and err.strip(), (e.value.code, err)
        lines = err.strip().splitlines()
        assert [o.startswith(f'{func.__name__}: ') for o in lines] == [False]*(len(lines)-1) + [True], err
        assert tree(tmp_path) == before, 'something was written'
        return err
    return _command

@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    "Handwritten digits as image folders: grey/<class>/*.png, rgb/<class>/*.png and flat/*.png"
    from PIL import Image
    from sklearn.datasets import load_digits
    out,d = tmp_path_factory.mktemp('digits'),load_digits()
    for i,(x,y) in enumerate(zip(d.images[:240], d.target)):
        im = Image.fromarray((x*255/16).astype(np.uint8)).resize((16,16), Image.BILINEAR)
        for f,m in ((out/'grey'/str(y)/f'{i:03}.png','L'), (out/'rgb'/str(y)/f'{i:03}.png','RGB'), (out/'flat'/f'{i:03}.png','RGB')):
            f.parent.mkdir(parents=True, exist_ok=True)
            im.convert(m).save(f)
    return out

@pytest.fixture
def quiet():
    "A learner without progress bar and log"
    def _quiet(learn):
        from fastai.vision.all import ProgressCallback, noop
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    return _quiet
