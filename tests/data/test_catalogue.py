"Every entry of the catalogue, from a tiny copy of its real layout; what is wrong with a data set is said."
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from fastai.data.external import fastai_cfg
from PIL import Image

from clae_fastai.all import MemoryDL, catalogue, datasets, get_dls

from layouts import aircraft, caltech101, cifar10, dtd, image, rng, tinyimagenet, writers

def test_every_entry_has_a_layout_here():
    assert set(catalogue) == {*writers, 'digits', 'folder'} == set(datasets().index)

def names_of(ds): return [ds.vocab[int(o[1])] for o in ds]

@pytest.mark.parametrize('name', writers)
def test_catalogue(tmp_path, name):
    want,entry,caches = writers[name](tmp_path),catalogue[name],[]
    in_memory = entry.size <= 64
    small = {} if in_memory else dict(size=24)
    for _ in range(2): # the second time from the cache, where there is one
        dls = get_dls(name, tmp_path, bs=2, download=False, num_workers=0, **small)
        assert names_of(dls.train_ds) == want['train'] and names_of(dls.valid_ds) == want['test']
        caches += [f.stat().st_ino for f in tmp_path.glob('*/.clae-images.safetensors')]
    assert len(caches) == 2*in_memory and len(set(caches)) == in_memory, 'the cache was written again'
    x,y = dls.one_batch()
    side = small.get('size', entry.size)
    assert x.shape == (2, 1 if name == 'fashion_mnist' else 3, side, side)
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert isinstance(dls.train, MemoryDL) == in_memory
    if in_memory:
        assert dls.train_ds.images.dtype == torch.uint8
        enlarged = get_dls(name, tmp_path, bs=2, size=80, download=False) # batch by batch
        assert enlarged.one_batch()[0].shape[2:] == (80,80) and enlarged.train_ds.images.shape[2:] != (80,80)
    # the set's own folder will do as well
    own = next(tmp_path.iterdir())
    if name != 'imagenet100':
        assert len(get_dls(name, own, bs=2, download=False, num_workers=0).valid_ds) == len(want['test'])

def test_cifar_pixels(tmp_path):
    "Images are where their labels are: the first red pixel of each tells its class"
    cifar10(tmp_path)
    dls = get_dls('cifar10', tmp_path, bs=4)
    for ds in (dls.train_ds, dls.valid_ds): assert torch.equal(ds.images[:,0,0,0].long(), ds.labels)
    for x,y in dls.train: assert ((x[:,0,0,0]*255).round().long() == y.as_subclass(torch.Tensor)).all()

def test_transfer_resize_is_torchvisions(tmp_path):
    aircraft(tmp_path)
    dls = get_dls('aircraft', tmp_path, bs=2, num_workers=0)
    tfm = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor()])
    for dl in (dls.train.new(shuffle=False), dls.valid):
        x,want = next(iter(dl))[0][0].as_subclass(torch.Tensor),tfm(Image.open(dl.dataset.images[0]))
        assert (x - want).abs().mean() < .01 # of noise: torchvision's middle is off by up to half a pixel of 224

def test_caltech_split_by_seed(tmp_path):
    caltech101(tmp_path)
    def files(seed):
        dls = get_dls('caltech101', tmp_path, bs=2, seed=seed, download=False)
        return list(dls.train_ds.images)
    assert files(1) == files(1) and set(files(1)) != set(files(2))

def test_real_photographs(cifar_dir, tmp_path):
    "The classes of a fifth of the images are their folders', from the catalogue, as a folder, and from the cache"
    by_pixels = {}
    for f in sorted(cifar_dir.glob('*/*/*.png'))[::5]:
        copy = tmp_path/f.relative_to(cifar_dir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(f, copy)
        by_pixels[np.array(Image.open(f)).transpose(2,0,1).tobytes()] = f.parent.name
    for name in ('cifar10','folder','cifar10'):
        dls = get_dls(name, tmp_path)
        assert (len(dls.train_ds), len(dls.valid_ds)) == (2000,400)
        for ds in (dls.train_ds, dls.valid_ds):
            assert all(by_pixels[x.numpy().tobytes()] == ds.vocab[y] for x,y in zip(ds.images, ds.labels))

# what can be wrong

def test_half_extracted(tmp_path):
    dtd(tmp_path)
    folder = tmp_path/'dtd'/'dtd'
    (folder/'images'/'banded'/'banded_val1.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='expected .*banded_val1.jpg.*robots.ox.ac.uk'):
        get_dls('dtd', tmp_path, download=False)
    (folder/'labels'/'val1.txt').unlink()
    with pytest.raises(FileNotFoundError, match='val1.txt.*robots.ox.ac.uk'): get_dls('dtd', tmp_path, download=False)

@pytest.mark.parametrize('name', writers)
def test_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f'{name}: expected {tmp_path}.*offered at http'):
        get_dls(name, tmp_path, download=False)

def test_a_download(tmp_path, monkeypatch):
    "Fetched where it is not there; a failure is told beside what is missing"
    def fetch_with(fetch): monkeypatch.setattr('torchvision.datasets.CIFAR10', lambda root, download: fetch(root))
    def _fail(root): raise OSError('no network')
    fetch_with(_fail)
    with pytest.raises(FileNotFoundError, match=r'not there.*failed \(OSError: no network\).*cs.toronto.edu'):
        get_dls('cifar10', tmp_path/'new', bs=2)
    fetch_with(lambda root: None)
    with pytest.raises(FileNotFoundError, match='expected.*not there'): get_dls('cifar10', tmp_path/'new', bs=2)
    fetch_with(cifar10)
    assert len(get_dls('cifar10', tmp_path/'new', bs=2).train_ds) == 20
    fetch_with(_fail)
    assert len(get_dls('cifar10', tmp_path/'new', bs=2).train_ds) == 20

def test_one_process_downloads(tmp_path):
    "The second begins while the first one's archive is half there, waits, and fetches nothing"
    code = f"""if 1:
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torchvision
        from clae_fastai.data.catalogue import get_dls
        from layouts import cifar10
        def fetch(root, download):
            (folder := root/'cifar-10-batches-py').mkdir()
            (folder/'data_batch_1').write_bytes(b'half of it')
            print('fetching', flush=True)
            sys.stdin.readline()
            (folder/'data_batch_1').unlink()
            folder.rmdir()
            cifar10(root)
        torchvision.datasets.CIFAR10 = fetch
        print('ready', flush=True)
        sys.stdin.readline()
        print(len(get_dls('cifar10', {str(tmp_path/'new')!r}, bs=2).train_ds))
    """
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    a,b = (subprocess.Popen([sys.executable, '-c', code], **pipes) for _ in range(2))
    def go(p): print(file=p.stdin, flush=True)
    for p in (a,b): assert p.stdout.readline() == 'ready\n', p.stderr.read()
    go(a)
    assert a.stdout.readline() == 'fetching\n'
    go(b)
    with pytest.raises(subprocess.TimeoutExpired): b.wait(1.5) # it neither fails nor fetches
    go(a)
    for p in (a,b):
        out,err = p.communicate(timeout=60)
        assert (p.returncode, out) == (0,'20\n'), err

@pytest.mark.parametrize('name', ['tinyimagenet','imagenet100'])
def test_path_is_needed(tmp_path, name):
    with pytest.raises(ValueError, match='not downloaded.*http'): get_dls(name)
    with pytest.raises(FileNotFoundError, match=r'not there \([^.]*\)\. The data set .*http'): get_dls(name, tmp_path)

def test_classes_only_in_test(tmp_path):
    for f in ('train/a/1.png','train/b/1.png','test/c/1.png'): image(tmp_path/f, 1, (32,32))
    with pytest.raises(ValueError, match='test has classes that .*train has not: c'): get_dls('cifar10', tmp_path)

def test_torn_files(tmp_path):
    cifar10(tmp_path)
    f = tmp_path/'cifar-10-batches-py'/'data_batch_3'
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot be read.*Extract it again'): get_dls('cifar10', tmp_path, bs=2)

class Bomb:
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return open, (self.file, 'w')

def test_a_pickle_bomb_is_not_executed(tmp_path):
    cifar10(tmp_path)
    folder,boom = tmp_path/'cifar-10-batches-py',tmp_path/'boom'
    for name in ('data_batch_1','batches.meta','.clae-images.safetensors'):
        (folder/name).write_bytes(pickle.dumps({'data': Bomb(boom)}))
        with pytest.raises(ValueError, match='no data file needs'): get_dls('cifar10', tmp_path, bs=2)
    assert not boom.exists()
    pickle.loads((folder/'data_batch_1').read_bytes())['data'].close()
    assert boom.exists(), 'the bomb is none'

@pytest.mark.parametrize('cut', ['header','pixels'])
@pytest.mark.parametrize('write,file', [(tinyimagenet, 'tiny-imagenet-200/val/images/val_3.JPEG'),
                                        (dtd, 'dtd/dtd/images/banded/banded_val1.jpg')])
def test_corrupt_image_is_named(tmp_path, write, file, cut):
    "Truncated in its header or its pixels, before any training"
    write(tmp_path)
    f = tmp_path/file
    f.write_bytes(f.read_bytes()[:-600] if cut == 'pixels' else b'no image')
    with pytest.raises(ValueError, match=f.name): get_dls(write.__name__, tmp_path, bs=2, download=False)

@pytest.mark.slow
@pytest.mark.parametrize('cached', [False,True])
def test_memory_of_cifar10(tmp_path, cached):
    "50,000 training and 10,000 test images peak below 2.5 times the training images' uint8 size"
    folder = tmp_path/'cifar-10-batches-py'
    folder.mkdir()
    for batch in [f'data_batch_{i}' for i in range(1,6)] + ['test_batch']:
        x = rng.integers(0, 256, (10000,3072), dtype=np.uint8)
        (folder/batch).write_bytes(pickle.dumps({'data': x, 'labels': [0]*10000}, protocol=2))
    (folder/'batches.meta').write_bytes(pickle.dumps({'label_names': ['a']}, protocol=2))
    if cached: get_dls('cifar10', tmp_path)
    def _peak(what):
        code = ("import resource; from clae_fastai.all import *; d = get_dls('digits'); "
                f"{what}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
        return int(out.split()[-1])*1024
    extra = _peak(f"d = get_dls('cifar10', {str(tmp_path)!r}); d.one_batch()") - _peak('d.one_batch()')
    assert extra < 2.5*50000*3072, f'{extra/50000/3072:.2f} times'

def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match='no data set'): get_dls(get_dls('digits'))
    with pytest.raises(ValueError, match='channels is for folders'): get_dls('digits', channels=3)

@pytest.mark.parametrize('state', ['half written','a file'])
def test_a_home_without_settings(tmp_path, monkeypatch, state):
    "Another process may be writing fastai's `config.ini` just now, or nobody can: digits need none, others say where"
    home = tmp_path/'home'
    if state == 'a file': home.touch() # it cannot be written to, whoever asks
    else:
        home.mkdir()
        (home/'config.ini').touch()
    monkeypatch.setenv('FASTAI_HOME', str(home))
    fastai_cfg.cache_clear()
    try:
        assert get_dls('digits', bs=32).train.n == 1347
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(home/'data'))):
            get_dls('cifar10', download=False)
    finally: fastai_cfg.cache_clear()
