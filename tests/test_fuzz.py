"""Broken input of every kind: a clear message, exit code 2, no traceback, nothing overwritten, nothing executed,
nothing written where it does not belong."""
import io
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fastcore.all import working_directory
from PIL import Image

from clae_fastai.train.checkpoint import checkpoints, load_checkpoint
from clae_fastai.cli import clae_embed, clae_eval, clae_export, clae_train
from clae_fastai.runs import read_options, train_options
from clae_fastai.data.catalogue import get_dls
from clae_fastai.train.learner import clae_learner
from clae_fastai.train.encoder import load_encoder
from clae_fastai.method.models import resnet8

# Options

wrong = ['abc', '', 'nan', '-1', '1e400', '--', '\u00bd', '1' + '0'*30]
numbers = {'eps': [*wrong[:5], '-inf'], 'alpha': [*wrong[:5], 'inf'], 'lr': [*wrong[:5], '0', '-1e-9'],
           'epochs': [*wrong[:5], '0', '1.5', '-99999999999999999999'], 'bs': [*wrong, '0', '1', '2.5'],
           'limit': [*wrong[:6], '0', '1'], 'size': [*wrong, '0', '999999999'], 'seed': [*wrong, '1.5'],
           'workers': [*wrong, '1000000'], 'every-batches': [*wrong[:6], '0']}

@pytest.mark.parametrize('option,value', [(o,v) for o,vs in numbers.items() for v in vs])
def test_numbers(command, option, value):
    err = command(clae_train, f'--{option}={value}')
    assert len(err) < 3000

@pytest.mark.parametrize('option', ['arch','method','attack','recipe','data','precision','attack-bn','on-nonfinite',
                                    'path','resume'])
@pytest.mark.parametrize('value', ['', 'x', 'x'*5000, '\u202e\U0001f600', '../../etc/passwd', '__class__', 'a\nb'])
def test_words(command, option, value): command(clae_train, f'--{option}={value}')

bad_names = ['', '.', '..', '../x', '/tmp/x', 'a/b', '-x', '.x', 'x'*101, 'a b', 'a\nb', 'x\0y', '\u202ex',
             '\U0001f600'*50, 'runs/../../x']

@pytest.mark.parametrize('name', bad_names)
def test_names(command, name):
    command(clae_train, f'--name={name}', '--epochs=1')
    command(clae_eval, f'./{name}')
    command(clae_export, f'./{name}')
    command(clae_embed, f'./{name}', '--path', '.')

@pytest.mark.parametrize('args', ['--k=0', '--k=-5', '--k=99999999999', '--bs=0', '--data=x', '--protocol=x',
                                  '--knn-on=x', '--probe-on=x', '--path=nowhere --data=folder', '--workers=-1',
                                  '--k=½', '--bs=--'])
def test_eval_options(command, encoder_file, tmp_path, args):
    shutil.copy(encoder_file, tmp_path/'e.safetensors')
    command(clae_eval, 'e.safetensors', '--data=digits', *args.split())

def test_eval_without_data(command, encoder_file, tmp_path):
    shutil.copy(encoder_file, tmp_path/'e.safetensors')
    assert '--data NAME' in command(clae_eval, 'e.safetensors')

@pytest.mark.parametrize('arg', ['--out=e.safetensors', '--out=no/folder/x.csv', '--out=.', '--out=.csv', '--out=',
                                 '--path=', '--bs=0', '--path=nowhere', '--path=e.safetensors', '--workers=-1',
                                 '--max-pixels=0', '--background=x', '--value-range=1', '--channels=2'])
def test_embed_options(command, encoder_file, tmp_path, arg):
    shutil.copy(encoder_file, tmp_path/'e.safetensors')
    command(clae_embed, 'e.safetensors', '--path=.', arg)

@pytest.mark.parametrize('arg', ['--out=e.safetensors', '--out=no/folder/x', '--out=.', '--format=pickle',
                                 '--out=e.safetensors/x', '--out=' + 'x'*300])
def test_export_options(command, encoder_file, tmp_path, arg):
    shutil.copy(encoder_file, tmp_path/'e.safetensors')
    command(clae_export, 'e.safetensors', arg)

@pytest.mark.parametrize('kind', ['file','dangling'])
def test_runs_is_no_folder(command, tmp_path, kind):
    if kind == 'file': (tmp_path/'runs').write_text('precious')
    else: (tmp_path/'runs').symlink_to(tmp_path/'nowhere'/'else')
    command(clae_train, '--limit=64', '--epochs=1')

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_read_only_folder(command, tmp_path):
    tmp_path.chmod(0o500)
    try: command(clae_train, '--limit=64', '--epochs=1')
    finally: tmp_path.chmod(0o700)

def test_read_only_file_system(monkeypatch, capsys):
    "Where even root may not write"
    if not Path('/proc/self').exists(): pytest.skip('no /proc here')
    monkeypatch.chdir('/proc')
    with pytest.raises(SystemExit) as e: clae_train(limit=64, epochs=1)
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'Traceback' not in err and 'runs' in err

# Files

def damaged(data, seed):
    "`data` truncated, with bits flipped, or with a piece overwritten"
    rng,data = random.Random(seed),bytearray(data)
    kind = seed % 3
    if kind == 0: return bytes(data[:rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.choice([1,1,8])):
            data[rng.randrange(min(len(data), rng.choice([24,600,10**9])))] ^= 1 << rng.randrange(8)
    else:
        at = rng.randrange(min(len(data), rng.choice([24,600,10**9])))
        data[at:at+8] = rng.randbytes(8)
    return bytes(data)

@pytest.fixture(scope='module')
def image_bytes():
    im,res = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16,16,3), dtype=np.uint8)),{}
    for fmt in ('PNG','JPEG','BMP','GIF','TIFF','WEBP'):
        im.save(b := io.BytesIO(), fmt)
        res[fmt] = b.getvalue()
    return res

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('fmt', ['PNG','JPEG','BMP','GIF','TIFF','WEBP'])
def test_damaged_images(tmp_path, image_bytes, fmt, seed):
    "Either it still is an image, or the error names it"
    for i in range(12): (tmp_path/f'{i}.{fmt.lower()}').write_bytes(image_bytes[fmt])
    bad = tmp_path/f'bad.{fmt.lower()}'
    bad.write_bytes(damaged(image_bytes[fmt], seed))
    try: get_dls('folder', tmp_path, bs=4, num_workers=0)
    except (ValueError, FileNotFoundError) as e: assert bad.name in str(e) or 'channels' in str(e), e
    dls = get_dls('folder', tmp_path, bs=4, skip_bad=True, num_workers=0, channels=3, size=16, valid_pct=0)
    assert dls.train.n >= 12

def test_an_image_that_claims_to_be_huge(tmp_path, image_bytes):
    "A decompression bomb: 60,000 x 60,000 pixels in its header"
    data = bytearray(image_bytes['PNG'])
    data[16:24] = struct.pack('>II', 60000, 60000)
    (tmp_path/'bomb.png').write_bytes(bytes(data))
    (tmp_path/'1.png').write_bytes(image_bytes['PNG'])
    with pytest.raises(ValueError, match='bomb.png'): get_dls('folder', tmp_path)

@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    "A short run, with its encoder, settings and checkpoints"
    cwd = tmp_path_factory.mktemp('fuzz')
    with working_directory(cwd): clae_train(limit=64, epochs=1, bs=32, name='run')
    return cwd/'runs'/'run'

@pytest.fixture(scope='module')
def encoder_file(run_folder): return run_folder/'encoder.safetensors'

@pytest.mark.parametrize('seed', range(5))
def test_damaged_encoders(tmp_path, encoder_file, seed):
    "The error names it; it loads only where nothing was hit that counts, and then it is what it was"
    f = tmp_path/'damaged.safetensors'
    f.write_bytes(damaged(encoder_file.read_bytes(), seed))
    try: encoder = load_encoder(f)
    except ValueError as e: assert f.name in str(e), e
    else:
        whole = load_encoder(encoder_file)
        weights,own = whole.state_dict(),encoder.state_dict()
        assert all(torch.equal(own[k], v) for k,v in weights.items()) and whole.info.items() <= encoder.info.items()

headers = [dict(arch='x'), dict(arch='../x'), dict(arch='__init__'), dict(stem='x'), dict(channels='0'),
           dict(channels='-1'), dict(channels='"3"'), dict(channels='1e9'), dict(channels='[3]'), dict(channels='{'),
           dict(channels='null'), dict(mean='[1,2]'), dict(std='[0]'), dict(std='{}'), dict(std='"x"'),
           dict(mean='NaN'), dict(size='-1'), dict(size='"x"'), dict(format='x'), dict(format='')]

@pytest.mark.parametrize('change', [*headers, 'arch', 'stem', 'channels'], ids=str)
def test_wrong_headers(command, tmp_path, encoder_file, change):
    "Headers that are whole and wrong"
    with safetensors.safe_open(encoder_file, 'pt') as f:
        head,state = f.metadata(),{k: f.get_tensor(k) for k in f.keys()}
    head.pop('digest')
    head['version'] = '0.1.0' # which wrote no checksum: that must not be what finds it
    if isinstance(change, str): del head[change]
    else: head.update(change)
    safetensors.torch.save_file(state, tmp_path/'e.safetensors', head)
    with pytest.raises(ValueError, match='e.safetensors'): load_encoder(tmp_path/'e.safetensors')
    command(clae_eval, 'e.safetensors')

@pytest.mark.parametrize('seed', range(5))
def test_damaged_checkpoints(tmp_path, run_folder, seed):
    "The checksum finds every change"
    f = tmp_path/'epoch0000.safetensors'
    whole = checkpoints(run_folder/'checkpoints')[-1].read_bytes()
    f.write_bytes(data := damaged(whole, seed))
    if data == whole: return
    with pytest.raises(ValueError, match=f.name): load_checkpoint(f)

@pytest.mark.parametrize('seed', range(30))
def test_damaged_settings(tmp_path, run_folder, seed):
    "Either they still are options of the right types, or the run is not resumed"
    file = tmp_path/'settings.json'
    file.write_bytes(damaged((run_folder/'settings.json').read_bytes(), seed))
    try: options = read_options(tmp_path, to_continue=True)
    except ValueError as e: assert 'damaged' in str(e) or 'pip install' in str(e), e
    else: assert (all(type(options[k]) in (kind,int,type(None)) for k,(kind,_) in train_options.items()) and
                  options['limit'] == 64)

versions = '"versions": {"clae_fastai": "0.2.0"}'

@pytest.mark.parametrize('text', ['', 'null', '[]', '{}', '{"options": {"epochs": 1}}',
                                  '{"options": {}, "versions": []}', '['*100000, '\x00',
                                  f'{{"options": null, {versions}}}', f'{{"options": [], {versions}}}',
                                  f'{{"options": 1e999, {versions}}}',
                                  f'{{"options": {{"epochs": "1"}}, {versions}}}'], ids=range(12))
def test_wrong_settings(command, tmp_path, text):
    (tmp_path/'runs'/'x').mkdir(parents=True)
    (tmp_path/'runs'/'x'/'settings.json').write_text(text)
    assert 'settings.json is damaged' in command(clae_train, '--resume=x')

# Pickles

class Bomb:
    "Writes a file when it is unpickled"
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')

def bomb_bytes(target, kind):
    b = io.BytesIO()
    if kind == 'pickle': b.write(pickle.dumps(Bomb(target)))
    else: torch.save(Bomb(target), b, _use_new_zipfile_serialization=kind == 'zip')
    return b.getvalue()

@pytest.fixture(params=['pickle','torch.save','zip'])
def bomb(tmp_path, request):
    "Bytes of a bomb, whose file must not come into being"
    yield bomb_bytes(tmp_path/'executed', request.param)
    assert not (tmp_path/'executed').exists()

@pytest.mark.parametrize('kind', ['pickle','torch.save','zip'])
def test_the_bomb_works(tmp_path, kind):
    "All of these bytes do harm where somebody unpickles them; else the tests below would show nothing"
    data = io.BytesIO(bomb_bytes(tmp_path/'executed', kind))
    (pickle.load(data) if kind == 'pickle' else torch.load(data, weights_only=False)).close()
    assert (tmp_path/'executed').exists()

def test_bomb_as_encoder(command, tmp_path, bomb):
    (tmp_path/'e.safetensors').write_bytes(bomb)
    with pytest.raises(ValueError, match='e.safetensors'): load_encoder(tmp_path/'e.safetensors')
    command(clae_eval, 'e.safetensors')
    command(clae_export, 'e.safetensors')
    dls = get_dls('digits', limit=64)
    with pytest.raises(ValueError, match='e.safetensors'): clae_learner(dls, resnet8, weights=tmp_path/'e.safetensors')

def test_bomb_as_checkpoint(tmp_path, run_folder, bomb, capsys):
    run = tmp_path/'runs'/'run'
    shutil.copytree(run_folder, run)
    (run/'summary.json').unlink()
    for f in checkpoints(run/'checkpoints'): f.write_bytes(bomb)
    with working_directory(tmp_path), pytest.raises(SystemExit) as e: clae_train(resume='run')
    assert e.value.code == 2 and 'start anew' in capsys.readouterr().err
    (run/'settings.json').write_bytes(bomb)
    with working_directory(tmp_path), pytest.raises(SystemExit): clae_train(resume='run')

def test_bomb_as_image_cache(digits_dir, tmp_path, bomb):
    data = shutil.copytree(digits_dir/'rgb', tmp_path/'data')
    for name in ('.clae-images.safetensors', '.clae-images.safetensors.123'): (data/name).write_bytes(bomb)
    dls = get_dls('folder', data)
    assert dls.train.n + dls.valid.n == 240
