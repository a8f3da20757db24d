"Any folder of images: what it remembers, what is held out, what its images become."
import os
import shutil

import pytest
from PIL import Image

from clae_fastai.all import check_images, folder_dls, get_dls, get_image_files

from layouts import image

def test_a_folder_by_itself(tmp_path):
    for i in range(6): image(tmp_path/f'{i}.png', i, (32,32))
    for o in (tmp_path, str(tmp_path)):
        for dls in (get_dls(o, bs=2), get_dls('folder', o, bs=2), folder_dls(o, bs=2)):
            assert (dls.train.n,dls.valid.n) == (4,2)
    with pytest.raises(ValueError, match='or pass a folder of images'): get_dls(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere'): get_dls('folder', tmp_path/'nowhere')

def test_several_sizes(tmp_path):
    "The first of the smallest images is named; of large images of one size nothing is said, and nothing is resized"
    for i,size in enumerate(((300,230),(260,240),(300,100),(100,300))): image(tmp_path/'mixed'/f'{i}.png', i, size)
    with pytest.raises(ValueError, match='2.png is 300x100 pixels, .* size=100'): get_dls(tmp_path/'mixed', bs=2)
    assert get_dls(tmp_path/'mixed', bs=2, size=120, num_workers=0).one_batch()[0].shape == (2,3,120,120)
    for i in range(2): image(tmp_path/'large'/f'{i}.png', i, (240,240))
    for size,side in ((None,224),(240,240)):
        assert get_dls(tmp_path/'large', bs=2, size=size, num_workers=0).one_batch()[0].shape == (2,3,side,side)

def test_what_a_folder_remembers(tmp_path, monkeypatch):
    "Training and test images, each in their folder, and a moved folder is known again"
    for part in ('train','test'):
        for c in 'ab':
            for i in range(4): image(tmp_path/'images'/part/c/f'{i}.png', i)
    get_dls(tmp_path/'images', bs=2, size=24, num_workers=0)
    moved = (tmp_path/'images').rename(tmp_path/'moved')
    def _refuse(*_, **__): raise AssertionError('an image was opened')
    monkeypatch.setattr(Image, 'open', _refuse)
    for part in ('train','test'): assert len(check_images(get_image_files(moved/part), moved/part)[0]) == 8
    with pytest.raises(ValueError, match='an image was opened'): check_images(get_image_files(moved), moved)

def test_a_memory_that_cannot_be_kept(tmp_path):
    for i in range(3): image(tmp_path/f'{i}.png', i)
    (tmp_path/'.clae-checked.json').mkdir() # not even root may replace a folder by a file
    for _ in range(2): assert get_dls(tmp_path, bs=2, size=24, num_workers=0).train.n == 3
    assert sorted(os.listdir(tmp_path)) == ['.clae-checked.json', '0.png', '1.png', '2.png']

def test_test_images_without_classes(digits_dir, tmp_path):
    "Where nothing has a class there is nothing to test, but a loss to measure"
    files = sorted((digits_dir/'flat').glob('*.png'))
    for folder,part in (('train', files[:40]), ('test', files[40:50])):
        (tmp_path/folder).mkdir()
        for f in part: shutil.copy(f, tmp_path/folder)
    dls = get_dls(tmp_path, bs=8, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.valid.one_batch())) == (40, 10, 1)
