"Every entry of the catalogue, from a tiny copy of its real layout; images in memory; what is wrong with a data set is said."
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from fastai.vision.all import RandTransform, TensorImageBase
from safetensors import SafetensorError

from clae_fastai.all import MemoryDL, Normalize, TensorCategory, accuracy, catalogue, check_images, clae_learner, datasets, extract_features, get_dls, get_image_files, load_learner, resnet8, resnet18, vision_learner

rng = np.random.default_rng(0)

def image(f, seed, size=(40,30), mode='RGB'):
    "An image file whose upper left pixel tells which it is"
    f.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(x).convert(mode).save(f)

def text(f, lines):
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_text('\n'.join(lines) + '\n')

def struct(rows, names): return np.array([tuple(r) for r in rows], dtype=[(n, object) for n in names])

# each writer makes the layout below `root` and returns {split: {file or index: class name}}

def cifar10(root):
    d,out,k = root/'cifar-10-batches-py',{'train': [], 'test': []},0
    d.mkdir()
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    for b in [f'data_batch_{i}' for i in range(1,6)] + ['test_batch']:
        y = [(k+i)%10 for i in range(4)]
        x = rng.integers(0, 256, (4,3072), dtype=np.uint8)
        x[:,0] = y; k += 4
        (d/b).write_bytes(pickle.dumps({'data': x, 'labels': y, 'batch_label': b, 'filenames': ['a.png']*4}, protocol=2))
        out['test' if b == 'test_batch' else 'train'] += [names[i] for i in y]
    (d/'batches.meta').write_bytes(pickle.dumps({'label_names': names, 'num_cases_per_batch': 4}, protocol=2))
    return out

def cifar100(root):
    d,out = root/'cifar-100-python',{}
    d.mkdir()
    names = [f'class{i:02}' for i in range(100)]
    for split,n in (('train',12),('test',5)):
        y = rng.integers(0, 100, n).tolist()
        (d/split).write_bytes(pickle.dumps({'data': rng.integers(0, 256, (n,3072), dtype=np.uint8), 'fine_labels': y, 'coarse_labels': [0]*n}, protocol=2))
        out[split] = [names[i] for i in y]
    (d/'meta').write_bytes(pickle.dumps({'fine_label_names': names, 'coarse_label_names': ['all']}, protocol=2))
    return out

def fashion_mnist(root):
    d,out,names = root/'FashionMNIST'/'raw',{},["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    d.mkdir(parents=True)
    for split,name,n in (('train','train',9),('test','t10k',4)):
        x,y = rng.integers(0, 256, (n,28,28), dtype=np.uint8),rng.integers(0, 10, n, dtype=np.uint8)
        (d/f'{name}-images-idx3-ubyte').write_bytes(np.array([2051,n,28,28], dtype='>i4').tobytes() + x.tobytes())
        (d/f'{name}-labels-idx1-ubyte').write_bytes(np.array([2049,n], dtype='>i4').tobytes() + y.tobytes())
        out[split] = [names[i] for i in y]
    return out

def tinyimagenet(root):
    d,wnids,out = root/'tiny-imagenet-200',['n01443537','n01629819','n01641577'],{'train': [], 'test': []}
    for w in wnids:
        for i in range(3): image(d/'train'/w/'images'/f'{w}_{i}.JPEG', i, (64,64), 'L' if i == 2 else 'RGB'); out['train'].append(w)
        text(d/'train'/w/f'{w}_boxes.txt', ['x'])
    rows = []
    for i in range(5):
        image(d/'val'/'images'/f'val_{i}.JPEG', 50+i, (64,64))
        rows.append(f'val_{i}.JPEG\t{wnids[(2*i)%3]}\t0\t32\t44\t62'); out['test'].append(wnids[(2*i)%3])
    text(d/'val'/'val_annotations.txt', rows); text(d/'wnids.txt', wnids); text(d/'words.txt', ['n01443537\tgoldfish'])
    for i in range(2): image(d/'test'/'images'/f'test_{i}.JPEG', i, (64,64))
    return out

def imagenet100(root):
    wnids,out = sorted(Path(sys.modules['clae_fastai'].__file__).with_name('imagenet100.txt').read_text().split()),{'train': [], 'test': []}
    assert len(set(wnids)) == 100
    for w in [*wnids, 'n99999999']: # another class of ImageNet's thousand
        image(root/'train'/w/f'{w}_1.JPEG', 1); image(root/'val'/w/'ILSVRC2012_val_1.JPEG', 2)
        if w != 'n99999999': out['train'].append(w); out['test'].append(w)
    return out

def cars(root):
    d,names,out = root/'stanford_cars',['AM General Hummer SUV 2000','Acura RL Sedan 2012'],{}
    (d/'devkit').mkdir(parents=True)
    scipy.io.savemat(d/'devkit'/'cars_meta.mat', {'class_names': np.array(names, dtype=object)})
    for split,folder,f in (('train','cars_train',d/'devkit'/'cars_train_annos.mat'),('test','cars_test',d/'cars_test_annos_withlabels.mat')):
        y = [1,2,2,1]
        for i in range(4): image(d/folder/f'{i+1:05}.jpg', i)
        scipy.io.savemat(f, {'annotations': struct([(1,1,9,9,y[i],f'{i+1:05}.jpg') for i in range(4)], ['bbox_x1','bbox_y1','bbox_x2','bbox_y2','class','fname'])})
        out[split] = [names[i-1] for i in y]
    return out

def aircraft(root):
    d,names,out = root/'fgvc-aircraft-2013b'/'data',['707-320','Boeing 717','DC-10'],{}
    text(d/'variants.txt', names)
    for k,(split,name) in enumerate((('train','trainval'),('test','test'))):
        y = [names[i%3] for i in range(5)]
        for i in range(5): image(d/'images'/f'{k}{i:05}.jpg', i)
        text(d/f'images_variant_{name}.txt', [f'{k}{i:05} {c}' for i,c in enumerate(y)]); out[split] = y
    return out

def dtd(root):
    d,names,out = root/'dtd'/'dtd',['banded','blotchy'],{'train': [], 'test': []}
    for part in ('train','val','test'):
        lines = [f'{c}/{c}_{part}{i}.jpg' for c in names for i in range(2)]
        for l in lines: image(d/'images'/l, 1)
        text(d/'labels'/f'{part}1.txt', lines); text(d/'labels'/f'{part}2.txt', ['other/partition.jpg'])
        out['test' if part == 'test' else 'train'] += [l.split('/')[0] for l in lines]
    return out

def pets(root):
    d,names,out = root/'oxford-iiit-pet',['Abyssinian','american_bulldog'],{}
    for split,name in (('train','trainval'),('test','test')):
        ids = [(f'{c}_{name}{i}'.replace(name, str(len(name))), n+1) for n,c in enumerate(names) for i in range(3)]
        for i,_ in ids: image(d/'images'/f'{i}.jpg', 1, mode='RGB')
        text(d/'annotations'/f'{name}.txt', [f'{i} {n} {n} 1' for i,n in ids]); out[split] = [names[n-1] for _,n in ids]
    return out

def flowers(root):
    d,labels = root/'flowers-102',np.array([77,77,1,1,102,102,77,1], dtype=np.uint8)
    for i in range(8): image(d/'jpg'/f'image_{i+1:05}.jpg', i)
    scipy.io.savemat(d/'imagelabels.mat', {'labels': labels[None]})
    scipy.io.savemat(d/'setid.mat', {'trnid': np.array([[1,3]]), 'valid': np.array([[5,2]]), 'tstid': np.array([[4,6,7,8]])})
    name = {77: 'passion flower', 1: 'pink primrose', 102: 'blackberry lily'}
    return {'train': [name[labels[i-1]] for i in (1,3,5,2)], 'test': [name[labels[i-1]] for i in (4,6,7,8)]}

def caltech101(root):
    out = {'train': [], 'test': []}
    for c,n in (('BACKGROUND_Google',33),('accordion',32),('airplanes',35)):
        for i in range(n): image(root/'caltech101'/'101_ObjectCategories'/c/f'image_{i+1:04}.jpg', i, (20,16), 'L' if i == 3 else 'RGB')
        out['train'] += [c]*30; out['test'] += [c]*(n-30)
    return out

writers = dict(fashion_mnist=fashion_mnist, cifar10=cifar10, cifar100=cifar100, tinyimagenet=tinyimagenet, imagenet100=imagenet100, cars=cars, aircraft=aircraft, dtd=dtd, pets=pets, flowers=flowers, caltech101=caltech101)

def test_every_entry_has_a_layout_here(): assert set(catalogue) == {*writers, 'digits', 'folder'} == set(datasets().index)

def names_of(ds): return [ds.vocab[int(y)] for y in ([o[1] for o in ds])]

@pytest.mark.parametrize('name', writers)
def test_catalogue(tmp_path, name):
    want = writers[name](tmp_path)
    small = {} if catalogue[name].memory else dict(size=24)
    for _ in range(2): # the second time from the cache, where there is one
        dls = get_dls(name, tmp_path, bs=2, download=False, num_workers=0, **small)
        assert names_of(dls.train_ds) == want['train'] and names_of(dls.valid_ds) == want['test']
    x,y = dls.one_batch()
    side = small.get('size', catalogue[name].size)
    assert x.shape == (2, 1 if name == 'fashion_mnist' else 3, side, side) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert isinstance(dls.train, MemoryDL) == catalogue[name].memory
    if catalogue[name].memory:
        assert dls.train_ds.images.dtype == torch.uint8
        up = get_dls(name, tmp_path, bs=2, size=80, download=False) # enlarged batch by batch
        assert up.one_batch()[0].shape[2:] == (80,80) and up.train_ds.images.shape[2:] != (80,80)
    # the set's own folder will do as well
    own = next(tmp_path.iterdir())
    if name != 'imagenet100': assert len(get_dls(name, own, bs=2, download=False, num_workers=0).valid_ds) == len(want['test'])

def test_cifar_pixels(tmp_path):
    "Images are where their labels are: the first red pixel of each tells its class"
    cifar10(tmp_path)
    dls = get_dls('cifar10', tmp_path, bs=4)
    for ds in (dls.train_ds, dls.valid_ds): assert torch.equal(ds.images[:,0,0,0].long(), ds.labels)
    for x,y in dls.train: assert ((x[:,0,0,0]*255).round().long() == y.as_subclass(torch.Tensor)).all()

def test_transfer_resize_is_torchvisions(tmp_path):
    import torchvision.transforms as T
    aircraft(tmp_path)
    dls = get_dls('aircraft', tmp_path, bs=2, num_workers=0)
    tfm = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor()])
    for dl in (dls.train.new(shuffle=False), dls.valid):
        f = dl.dataset.items[0].image
        torch.testing.assert_close(next(iter(dl))[0][0].as_subclass(torch.Tensor), tfm(Image.open(f)), rtol=0, atol=1e-6)

def test_caltech_split_by_seed(tmp_path):
    caltech101(tmp_path)
    files = lambda seed: [o.image for o in get_dls('caltech101', tmp_path, bs=2, seed=seed, download=False).train_ds.items]
    assert files(1) == files(1) and files(1) != files(2)

# real images, whichever loader is used

def test_real_photographs(cifar_dir):
    "The classes of all 12,000 images are their folders', from the catalogue, as a folder, and as files"
    by_pixels = {}
    for split in ('train','test'):
        for f in sorted((cifar_dir/split).glob('*/*.png')): by_pixels[np.array(Image.open(f)).transpose(2,0,1).tobytes()] = f.parent.name
    for dls in (get_dls('cifar10', cifar_dir), get_dls('folder', cifar_dir), get_dls('cifar10', cifar_dir)):
        assert (len(dls.train_ds), len(dls.valid_ds)) == (10000,2000)
        for ds in (dls.train_ds, dls.valid_ds):
            assert all(by_pixels[x.numpy().tobytes()] == ds.vocab[y] for x,y in zip(ds.images, ds.labels))

def test_fastai_finds_what_it_expects(tmp_path, quiet):
    dls = get_dls('digits', bs=64, limit=256)
    dls.show_batch(max_n=4); dls.show_batch(unique=True)
    learn = quiet(clae_learner(dls, resnet8, views='digits'))
    learn.fit(1); learn.validate(); learn.show_views(2)
    z,y = learn.get_preds()
    assert torch.equal(y.as_subclass(torch.Tensor), dls.valid_ds.labels)
    dls.add_tfms([Normalize.from_stats([.5],[.5], cuda=False)], 'after_batch')
    sup = quiet(vision_learner(dls, resnet18, n_in=1, pretrained=False, metrics=accuracy, normalize=False))
    sup.fit(1)
    sup.export(tmp_path/'x.pkl')
    assert (tmp_path/'x.pkl').stat().st_size < 60e6
    im = dls.valid_ds.images[0]
    name,i,p = sup.predict(im)
    assert name == dls.vocab[i] and quiet(load_learner(tmp_path/'x.pkl')).predict(Image.fromarray(im[0].numpy()))[0] == name
    assert isinstance(dls.one_batch()[1], TensorCategory)

# what can be wrong

def test_half_extracted(tmp_path):
    dtd(tmp_path)
    (tmp_path/'dtd'/'dtd'/'images'/'banded'/'banded_val1.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 listed images are missing.*robots.ox.ac.uk') as e: get_dls('dtd', tmp_path, download=False)
    assert 'banded_val1.jpg' in str(e.value)
    (tmp_path/'dtd'/'dtd'/'labels'/'val1.txt').unlink()
    with pytest.raises(FileNotFoundError, match=r'val1.txt.*robots.ox.ac.uk'): get_dls('dtd', tmp_path, download=False)

@pytest.mark.parametrize('name', [n for n in writers if n not in ('imagenet100','tinyimagenet')])
def test_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='offered at http'): get_dls(name, tmp_path, download=False)

@pytest.mark.parametrize('name', ['tinyimagenet','imagenet100'])
def test_path_is_needed(tmp_path, name):
    with pytest.raises(ValueError, match='not downloaded.*http'): get_dls(name)
    with pytest.raises(FileNotFoundError, match='http'): get_dls(name, tmp_path)

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
    for f in ('data_batch_1','batches.meta'):
        (tmp_path/'cifar-10-batches-py'/f).write_bytes(pickle.dumps({'data': Bomb(tmp_path/'boom')}))
        with pytest.raises(ValueError, match='no data file needs'): get_dls('cifar10', tmp_path, bs=2)
    (tmp_path/'cifar-10-batches-py'/'.clae-images.safetensors').write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
    with pytest.raises(ValueError, match='no data file needs'): get_dls('cifar10', tmp_path, bs=2)
    assert not (tmp_path/'boom').exists()

@pytest.mark.parametrize('cut', [5,600])
@pytest.mark.parametrize('write,name,file', [(tinyimagenet, 'tinyimagenet', 'tiny-imagenet-200/val/images/val_3.JPEG'), (dtd, 'dtd', 'dtd/dtd/images/banded/banded_val1.jpg')])
def test_corrupt_image_is_named(tmp_path, write, name, file, cut):
    "Truncated in its header or its pixels, before any training"
    write(tmp_path)
    f = tmp_path/file
    f.write_bytes(f.read_bytes()[:-cut] if cut > 5 else b'no image')
    with pytest.raises(ValueError, match=f.name): get_dls(name, tmp_path, bs=2, download=False)

@pytest.mark.slow
@pytest.mark.parametrize('cached', [False,True])
def test_memory_of_cifar10(tmp_path, cached):
    "50,000 training and 10,000 test images peak below 2.5 times the training images' uint8 size"
    d = tmp_path/'cifar-10-batches-py'
    d.mkdir()
    for b in [f'data_batch_{i}' for i in range(1,6)] + ['test_batch']:
        (d/b).write_bytes(pickle.dumps({'data': rng.integers(0, 256, (10000,3072), dtype=np.uint8), 'labels': [0]*10000}, protocol=2))
    (d/'batches.meta').write_bytes(pickle.dumps({'label_names': ['a']}, protocol=2))
    if cached: get_dls('cifar10', tmp_path)
    def _peak(what):
        code = f"import resource, sys; from clae_fastai.all import *; d = get_dls('digits'); {what}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        return int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()[-1])*1024
    extra = _peak(f"d = get_dls('cifar10', {str(tmp_path)!r}); d.one_batch()") - _peak('d.one_batch()')
    assert extra < 2.5*50000*3072, f'{extra/50000/3072:.2f} times'

def test_validation_sees_no_augmentation():
    "Images in memory: random transforms act in training and not in validation, wherever the images come from"
    class Shift(RandTransform):
        order = 20 # after the images have become floats
        def encodes(self, x:TensorImageBase): return x + 1.
    dls = get_dls('digits', bs=32, limit=128, batch_tfms=Shift())
    raw = get_dls('digits', bs=32, limit=128)
    assert dls.train.one_batch()[0].min() >= 1
    assert torch.equal(dls.valid.one_batch()[0], raw.valid.one_batch()[0])
    assert torch.equal(dls.test_dl([dls.valid_ds.images[0]]).one_batch()[0][0], raw.valid_ds.images[0]/255)
    model = torch.nn.Flatten()
    assert torch.equal(extract_features(model, dls.train)[0], extract_features(model, raw.train)[0])
    assert dls.train_ds.split_idx == 0 # as it was

@pytest.mark.parametrize('size', [48,128])
def test_sixteen_bit_images(tmp_path, size):
    for i in range(4):
        x = np.linspace(0, 65535, size*size).astype(np.uint16).reshape(size, size)
        Image.fromarray(x).save(tmp_path/f'{i}.png')
    x = get_dls(tmp_path, bs=2, size=size, num_workers=0).one_batch()[0]
    assert .48 < float(x.mean()) < .52 and float((x == 1).float().mean()) < .01

def test_a_lonely_image_is_for_training(tmp_path):
    "A class of one image cannot be tested on: no classifier could know it"
    for c,n in dict(a=12, b=12, c=1).items():
        for i in range(n): image(tmp_path/c/f'{i}.png', i, (32,32))
    for seed in range(12):
        dls = get_dls('folder', tmp_path, bs=4, seed=seed, num_workers=0)
        assert set(dls.valid_ds.labels.tolist()) <= set(dls.train_ds.labels.tolist()) and dls.train.n + dls.valid.n == 25

def test_a_cache_that_cannot_be_kept(tmp_path, capsys, monkeypatch):
    "As on a read-only disk"
    cifar10(tmp_path)
    def _refuse(*_, **__): raise SafetensorError('Read-only file system (os error 30)')
    monkeypatch.setattr('safetensors.torch.save_file', _refuse)
    assert len(get_dls('cifar10', tmp_path, bs=2, download=False).train_ds) == 20
    assert 'could not be kept' in capsys.readouterr().out

@pytest.fixture
def opened(monkeypatch):
    "Names of the images that PIL opens, as it does"
    names,open_ = [],Image.open
    def _open(f, *args, **kwargs):
        names.append(Path(f).name)
        return open_(f, *args, **kwargs)
    monkeypatch.setattr(Image, 'open', _open)
    return names

def check(folder, **kwargs): return check_images(get_image_files(folder).sorted(), root=folder, **kwargs)

def test_readable_images_are_remembered(tmp_path, opened):
    "Only what is new, has changed, or could not be read is decoded when a folder is used again"
    def decoded(**kwargs):
        opened.clear()
        files,modes,sizes = check(tmp_path, **kwargs)
        for f,m,s in zip(files, modes, sizes):
            with Image.open(f) as im: assert (im.mode,im.size) == (m,s)
        return sorted(opened[:-len(files)]),len(files)
    for i in range(6): image(tmp_path/f'{i}.png', i)
    assert decoded() == ([f'{i}.png' for i in range(6)], 6) and decoded() == ([], 6)
    image(tmp_path/'6.png', 6)
    image(tmp_path/'2.png', 7, (50,30))
    assert decoded() == (['2.png','6.png'], 7)
    (tmp_path/'3.png').write_bytes((tmp_path/'3.png').read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(ValueError, match='3.png'): decoded()
        assert opened == ['3.png']
    assert decoded(skip_bad=True) == (['3.png'], 6)
    (tmp_path/'3.png').unlink()
    assert decoded() == ([], 6) and sorted(json.loads((tmp_path/'.clae-checked.json').read_text())['images']) == [f'{i}.png' for i in (0,1,2,4,5,6)]

def test_what_a_folder_remembers(tmp_path, opened):
    "`get_dls` remembers training and test images, each in their folder, and a moved folder is known again"
    for p in ('train','test'):
        for c in 'ab':
            for i in range(4): image(tmp_path/'images'/p/c/f'{i}.png', i)
    get_dls(tmp_path/'images', bs=2, size=24, num_workers=0)
    moved = (tmp_path/'images').rename(tmp_path/'moved')
    opened.clear()
    for p in ('train','test'): assert len(check(moved/p)[0]) == 8
    assert not opened

@pytest.mark.parametrize('memo', [b'', b'\xff', b'[]', b'{}', b'[' * 100_000, b'{"format": "clae-checked-1", "images": [1]}', b'{"format": "clae-checked-1", "images": {"0.png": 1, "1.png": [1, 2, "RGB", -4, 5], "2.png": [1, 2, [], 4, 5]}}'])
def test_a_damaged_memory_is_none(tmp_path, opened, memo):
    for i in range(3): image(tmp_path/f'{i}.png', i)
    (tmp_path/'.clae-checked.json').write_bytes(memo)
    for _ in range(2): assert len(check(tmp_path)[0]) == len(opened) == 3

def test_a_memory_that_cannot_be_kept(tmp_path):
    for i in range(3): image(tmp_path/f'{i}.png', i)
    (tmp_path/'.clae-checked.json').mkdir() # not even root may replace a folder by a file
    for _ in range(2): assert get_dls(tmp_path, bs=2, size=24, num_workers=0).train.n == 3
    assert sorted(os.listdir(tmp_path)) == ['.clae-checked.json', '0.png', '1.png', '2.png']

def test_a_folder_by_itself(tmp_path):
    for i in range(6): image(tmp_path/f'{i}.png', i, (32,32))
    for o in (tmp_path, str(tmp_path)): assert get_dls(o, bs=2, num_workers=0).train.n == 6
    with pytest.raises(ValueError, match='nor such a folder'): get_dls(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='no data set'): get_dls(get_dls('digits'))
    with pytest.raises(ValueError, match='channels is for folders'): get_dls('digits', channels=3)

def test_predict_gives_the_embedding(quiet):
    dls = get_dls('digits', bs=32, limit=128)
    learn = quiet(clae_learner(dls, resnet8, views='digits'))
    assert learn.predict(dls.valid_ds[0][0])[2].shape == (64,)
