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

@pytest.mark.parametrize('train,test', [
    ('training_set','test_set'), ('Train Images','Test Images'), ('seg_train','seg_test'), ('train2017','val2017'),
    ('TrainSet','TestSet'), ('data-train','data-valid')])
def test_names_of_parts(tmp_path, train, test, capsys):
    for part in (train,test):
        for label in 'ab':
            for i in range(2): image(tmp_path/part/label/f'{i}.png', i, (32,32))
    dls = get_dls(tmp_path, bs=2)
    assert (dls.train.n,dls.valid.n,list(dls.vocab)) == (4,4,['a','b']) and 'Held out' not in capsys.readouterr().out

@pytest.mark.parametrize('names', [
    ('train station','bus station'), ('train','bus'), ('test_tube','train_track'), ('set 1','set 2'), ('2017','2018')])
def test_classes_that_are_no_parts(tmp_path, names):
    for name in names:
        for i in range(3): image(tmp_path/name/f'{i}.png', i, (32,32))
    assert list(get_dls(tmp_path, bs=2).vocab) == sorted(names)

def test_exact_names_of_parts_come_first(tmp_path, capsys):
    "Masks and copies in other sizes stand beside them"
    for part in ('train','train_seg','test','seg_test'):
        for label in 'ab':
            for i in range(2): image(tmp_path/part/label/f'{i}.png', i, (32,32))
    dls = get_dls(tmp_path, bs=2)
    said = capsys.readouterr().out
    assert (dls.train.n,dls.valid.n) == (4,4) and 'train_seg' in said and 'as train and test of' in said

def test_pictures_of_runs_are_no_data(tmp_path):
    "As with `--path .`, in a folder where one has trained"
    for i in range(6): image(tmp_path/f'{i}.png', i, (32,32))
    run = tmp_path/'runs'/'mine'
    image(run/'views.png', 7, (32,32))
    for o in ('settings.json','encoder.safetensors'): (run/o).touch()
    dls = get_dls(tmp_path, bs=2)
    assert dls.train.n + dls.valid.n == 6

def test_a_home_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='no folder ~nobody-here'): get_dls('folder', '~nobody-here')
    for i in range(6): image(tmp_path/'~nobody-here'/f'{i}.png', i, (32,32))
    assert get_dls('~nobody-here', bs=2).train.n == 4
