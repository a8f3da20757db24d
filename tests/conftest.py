"What the tests share: small data, golden vectors, and real photographs where they are at hand."
import contextlib, os, shutil, subprocess, sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use('Agg')
# what is tested bit for bit is a processor's; `benchmarks/gpu.py` is what a GPU has to show
os.environ['CUDA_VISIBLE_DEVICES'] = ''
# two processes with all threads each are many times slower
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
here = Path(__file__).parent

def pytest_addoption(parser):
    parser.addoption('--leak-minutes', type=float, default=1,
        help='length of the leak test')
    parser.addoption('--moments', type=int, default=1,
        help='how often each of launcher, one process and both get a signal')
    parser.addini('newest', 'files, or tests of a file, that are marked `newest`', type='linelist')

def pytest_collection_modifyitems(config, items):
    newest = config.getini('newest')
    for o in items:
        name = o.nodeid.removeprefix('tests/').partition('[')[0]
        if name in newest or name.partition('::')[0] in newest: o.add_marker('newest')

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
def cli(tmp_path, monkeypatch, capsys):
    """One of our commands in this process, as the shell would call it in an empty folder:
    `cli('clae_train', '--epochs', 1)`"""
    from clae_fastai import cli
    def run(name, *args):
        monkeypatch.setenv('PYTHONWARNINGS', 'ignore') # for processes that it starts
        capsys.readouterr()
        code = 0
        with contextlib.chdir(tmp_path):
            try: getattr(cli, name).main([*map(str, args)])
            except SystemExit as e: code = e.code
        return subprocess.CompletedProcess([name, *args], code, *capsys.readouterr())
    run.cwd = tmp_path
    return run

def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in sorted(folder.rglob('*'))}

@pytest.fixture
def command(cli):
    "A command that fails as it should: `command(clae_train, '--eps', 'x')` returns its message"
    def _command(func, *args):
        before = tree(cli.cwd)
        r = cli(func.__name__, *args)
        assert r.returncode == 2 and 'Traceback' not in r.stderr and r.stderr.strip(), (r.returncode, r.stderr)
        *usage,message = r.stderr.strip().splitlines()
        prog = f'{func.__name__}: '
        assert message.startswith(prog) and not any(o.startswith(prog) for o in usage), r.stderr
        assert tree(cli.cwd) == before, 'something was written'
        return r.stderr
    return _command

@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    "Handwritten digits as image folders: grey/<class>/*.png, rgb/<class>/*.png and flat/*.png"
    from PIL import Image
    from sklearn.datasets import load_digits
    out,d = tmp_path_factory.mktemp('digits'),load_digits()
    for i,(x,y) in enumerate(zip(d.images[:240], d.target)):
        im = Image.fromarray((x*255/16).astype(np.uint8)).resize((16,16), Image.BILINEAR)
        for f,m in ((out/'grey'/str(y)/f'{i:03}.png','L'), (out/'rgb'/str(y)/f'{i:03}.png','RGB'),
                    (out/'flat'/f'{i:03}.png','RGB')):
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

@pytest.fixture(scope='module') # while it is open its thread has a running event loop
def browser():
    "Chromium, driven by Playwright; skipped where either is missing"
    sync = pytest.importorskip('playwright.sync_api', reason="needs pip install -e '.[dev]'")
    pytest.importorskip('yaml', reason="needs pip install -e '.[dev]'")
    if not any(map(shutil.which, ('chromium','chromium-browser','google-chrome'))):
        pytest.skip('no chromium on this machine')
    sys.path.insert(0, str(here.parent/'tools'))
    import docs
    with sync.sync_playwright() as play:
        b = docs.browser(play)
        yield b
        b.close()
