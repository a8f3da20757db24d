"""Folders and files from strangers: nothing waits, nothing starts a program, nothing is read twice,
and what came along is not believed."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

from clae_fastai.all import (
    ImageReader, MemoryImages, cached_images, check_images, check_regular, cut_crops, find_images, folder_dls, get_dls,
    load_checkpoint, load_encoder, read_safetensors, write_safetensors)

from layouts import image, writers

def folder_of(root, names, size=(20,20)):
    for i,name in enumerate(names): image(root/name, i, size)
    return root

@contextlib.contextmanager
def at_once(seconds=10):
    "What waits for ever fails, whoever catches that"
    late = []
    def _late(*_):
        late.append(True)
        raise TimeoutError('it waits')
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not late

# what a file is

postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n'

@pytest.mark.parametrize('name', ['x.jpg','x.png','x.eps'])
def test_no_program_is_started(tmp_path, monkeypatch, name):
    "By no door: PostScript would be run"
    def _run(*_, **__): raise AssertionError('Ghostscript was started')
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', _run)
    monkeypatch.setattr(subprocess, 'Popen', _run)
    (file := tmp_path/name).write_bytes(postscript)
    with pytest.raises(AssertionError, match='was started'): Image.open(file).load()
    image(tmp_path/'1.png', 1)
    crop = lambda reader: cut_crops(file, reader, (4,4), lambda h,w: [(0,0,w,h,False)])
    for read in (lambda r: r(file), lambda r: r.pixels(file), crop, lambda r: r.values(file), lambda r: r.look(file)):
        with pytest.raises((ValueError,OSError), match='(?i)identif|format'): read(ImageReader())
    if name != 'x.eps':
        with pytest.raises(ValueError, match=name): folder_dls(tmp_path, bs=2, size=16)

@pytest.mark.parametrize('format', ['BMP','GIF','ICO','JPEG','JPEG2000','PCX','PNG','PPM','SGI','TGA','TIFF','WEBP'])
def test_pictures_by_other_names(tmp_path, format):
    "Cameras and people call a PNG .jpg: that opens as ever"
    image(tmp_path/'1.png', 1, (16,16))
    Image.open(tmp_path/'1.png').save(tmp_path/'x.jpg', format)
    assert ImageReader()(tmp_path/'x.jpg').shape == (16,16)
    check_images([tmp_path/'x.jpg'], tmp_path)

# what is no regular file

def pipe(file): os.mkfifo(file)
def zero(file): file.symlink_to('/dev/zero')
def bound(file):
    with contextlib.chdir(file.parent), socket.socket(socket.AF_UNIX) as s: s.bind(file.name)

others = pytest.mark.parametrize('make', [pipe,zero,bound])

@others
def test_images_that_are_no_files(tmp_path, make):
    image(tmp_path/'1.png', 1)
    for name in ('x.jpg','x.png'):
        make(file := tmp_path/name)
        with at_once():
            with pytest.raises(ValueError, match=f'{name}.*no regular file'): ImageReader().pixels(file)
            with pytest.raises(ValueError, match=f'{name}.*no regular file'):
                cut_crops(file, ImageReader(), (4,4), lambda h,w: [(0,0,w,h,False)])
            with pytest.raises(ValueError, match=f'{name}.*no regular file'):
                folder_dls(tmp_path, bs=2, size=16)
            with pytest.raises(ValueError, match='no regular file'):
                folder_dls(tmp_path, bs=2, read=lambda f: np.zeros((8,8)))
        file.unlink()

@others
def test_weights_that_are_no_files(tmp_path, make):
    make(file := tmp_path/'x.safetensors')
    with at_once():
        for read in (load_encoder, load_checkpoint, lambda f: read_safetensors(f, 'x')):
            with pytest.raises(ValueError, match='no regular file'): read(file)

@others
def test_what_a_folder_remembers_is_no_file(tmp_path, make):
    "It is put in its place"
    folder_of(tmp_path, [f'{i}.png' for i in range(6)])
    for name in ('.clae-checked.json', '.clae-unreadable.txt'): make(tmp_path/name)
    with at_once():
        folder_dls(tmp_path, bs=2)
        (tmp_path/'.clae-images.safetensors').unlink(missing_ok=True)
        make(tmp_path/'.clae-images.safetensors')
        files = sorted(tmp_path.glob('*.png'))
        cached_images(tmp_path, files, lambda: [MemoryImages(torch.zeros(6,3,4,4, dtype=torch.uint8))])
    for name in ('.clae-checked.json', '.clae-images.safetensors'): check_regular(tmp_path/name)

@pytest.mark.parametrize('name', writers)
def test_data_sets_that_are_no_files(tmp_path, name):
    "Any one of its files: it is named, or nobody needs it"
    writers[name](tmp_path)
    refused = []
    for file in [f for f in sorted(tmp_path.rglob('*')) if f.is_file()][::-1]:
        # images are read one like the other
        if file.suffix in {o.suffix for o in refused} and len(refused) > 8: continue
        aside = file.rename(file.with_name('aside'))
        pipe(file)
        with at_once():
            try: get_dls(name, tmp_path, bs=2, download=False, num_workers=0)
            except ValueError as e:
                assert file.name in str(e) and 'no regular file' in str(e), e
                refused.append(file)
        file.unlink()
        aside.rename(file)
    assert len(refused) >= 3

# what has several names

def found(root): return [str(f.relative_to(root)) for f in find_images(root)[0]]

def test_links_into_each_other(tmp_path):
    "Names without end"
    folder_of(tmp_path, [f'{c}/{i}.png' for c in 'ab' for i in range(5)])
    for at,to in (('a/x','../b'), ('b/y','../a'), ('a/self','.'), ('b/up','..'), ('out','..')):
        (tmp_path/at).symlink_to(to)
    with at_once(): dls = folder_dls(tmp_path, bs=2)
    assert dls.train.n + dls.valid.n == 10 and list(dls.vocab) == ['a','b']
    assert any('5 names of files or folders that are there already, such as' in o and 'a/x' in o for o in dls.notes)

def test_many_names_of_one_file(tmp_path, capsys):
    "Links, hard links and links to folders; what is no link stays, else the first"
    folder_of(tmp_path/'outside', ['1.png','2.png','more/3.png','more/4.png'])
    root = tmp_path/'images'
    folder_of(root, ['z/5.png','z/6.png'])
    (root/'a').mkdir()
    (root/'a'/'five.png').symlink_to(root/'z'/'5.png')
    os.link(root/'z'/'6.png', root/'a'/'six.png')
    for name in ('z/1.png','a/one.png'): (root/name).symlink_to(tmp_path/'outside'/'1.png')
    for name in ('m2','m1'): (root/name).symlink_to(tmp_path/'outside'/'more')
    assert found(root) == ['a/one.png', 'a/six.png', 'm1/3.png', 'm1/4.png', 'z/5.png']
    folder_dls(root, bs=2, unlabelled=True)
    assert 'Left out: 4 names of files or folders that are there already, such as' in capsys.readouterr().out

def test_links_that_lead_out(tmp_path, capsys):
    "A data set that is made of links is one, with its classes; nothing is said"
    folder_of(tmp_path/'all', [f'{i}.png' for i in range(20)])
    for i in range(20):
        (file := tmp_path/'set'/('train' if i < 14 else 'test')/'ab'[i%2]/f'{i}.png').parent.mkdir(
            parents=True, exist_ok=True)
        file.symlink_to(tmp_path/'all'/f'{i}.png')
    (tmp_path/'linked').symlink_to('set')
    (tmp_path/'parts').mkdir()
    for part in ('train','test'): (tmp_path/'parts'/part).symlink_to(tmp_path/'set'/part)
    for root in ('set','linked','parts'):
        dls = folder_dls(tmp_path/root, bs=2)
        assert (dls.train.n,dls.valid.n,list(dls.vocab)) == (14,6,['a','b'])
        assert 'already' not in capsys.readouterr().out

def test_links_that_lead_nowhere(tmp_path):
    folder_of(tmp_path, ['1.png','2.png','3.png'])
    (tmp_path/'x.png').symlink_to('nothing')
    (tmp_path/'y.png').symlink_to('y.png')
    assert [f.name for f in find_images(tmp_path)[0]][-2:] == ['x.png','y.png']
    with pytest.raises(ValueError, match='2 of 5 files cannot be read'): folder_dls(tmp_path, bs=2)

def test_file_systems_without_numbers(tmp_path, monkeypatch):
    "Where all are number 0 no file is left out, and links to where one was end all the same"
    folder_of(tmp_path, ['a/1.png','b/2.png'])
    (tmp_path/'a'/'link.png').symlink_to('1.png')
    (tmp_path/'a'/'x').symlink_to('../b')
    (tmp_path/'b'/'y').symlink_to('../a')
    stat_ = os.stat
    def _stat(*args, **kwargs): return os.stat_result([0 if i == 1 else o for i,o in enumerate(stat_(*args, **kwargs))])
    monkeypatch.setattr(os, 'stat', _stat)
    with at_once(): assert found(tmp_path) == ['a/1.png', 'a/link.png', 'b/2.png']

# what came along

def test_a_memory_that_came_along(tmp_path):
    "Packed with the images by somebody who has made up sizes and times: decoded anew, and only once"
    folder_of(tmp_path/'a', [f'{i}.png' for i in range(4)], (80,80))
    folder_dls(tmp_path/'a', bs=2)
    memo = tmp_path/'a'/'.clae-checked.json'
    for name in ('2.png','3.png'): # of the size and time that are remembered
        status = (file := tmp_path/'a'/name).stat()
        file.write_bytes(file.read_bytes()[:100].ljust(status.st_size, b'\0'))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match='2 of 4 files cannot be read'): folder_dls(tmp_path/'a', bs=2)
    with tarfile.open(tmp_path/'a.tar', 'w') as archive: archive.add(tmp_path/'a', 'b')
    with tarfile.open(tmp_path/'a.tar') as archive: archive.extractall(tmp_path, filter='fully_trusted')
    known = json.loads(memo.read_text())['images']
    for name,row in known.items():
        status = (tmp_path/'b'/name).stat()
        assert row[0] == status.st_size and row[2] != status.st_ctime_ns

def test_images_that_came_along(tmp_path):
    "A cache of other images, whole and with its checksum, beside files that it was not made of"
    writers['cifar10'](tmp_path)
    true = get_dls('cifar10', tmp_path, bs=2).train_ds.images.clone()
    root, = tmp_path.iterdir()
    cache = root/'.clae-images.safetensors'
    tensors,header = read_safetensors(cache, 'clae-images-3')
    assert torch.equal(tensors['images_0'], true)
    write_safetensors(cache, {k: v if v.ndim == 1 else 255 - v for k,v in tensors.items()}, 'clae-images-3', **header)
    assert torch.equal(get_dls('cifar10', tmp_path, bs=2).train_ds.images, 255 - true) # on this machine, by its owner
    shutil.copytree(root, tmp_path/'copy'/root.name) # sizes, names and times are those of the files
    assert torch.equal(get_dls('cifar10', tmp_path/'copy', bs=2).train_ds.images, true)

def test_the_checksum_is_of_the_classes_too(tmp_path):
    writers['cifar10'](tmp_path)
    get_dls('cifar10', tmp_path, bs=2)
    cache = next(tmp_path.glob('*/.clae-images.safetensors'))
    whole = cache.read_bytes()
    assert b'bird' in whole
    cache.write_bytes(whole.replace(b'bird', b'BIRD'))
    with pytest.raises(ValueError, match='checksum'): read_safetensors(cache, 'clae-images-3')
    assert 'bird' in get_dls('cifar10', tmp_path, bs=2).vocab
    assert cache.read_bytes() == whole

@pytest.mark.parametrize('labels', [[0,1,2], [0,-1,1]])
def test_labels_of_no_class(labels):
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match='2 classes, and labels from'):
        MemoryImages(images, torch.tensor(labels), ['a','b'])
    MemoryImages(images, torch.tensor(labels)) # nobody has named them

# what is no folder

def pack(root, name):
    if name.endswith('.zip'):
        with zipfile.ZipFile(root/name, 'w') as z: z.writestr('1.png', b'x')
    elif '.tar' in name:
        with tarfile.open(root/name, 'w:gz') as t: t.add(__file__, '1.png')
    else: (root/name).write_bytes(b'x')
    return root/name

@pytest.mark.parametrize('name', ['x.zip','x.tar.gz','X.TGZ','x.7z','x.rar','x.tar','x.zip.001'])
def test_archives(cli, command, tmp_path, name):
    from clae_fastai.cli import clae_train
    file = pack(tmp_path, name)
    for read in (lambda: folder_dls(file), lambda: get_dls(file), lambda: get_dls(str(file)),
                 lambda: get_dls('folder', file), lambda: get_dls('cifar10', file),
                 lambda: get_dls('dtd', file, download=False)):
        with pytest.raises(ValueError, match='is an archive: unpack it'): read()
    for args in (['--path',file], ['--data','cifar10','--path',file]): assert 'unpack it' in command(clae_train, *args)

def test_files_in_place_of_folders(tmp_path):
    image(tmp_path/'1.png', 1)
    pipe(tmp_path/'pipe')
    for file in (tmp_path/'1.png', tmp_path/'pipe'):
        for read in (lambda: folder_dls(file), lambda: get_dls(file), lambda: get_dls('cifar10', file)):
            with at_once(), pytest.raises(ValueError, match='is a file, and a folder of images is expected'): read()

@pytest.mark.parametrize('path', ['', ' '])
def test_a_path_that_is_empty(path):
    "It would be the folder that one is in"
    for read in (lambda: folder_dls(path), lambda: get_dls('folder', path), lambda: get_dls('cifar10', path),
                 lambda: get_dls(path or '')):
        with pytest.raises(ValueError, match='path is empty|no data set'): read()

# folders of thousands

@pytest.fixture(scope='module')
def thousands(tmp_path_factory):
    root = tmp_path_factory.mktemp('thousands')
    for i in range(1100): image(root/'images'/'ab'[i%2]/f'{i}.png', i, (8,8))
    return root/'images'

def pixels(file): return torch.from_numpy(np.array(Image.open(file).convert('RGB'))).permute(2,0,1)

def test_thousands_are_kept(thousands, monkeypatch):
    "Whatever seed, limit and share are: one file, written once; images and labels are those of the files"
    cache = thousands/'.clae-images.safetensors'
    cache.unlink(missing_ok=True)
    folder_dls(thousands, bs=8)
    written = check_regular(cache)
    def _refuse(*_, **__): raise AssertionError('an image was opened')
    want = {pixels(f).numpy().tobytes(): f.parent.name for f in thousands.glob('*/*.png')}
    monkeypatch.setattr(Image, 'open', _refuse)
    seen = []
    for options in (dict(), dict(seed=3), dict(limit=100), dict(valid_pct=.5), dict(unlabelled=True),
                    dict(valid_pct=0.)):
        dls = folder_dls(thousands, bs=8, **options)
        for ds in (dls.train_ds,dls.valid_ds):
            for x,*y in ds:
                name = want[x.numpy().tobytes()]
                assert not y or ds.vocab[int(y[0])] == name
        seen.append((dls.train.n, dls.valid.n, dls.train_ds.images[:100].clone()))
    assert [o[:2] for o in seen] == [(880,220), (880,220), (100,220), (550,550), (1045,55), (1100,0)]
    assert not torch.equal(seen[0][2], seen[1][2])
    assert check_regular(cache) == written

def test_thousands_that_have_changed(thousands):
    "A file that is another now, and other ways to read them"
    folder_dls(thousands, bs=8)
    cache = thousands/'.clae-images.safetensors'
    for change in (lambda: image(thousands/'a'/'0.png', 5000, (8,8)),
                   lambda: image(thousands/'a'/'new.png', 6000, (8,8)),
                   lambda: (thousands/'a'/'new.png').unlink(),
                   lambda: (thousands/'a'/'2.png').rename(thousands/'a'/'2b.png')):
        before = check_regular(cache)
        change()
        dls = folder_dls(thousands, bs=8)
        assert check_regular(cache) != before
        have = {o.numpy().tobytes() for ds in (dls.train_ds,dls.valid_ds) for o in ds.images}
        assert have == {pixels(f).numpy().tobytes() for f in thousands.glob('*/*.png')}
    (thousands/'a'/'2b.png').rename(thousands/'a'/'2.png')
    assert folder_dls(thousands, bs=8, channels=1).train_ds.images.shape[1] == 1
    assert folder_dls(thousands, bs=8).train_ds.images.shape[1] == 3

def test_thousands_that_cannot_be_kept(thousands, capsys, monkeypatch):
    "One sentence, nothing beside the images"
    for name in ('.clae-images.safetensors','.clae-checked.json'): (thousands/name).unlink(missing_ok=True)
    def _refuse(*_, **__): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('safetensors.torch.save_file', _refuse)
    assert folder_dls(thousands, bs=8).train.n == 880
    assert capsys.readouterr().out.count('could not be kept') == 1
    assert not (thousands/'.clae-images.safetensors').exists()

def test_few_are_not_kept(tmp_path):
    folder_of(tmp_path, [f'{i}.png' for i in range(20)])
    folder_dls(tmp_path, bs=2)
    assert sorted(os.listdir(tmp_path))[:2] == ['.clae-checked.json', '0.png']

def test_a_camera_that_writes_broken_exif(tmp_path):
    "Viewers show such images as they are"
    folder_of(tmp_path, [f'{i}.jpg' for i in range(6)], (300,300))
    for name,exif in (('odd.jpg', b'Exif\0\0garbage!'), ('short.jpg', b'Exif\0\0II*\0\x08\0\0\0\xff')):
        Image.new('RGB', (300,300), 'red').save(file := tmp_path/name, dpi=(72,72), exif=exif)
        assert ImageReader()(file).size == (300,300) and not ImageReader().look(file).turned
        assert cut_crops(file, ImageReader(), (4,4), lambda h,w: [(0,0,w,h,False)]).shape == (1,3,4,4)
    assert len(folder_dls(tmp_path, bs=2, size=32).train.dataset.files) >= 6

@pytest.mark.parametrize('n', range(1, 9))
def test_orientations_are_pillows(tmp_path, n):
    exif = Image.Exif()
    exif[0x112] = n
    image(tmp_path/'x.png', 1, (6,4))
    with Image.open(tmp_path/'x.png') as im: im.save(tmp_path/'y.png', exif=exif)
    with Image.open(tmp_path/'y.png') as im: expected = np.array(ImageOps.exif_transpose(im).convert('RGB'))
    assert np.array_equal(np.array(ImageReader()(tmp_path/'y.png')), expected)

def fits(file, x, *cards):
    "Of 16 bits, as on the disk"
    cards = ['SIMPLE  =                    T', 'BITPIX  =                   16', 'NAXIS   =                    2',
        f'NAXIS1  = {x.shape[1]:20}', f'NAXIS2  = {x.shape[0]:20}', *cards, 'END']
    file.write_bytes(''.join(o.ljust(80) for o in cards).ljust(2880).encode() + x.astype('>i2').tobytes())

def test_fits_is_not_guessed_at(tmp_path):
    for i in range(4): fits(tmp_path/f'{i}.fits', np.random.default_rng(i).integers(-20, 300, (48,48)))
    with pytest.raises(ValueError, match='0.fits .* a sign, an offset or planes'): folder_dls(tmp_path, bs=2)

def test_one_pixel_that_costs_the_others_their_grey_levels(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(20):
        x = rng.integers(200, 3800, (48,48)).astype(np.uint16)
        if i == 7: x[0,0] = 65535
        Image.fromarray(x).save(tmp_path/f'{i}.png')
    folder_dls(tmp_path, bs=2)
    assert '1 of 20 images, ' in capsys.readouterr().out.partition('lose grey levels')[2]
    (tmp_path/'7.png').unlink()
    folder_dls(tmp_path, bs=2)
    assert 'lose grey levels' not in capsys.readouterr().out

def test_what_is_there_where_there_is_no_image(tmp_path):
    for i in range(3): (tmp_path/f'{i}.dcm').touch()
    with pytest.raises(FileNotFoundError, match='files .dcm 3: .* read='): folder_dls(tmp_path)

@pytest.mark.parametrize('images', [torch.rand(8,3,16,16), torch.zeros(8,16,16,3, dtype=torch.uint8),
    torch.zeros(8,16,16, dtype=torch.uint8)])
def test_tensors_that_are_no_images(images):
    with pytest.raises(ValueError, match='uint8 .N,C,H,W.'): MemoryImages(images)
