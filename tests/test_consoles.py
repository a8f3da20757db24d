"Names that a console, or no text at all, can show; options that are empty; backends of pictures that are not there."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from clae_fastai.all import (
    check_images, folder_dls, load_encoder, read_safetensors, read_weights, write_safetensors, write_text)

sys.path.insert(0, f'{os.path.dirname(__file__)}/data')
from layouts import image

strict,ascii_disk = dict(PYTHONIOENCODING='ascii:strict'),dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
utf8 = dict(PYTHONIOENCODING='utf-8:strict') # has no bytes that are no text
names = [b'caf\xc3\xa9', b'\xf0\x9f\x98\x80', b'raw\xff\xfe'] # an accent, an emoji, bytes that are no text

def run(cwd, code, *args, **env):
    env = {k: v for k,v in os.environ.items()
           if not k.startswith(('LC_','LANG','PYTHONUTF8','PYTHONIOENC','MPLBACKEND'))} | env
    return subprocess.run([sys.executable, '-c', code, *args], cwd=cwd, env=env, capture_output=True, timeout=280)

@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "A folder whose classes and files have such names, two files that are no images among them"
    root = tmp_path_factory.mktemp('odd')/os.fsdecode(b'bilder \xe9\xc3\xa9')
    for name in map(os.fsdecode, names):
        for part in ('train','test'):
            for i in range(6): image(root/part/name/f'{name}{i}.png', i, (16,16))
    for name in map(os.fsdecode, names):
        for i in range(2): (root/'train'/name/f'bad{name}{i}.jpg').write_text('x')
    return root

in_python = """
import sys
from clae_fastai.all import *
print(len(folder_dls(sys.argv[1], bs=4, skip_bad=True).vocab))
folder_dls(sys.argv[1], bs=4)
"""

@pytest.mark.parametrize('console', [strict,utf8,ascii_disk], ids=str)
def test_the_library_prints_any_name(odd, console):
    r = run(odd.parent, in_python, odd, **console)
    assert r.stdout.split()[-1] == b'3' and b'ValueError: 6 of 24 files cannot be read' in r.stderr, r.stderr

in_the_shell = """
import sys
from clae_fastai.cli import *
clae_train.main(['--path', sys.argv[1], '--skip-bad', '--arch', 'resnet8', '--epochs', '1', '--bs', '4', '--name', 'x'])
clae_eval.main(['x'])
clae_eval.main(['x', '--path', sys.argv[1], '--skip-bad'])
clae_embed.main(['x', '--path', sys.argv[1], '--skip-bad'])
clae_train.main(['--resume', 'x'])
clae_export.main(['x', '--out', sys.argv[2]])
"""

@pytest.mark.parametrize('console', [strict,ascii_disk], ids=str)
def test_a_run_on_any_name(odd, tmp_path, console):
    r = run(tmp_path, in_the_shell, odd, os.fsdecode(b'out\xff.safetensors'), **console)
    assert r.returncode == 0, r.stderr.decode(errors='replace')
    summary = json.loads((tmp_path/'runs'/'x'/'summary.json').read_text())
    assert any('Left out: 6 of 24' in o for o in summary['settings']['images'])
    load_encoder(tmp_path/os.fsdecode(b'out\xff.safetensors'))
    rows = (tmp_path/'features.csv').read_bytes().decode().splitlines()
    assert len(rows) == 37 and rows[1:] == sorted(rows[1:])
    listed = (odd/'train'/'.clae-unreadable.txt').read_bytes()
    assert all(b'/bad' + o in listed for o in names)

def test_what_is_written_with_names(tmp_path):
    file = tmp_path/'x.txt'
    write_text(file, os.fsdecode(b'a\xff\xc3\xa9'))
    assert file.read_bytes() == b'a\xff\xc3\xa9'
    for i in range(5): (tmp_path/os.fsdecode(b'\xff%d.png' % i)).write_text('x')
    image(tmp_path/'1.png', 1)
    for _ in range(2):
        good,_,said = check_images([*tmp_path.glob('*.png')], tmp_path, skip_bad=True)
        assert len(good) == 1 and '.clae-unreadable.txt' in said
    assert (tmp_path/'.clae-unreadable.txt').read_bytes().count(b'\xff') == 5

def test_files_of_tensors_of_any_name(tmp_path):
    root = tmp_path/os.fsdecode(b'\xff')
    root.mkdir()
    write_safetensors(root/'x.safetensors', dict(a=torch.ones(2)), 'x')
    assert torch.equal(read_safetensors(root/'x.safetensors', 'x')[0]['a'], torch.ones(2))
    assert torch.equal(read_weights(root/'x.safetensors')['a'], torch.ones(2))
    with pytest.raises(FileNotFoundError): read_safetensors(root/'y.safetensors', 'x')

def test_many_images_in_a_folder_of_any_name(tmp_path, capfd, monkeypatch):
    "Their cache lies beside them, and is read"
    root = tmp_path/os.fsdecode(b'\xff')
    for i in range(1001): image(root/os.fsdecode(b'c\xfe%d' % (i%2))/f'{i}.png', i%50, (8,8))
    for _ in range(2):
        assert len(folder_dls(root, bs=4).vocab) == 2
        monkeypatch.setattr(Image, 'open', None)
    assert (root/'.clae-images.safetensors').is_file() and 'could not be kept' not in capfd.readouterr().out

# options

def _texts():
    from clae_fastai import cli
    for name in ('clae_train','clae_eval','clae_embed','clae_report','clae_export','clae_table','clae_figure'):
        for action in cli.parser(getattr(cli, name))._actions:
            if action.nargs is None and not action.choices and action.type not in (int,float): yield name,action

@pytest.mark.parametrize('name,action', [*_texts()], ids=lambda o: o if isinstance(o, str) else o.dest)
@pytest.mark.parametrize('value', ['',' '])
def test_options_that_are_empty(command, name, action, value):
    from clae_fastai import cli
    option = action.option_strings[:1]
    text = command(getattr(cli, name), *option, value)
    assert 'it is empty' in text and (option or ['RUN'])[0] in text

# pictures

def test_a_backend_that_is_not_there(tmp_path):
    "As of a notebook that the shell was started from"
    code = "from clae_fastai.cli import *; clae_train.main('--epochs 1 --limit 64 --bs 32 --name x'.split())"
    r = run(tmp_path, code, MPLBACKEND='nonsense')
    assert r.returncode == 0 and (tmp_path/'runs'/'x'/'views.png').is_file(), r.stderr.decode()

@pytest.mark.skipif(os.name != 'posix', reason='a shell of POSIX')
@pytest.mark.parametrize('closed', ['>&-','2>&-','>&- 2>&-'])
def test_streams_that_are_not_there(tmp_path, closed):
    exe = Path(sys.executable).with_name('clae_train')
    args = '--epochs 1 --limit 64 --bs 32 --name x'
    p = subprocess.run(['sh','-c',f'exec {exe} {args} {closed}'], cwd=tmp_path, capture_output=True, timeout=300)
    assert p.returncode == 0 and b'Traceback' not in p.stderr, p.stderr
    assert (tmp_path/'runs'/'x'/'summary.json').is_file()

def test_help_imports_nothing(tmp_path):
    code = ("import sys; from clae_fastai.cli import clae_train\n"
            "try: clae_train.main(['--help'])\n"
            "except SystemExit: print('heavy', [o for o in ('matplotlib','fastai','torch') if o in sys.modules])")
    r = run(tmp_path, code, MPLBACKEND='nonsense')
    assert r.stdout.decode().splitlines()[-1] == 'heavy []', r.stderr
