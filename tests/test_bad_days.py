"""Bad days: images that were exchanged, checkpoints of other runs, full disks, names that are taken,
parents that die, leftovers."""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, working_directory
from PIL import Image

from clae_fastai import runs
from clae_fastai.cli import clae_embed, clae_table, clae_train
from clae_fastai.core import new_file, this_rank, write_text
from clae_fastai.data.catalogue import get_dls
from clae_fastai.method.models import resnet8
from clae_fastai.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from clae_fastai.train.distributed import launched
from clae_fastai.train.learner import clae_learner

posix = pytest.mark.skipif(os.name != 'posix', reason='links and signals of POSIX')

def draw_images(folder, n=12, side=16, seed=0, suffix='png'):
    "Two classes of random pictures, of one size"
    rng = np.random.default_rng(seed)
    for i in range(n):
        file = folder/'ab'[i%2]/f'{i:02}.{suffix}'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side,side,3), dtype=np.uint8)).save(file)
    return folder

def stopped(cli, monkeypatch, *args, epoch=1):
    "A command that is interrupted after an epoch"
    after = Checkpoint.after_epoch
    def _stop(self):
        after(self)
        if self.epoch == epoch: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', _stop)
        r = cli('clae_train', *args)
    assert r.returncode == 130, r.stderr

def weights(run):
    model = load_checkpoint(checkpoints(run/'checkpoints')[-1])['model']
    return {k: v.clone() for k,v in model.items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

quick = '--arch', 'resnet8', '--epochs', 3, '--bs', 4, '--valid-pct', 0

# 1. Which images, which run

@pytest.fixture(params=[16,80], ids=['memory','files'])
def begun(cli, monkeypatch, request):
    "A folder of images, a run on it that was interrupted, and the weights of one that was not"
    args = '--path', 'photos', *quick, '--size', 16
    draw_images(cli.cwd/'photos', side=request.param)
    assert cli('clae_train', *args, '--name', 'whole').returncode == 0
    stopped(cli, monkeypatch, *args, '--name', 'run')
    return cli.cwd/'photos',weights(cli.cwd/'runs'/'whole')

def move_to_another_class(photos): (photos/'a'/'00.png').rename(photos/'b'/'00.png')
def exchange_two(photos):
    one,two = photos/'a'/'00.png',photos/'b'/'01.png'
    a,b = one.read_bytes(),two.read_bytes()
    for f,data in ((one,b), (two,a)):
        s = f.stat()
        f.write_bytes(data)
        os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
def take_one_away(photos): (photos/'a'/'00.png').unlink()
def add_one(photos): shutil.copy(photos/'a'/'00.png', photos/'a'/'99.png')
def relink(photos):
    "The name leads to other images"
    photos.rename(photos.with_name('old'))
    photos.symlink_to(draw_images(
        photos.with_name('others'), side=Image.open(photos.with_name('old')/'a'/'00.png').size[0], seed=1))

@pytest.mark.parametrize('change,words', [
    (move_to_another_class, 'classes'), (exchange_two, 'contents'), (take_one_away, 'number'), (add_one, 'number'),
    (relink, 'contents')])
def test_other_images_are_refused(cli, begun, change, words):
    photos,_ = begun
    before = weights(cli.cwd/'runs'/'run')
    change(photos)
    r = cli('clae_train', '--resume', 'run')
    assert (r.returncode == 2 and r.stderr.count('\n') == 1 and words in r.stderr and
            'begin a new run' in r.stderr), r.stderr
    assert same(weights(cli.cwd/'runs'/'run'), before)

def test_what_is_the_same_goes_on(cli, begun, tmp_path):
    "From another working directory, the run's folder renamed, and a memo of it gone"
    photos,whole = begun
    (cli.cwd/'runs'/'run').rename(cli.cwd/'elsewhere')
    (photos/'.clae-checked.json').unlink()
    (other := tmp_path/'deep'/'below').mkdir(parents=True)
    with working_directory(other): clae_train.main(['--resume', str(cli.cwd/'elsewhere')])
    assert same(weights(cli.cwd/'elsewhere'), whole)

def test_moved_images(cli, begun, command):
    "The folder is named, and the way to say where it is now; copies have other times"
    photos,whole = begun
    shutil.copytree(photos, cli.cwd/'there'/'photos', copy_function=shutil.copyfile)
    shutil.rmtree(photos)
    err = command(clae_train, '--resume', 'run')
    assert str(photos) in err and '--path' in err
    r = cli('clae_train', '--resume', 'run', '--path', 'there/photos')
    assert r.returncode == 0, r.stderr
    assert same(weights(cli.cwd/'runs'/'run'), whole)
    assert (json.loads((cli.cwd/'runs'/'run'/'settings.json').read_text())['options']['path'] ==
            str(cli.cwd/'there'/'photos'))

def test_touched_files(cli, begun):
    "Of large images only times tell; who says where they are, says that they are the same"
    photos,whole = begun
    for f in photos.rglob('*.png'): os.utime(f, (1,1))
    r = cli('clae_train', '--resume', 'run')
    if r.returncode: # not of those in memory, whose pixels are compared
        assert r.returncode == 2 and '(their times)' in r.stderr, r.stderr
        assert cli('clae_train', '--resume', 'run', '--path', photos).returncode == 0
    assert same(weights(cli.cwd/'runs'/'run'), whole)

def test_a_refused_resume_changes_nothing(cli, begun, command):
    "Not the table of its epochs either; nor does a dry run"
    photos,whole = begun
    run = cli.cwd/'runs'/'run'
    assert len(pd.read_csv(run/'history.csv')) == 2
    def files(): return {f: f.read_bytes() for f in run.rglob('*') if f.is_file()}
    before = files()
    r = cli('clae_train', '--resume', 'run', '--dry-run')
    assert r.returncode == 0 and 'A step takes' in r.stdout and files() == before, r.stderr
    for f in checkpoints(run/'checkpoints'): f.rename(f.with_suffix('.kept'))
    for f in run.glob('checkpoints/*.kept'): f.with_suffix('.safetensors').write_bytes(f.read_bytes()[:100])
    r = cli('clae_train', '--resume', 'run')
    assert r.returncode == 2 and 'is whole' in r.stderr and len(pd.read_csv(run/'history.csv')) == 2, r.stderr
    for f in run.glob('checkpoints/*.kept'): f.rename(f.with_suffix('.safetensors'))
    assert cli('clae_train', '--resume', 'run').returncode == 0
    assert same(weights(run), whole) and len(pd.read_csv(run/'history.csv')) == 3

@pytest.mark.parametrize('text', ['', '{}', '{"metrics": 1}'])
def test_a_damaged_summary(cli, command, text):
    "It is named, with the way out"
    assert cli('clae_train', '--limit', 64, '--bs', 32, '--epochs', 1, '--name', 'a').returncode == 0
    file = cli.cwd/'runs'/'a'/'summary.json'
    file.write_text(text)
    assert 'summary.json is damaged' in (err := command(clae_train, '--resume', 'a')) and 'delete it' in err
    file.unlink()
    assert cli('clae_train', '--resume', 'a').returncode == 0 and json.loads(file.read_text())['metrics']['knn']

def replace_one(photos, f): shutil.copy(photos/'b'/'03.png', f)
def rename_one(photos, f): f.rename(f.with_name('55.png'))
def rename_in_order(photos, f): f.rename(f.with_name(f.stem + 'x.png'))
def link_one(photos, f):
    f.rename(photos.parent/f'kept-{f.name}')
    f.symlink_to(photos.parent/f'kept-{f.name}')
def copy_hidden(photos, f): shutil.copy(f, photos/'a'/'.hidden.png')
def write_a_note(photos, f): (f.parent/'note.txt').write_text('a')
def second_name(photos, f): os.link(f, photos/'a'/'second.png')
def another_mode(photos, f): f.chmod(0o444)
def other_pixels(photos, f): Image.fromarray(255 - np.array(Image.open(f))).save(f)
def class_named_anew(photos, f): (photos/'a').rename(photos/'c')
def link_the_folder(photos, f):
    photos.rename(photos.with_name('real'))
    photos.symlink_to('real')
def folder_from_elsewhere(photos, f):
    shutil.copytree(photos, photos.with_name('copy'))
    shutil.rmtree(photos)
    photos.with_name('copy').rename(photos)

changes = [replace_one, rename_one, rename_in_order, link_one, copy_hidden, write_a_note, second_name, another_mode,
           other_pixels, class_named_anew, link_the_folder, folder_from_elsewhere]

@posix
def test_refused_or_exact(cli, begun):
    "Random changes, one to three of them, between a run and its resumption"
    photos,whole = begun
    shutil.copytree(photos, cli.cwd/'before'/'photos')
    run,outcomes = cli.cwd/'runs'/'run',[]
    shutil.copytree(run, cli.cwd/'before'/'run')
    for seed in range(16):
        rng = random.Random(seed)
        chosen = changes[seed:seed+1] or rng.sample(changes[:9], rng.choice([2,3]))
        for o in (photos,run):
            if o.is_symlink(): o.unlink()
            else: shutil.rmtree(o)
            shutil.copytree(cli.cwd/'before'/o.name, o)
        shutil.rmtree(cli.cwd/'real', ignore_errors=True)
        for o in chosen:
            o(photos, rng.choice([f for f in photos.rglob('*.png') if not f.is_symlink() and f.name[0] != '.']))
        r = cli('clae_train', '--resume', 'run')
        if r.returncode:
            assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr, (chosen, r.stderr)
        else:
            assert same(weights(run), whole), chosen
        outcomes.append(r.returncode)
    assert {*outcomes} == {0,2}
    for o in (replace_one, other_pixels): assert outcomes[changes.index(o)] == 2
    for o in (copy_hidden, write_a_note, another_mode, link_the_folder): assert outcomes[changes.index(o)] == 0

@pytest.mark.parametrize('other,words', [
    (('--seed', 7), 'seed: 7, now 42'), (('--lr', '1e-3'), 'lr over time'), (('--attack', 'pgd'), 'attack'),
    (('--precision', 'bf16'), 'precision')])
def test_checkpoint_of_another_run(cli, monkeypatch, other, words):
    draw_images(cli.cwd/'photos')
    for name,more in (('run',()), ('other',other)):
        stopped(cli, monkeypatch, '--path', 'photos', *quick, *more, '--name', name)
    newest = checkpoints(cli.cwd/'runs'/'run'/'checkpoints')[-1]
    shutil.copy(checkpoints(cli.cwd/'runs'/'other'/'checkpoints')[-1], newest)
    r = cli('clae_train', '--resume', 'run')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and words in r.stderr, r.stderr

def test_checkpoint_of_a_twin(cli, monkeypatch):
    "Two runs of the same settings are told apart by their other checkpoints"
    draw_images(cli.cwd/'photos')
    for name in ('run','twin'): stopped(cli, monkeypatch, '--path', 'photos', *quick, '--name', name)
    newest = checkpoints(cli.cwd/'runs'/'run'/'checkpoints')[-1]
    shutil.copy(checkpoints(cli.cwd/'runs'/'twin'/'checkpoints')[-1], newest)
    r = cli('clae_train', '--resume', 'run')
    assert r.returncode == 2 and 'are of two runs' in r.stderr, r.stderr

def test_validation_inside_a_fit(quiet, tmp_path):
    "Belongs to the fit, and begins none"
    class Validates(Callback):
        order = Checkpoint.order+1
        def after_epoch(self):
            if not self.learn.lock.locked(): self.learn.validate()
    dls = get_dls('digits', limit=64, bs=32)
    quiet(clae_learner(dls, resnet8, cbs=[Checkpoint(tmp_path, keep=3), Validates()])).fit(3)
    assert [f.stem for f in checkpoints(tmp_path)] == ['epoch0000','epoch0001','epoch0002']
    assert len({load_checkpoint(f)['run_id'] for f in checkpoints(tmp_path)}) == 1

def test_evaluation_of_exchanged_images(cli):
    draw_images(cli.cwd/'photos', 24)
    assert cli('clae_train', '--path', 'photos', *quick[:4], '--bs', 4, '--name', 'run').returncode == 0
    assert cli('clae_eval', 'run').returncode == 0
    shutil.rmtree(cli.cwd/'photos')
    draw_images(cli.cwd/'photos', 24, seed=1)
    r = cli('clae_eval', 'run')
    assert r.returncode == 2 and 'not those' in r.stderr, r.stderr
    assert cli('clae_eval', 'run', '--path', 'photos').returncode == 0

def test_tables_of_two_folders_of_one_name(cli, command):
    "The other's results are neither printed nor overwritten; the same images elsewhere are the same"
    for i,seed in ((1,0), (2,1)): draw_images(cli.cwd/f'p{i}'/'photos', 80, seed=seed)
    args = 'random', '--scale', 'smoke', '--out', 'res'
    assert cli('clae_table', *args, '--data', 'p1/photos').returncode == 0
    before = (cli.cwd/'res'/'trials.csv').read_text()
    err = cli('clae_table', *args, '--data', 'p2/photos').stderr
    assert 'other images' in err and 'their contents' in err and '--out' in err
    assert (cli.cwd/'res'/'trials.csv').read_text() == before
    shutil.move(cli.cwd/'p1', cli.cwd/'p3')
    r = cli('clae_table', *args, '--data', 'p3/photos')
    assert r.returncode == 0 and 'are to be done' not in r.stdout
    r = cli('clae_table', *args[:-1], 'res2', '--data', 'p2/photos')
    assert r.returncode == 0 and '3 of 3 trials' in r.stdout, r.stderr

def test_a_trial_that_was_begun_on_other_images(cli, monkeypatch):
    for i,seed in ((1,0), (2,1)): draw_images(cli.cwd/f'p{i}'/'photos', 80, seed=seed)
    args = 'random', '--scale', 'smoke', '--out', 'res'
    with monkeypatch.context() as m:
        m.setattr('clae_fastai.runs._table_features', lambda *_: 1/0)
        assert cli('clae_table', *args, '--data', 'p1/photos').returncode == 2
    r = cli('clae_table', *args, '--data', 'p2/photos')
    assert r.returncode == 2 and 'not those' in r.stderr, r.stderr

# 2. Settings are resolved

def test_another_version_has_other_defaults(cli, monkeypatch):
    args = '--limit', 128, '--epochs', 3
    assert cli('clae_train', *args, '--name', 'whole').returncode == 0
    stopped(cli, monkeypatch, *args, '--name', 'run')
    settings = json.loads((cli.cwd/'runs'/'run'/'settings.json').read_text())['options']
    assert {k for k,v in settings.items() if v is None} <= set(
        'path weights recipe value_range every_batches workers max_pixels extends channels valid_pct log'.split())
    other = dict(arch='resnet18', method='plain', eps=.3, alpha=9., attack='pgd', epochs=1, bs=8, lr=1.)
    monkeypatch.setattr('clae_fastai.runs._defaults', other)
    monkeypatch.setattr('clae_fastai.runs._digits', {})
    r = cli('clae_train', '--resume', 'run')
    assert r.returncode == 0, r.stderr
    assert same(weights(cli.cwd/'runs'/'run'), weights(cli.cwd/'runs'/'whole'))

# 3. What is written besides

def no_space(*args, **kwargs): raise OSError(28, 'No space left on device')

@pytest.fixture
def full_for(cli, monkeypatch):
    "Disk full for the files that a function names, while it does"
    full = set()
    replace = Path.replace
    def _replace(self, target): return no_space() if target.name in full else replace(self, target)
    monkeypatch.setattr(Path, 'replace', _replace)
    return full

@pytest.mark.parametrize('file', ['history.csv','loss.png','views.png','neighbours.png'])
def test_side_output_costs_no_run(cli, full_for, file):
    "It is said at once, once, and listed at the end"
    full_for.add(file)
    r = cli('clae_train', '--limit', 128, '--epochs', 2, '--name', 'run')
    run = cli.cwd/'runs'/'run'
    assert (r.returncode == 0 and r.stderr.count(f'{file} COULD NOT BE WRITTEN') == 1 and
            f'NOT WRITTEN in runs/run: {file}' in r.stderr)
    assert (run/'encoder.safetensors').exists() and not (run/file).exists() and not [*run.glob('.*.tmp')]
    assert file in json.loads((run/'summary.json').read_text())['not_written']

def test_room_again(cli, full_for, monkeypatch):
    full_for.add('history.csv')
    monkeypatch.setattr(Checkpoint, 'after_fit', lambda self: full_for.clear(), raising=False)
    r = cli('clae_train', '--limit', 128, '--epochs', 2, '--name', 'run')
    assert r.returncode == 0 and 'NOT WRITTEN' not in r.stderr
    assert len(pd.read_csv(cli.cwd/'runs'/'run'/'history.csv')) == 2

def test_a_picture_that_cannot_be_drawn(cli, monkeypatch):
    "Whatever Matplotlib says"
    monkeypatch.setattr('clae_fastai.runs.plot_losses', lambda file: 1/0)
    r = cli('clae_train', '--limit', 128, '--epochs', 1, '--name', 'run')
    assert r.returncode == 0 and 'loss.png COULD NOT BE WRITTEN (division by zero)' in r.stderr
    assert (cli.cwd/'runs'/'run'/'views.png').exists()

def test_no_room_for_the_encoder(cli, monkeypatch):
    "It is written elsewhere, and the run finished when there is room"
    begin,export,elsewhere = Checkpoint.before_fit,Path.replace,cli.cwd/'spare'
    elsewhere.mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(elsewhere))
    def _replace(self, target): return export(self, target) if elsewhere in target.parents else no_space()
    def _begins(self):
        begin(self)
        monkeypatch.setattr(Path, 'replace', _replace)
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'before_fit', _begins)
        r = cli('clae_train', '--limit', 128, '--epochs', 2, '--name', 'run')
    assert (r.returncode == 2 and 'The encoder is trained, and could not be written' in r.stderr and
            '--resume run' in r.stderr)
    spare, = elsewhere.rglob('encoder.safetensors')
    assert str(spare) in r.stderr
    monkeypatch.setattr(Path, 'replace', export)
    r = cli('clae_train', '--resume', 'run')
    assert r.returncode == 0, r.stderr
    assert (cli.cwd/'runs'/'run'/'encoder.safetensors').read_bytes() == spare.read_bytes()

@posix
def test_never_through_a_link(cli, tmp_path):
    "What a link points to stays, and half files of dead processes go"
    precious = tmp_path/'precious'
    precious.write_text('gold')
    run = cli.cwd/'runs'/'run'
    begin = Checkpoint.before_fit
    files = 'history.csv','loss.png','views.png','neighbours.png','encoder.safetensors','summary.json'
    def _links(self):
        begin(self)
        for name in files: (run/name).unlink(missing_ok=True),(run/name).symlink_to(precious)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Checkpoint, 'before_fit', _links)
        assert cli('clae_train', '--limit', 128, '--epochs', 1, '--name', 'run').returncode == 0
    assert precious.read_text() == 'gold' and not any((run/o).is_symlink() for o in files)
    (cli.cwd/'out.safetensors').symlink_to(tmp_path/'nothing')
    assert 'out.safetensors exists' in cli('clae_export', 'run', '--out', 'out.safetensors').stderr
    assert not (tmp_path/'nothing').exists()

@posix
def test_half_files_of_the_dead(tmp_path):
    "Of this file, of this machine, of processes that are gone; a running one's stays"
    file = tmp_path/'x.csv'
    script = f"import os, sys; from pathlib import Path; from clae_fastai.core import new_file\n" \
             f"with new_file(Path({str(file)!r})) as tmp: tmp.touch(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, '-c', script], capture_output=True).returncode == -9
    half, = tmp_path.iterdir()
    with new_file(tmp_path/'y.csv') as tmp: tmp.touch()
    assert half.exists() # another file's
    with new_file(file) as tmp:
        tmp.touch()
        assert sorted(tmp_path.iterdir()) == sorted([tmp, tmp_path/'y.csv'])
        write_text(tmp_path/'z.csv', '')
        assert tmp.exists()

# Real disks

def start(cwd, *args, command='clae_train', **kwargs):
    env = {**os.environ, 'PYTHONWARNINGS': 'ignore', 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1'}
    exe = Path(sys.executable).with_name(command)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) | kwargs
    return subprocess.Popen([exe, *map(str, args)], cwd=cwd, **options)

def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)

@pytest.fixture
def disk(tmp_path):
    "A disk of 32 MB"
    (place := tmp_path/'disk').mkdir()
    mount = (subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=32m', 'clae', place], capture_output=True)
             if os.name == 'posix' else None)
    if mount is None or mount.returncode:
        pytest.skip('only root may mount; the tests above raise what a full disk does')
    yield place
    subprocess.run(['umount', '-l', place], check=True)

def fill(disk):
    with contextlib.suppress(OSError), (disk/'filler').open('wb', buffering=0) as f:
        while True: f.write(bytes(4096))

long = '--limit', 256, '--bs', 32, '--epochs', 12

@pytest.mark.slow
def test_full_disk(disk, tmp_path):
    """It fills up while training, log and all, and is emptied before the end; or is not, and the run goes on later.
    Both end as without"""
    with working_directory(tmp_path): clae_train.main([*map(str, long), '--name', 'whole'])
    for emptied in (True,False):
        name = f'run{emptied}'
        log = (disk/'log').open('w')
        p = start(disk, *long, '--name', name, stdout=log)
        folder = disk/'runs'/name/'checkpoints'
        wait_for(lambda: len(checkpoints(folder)) > 1)
        fill(disk)
        said = ''
        while 'history.csv COULD NOT BE WRITTEN' not in said:
            assert (line := p.stderr.readline()), said
            said += line
        if emptied: (disk/'filler').unlink()
        _,err = p.communicate(timeout=300)
        log.close()
        if emptied:
            assert p.returncode == 0 and 'NOT WRITTEN' not in err, err
            assert len(pd.read_csv(disk/'runs'/name/'history.csv')) == 12
        else:
            assert p.returncode == 2 and 'could not be written' in err and 'Traceback' not in err, err
            (disk/'filler').unlink()
            p = start(disk, '--resume', name)
            assert p.communicate(timeout=300) and p.returncode == 0
        assert same(weights(disk/'runs'/name), weights(tmp_path/'runs'/'whole'))
        shutil.rmtree(disk/'runs')

@pytest.mark.slow
def test_renamed_run_folder(tmp_path):
    "Nothing that was trained is lost: the run goes on, and ends, in a folder of its old name"
    p = start(tmp_path, *long, '--name', 'run')
    wait_for(lambda: len(checkpoints(tmp_path/'runs'/'run'/'checkpoints')) > 1)
    (tmp_path/'runs'/'run').rename(tmp_path/'runs'/'away')
    out,err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert ({'encoder.safetensors','history.csv','settings.json','summary.json'} <=
            {o.name for o in (tmp_path/'runs'/'run').iterdir()})
    assert len(pd.read_csv(tmp_path/'runs'/'run'/'history.csv')) == 12

@posix
def test_nobody_reads(tmp_path):
    "`clae_train | head -1`, and a log on a disk that is always full"
    read,write = os.pipe()
    p = start(tmp_path, '--limit', 64, '--epochs', 1, '--name', 'a', stdout=write)
    os.close(write); os.close(read)
    assert p.communicate(timeout=300) and p.returncode == 0
    with open('/dev/full', 'w') as full:
        p = start(tmp_path, '--limit', 64, '--epochs', 1, '--name', 'b', stdout=full, stderr=full)
        p.communicate(timeout=300)
    assert p.returncode == 0
    assert all((tmp_path/'runs'/o/'summary.json').exists() for o in 'ab')

# 4. Names

@posix
def test_names(cli, command, tmp_path):
    "A link to nothing is somebody's; a run that never began leaves its name; `runs` is a file"
    little = '--limit', 64, '--epochs', 1
    (cli.cwd/'runs'/'dead').mkdir(parents=True)
    (cli.cwd/'runs'/'dead'/'.lock').touch()
    (cli.cwd/'runs'/'dead'/'.settings.json.0-1.tmp').touch()
    for name in ('link','digits-simclr-1'): (cli.cwd/'runs'/name).symlink_to(tmp_path/'nowhere')
    (cli.cwd/'runs'/'file').touch()
    for name in ('link','file'): assert f'runs/{name} exists' in command(clae_train, *little, '--name', name)
    assert cli('clae_train', *little).returncode == 0 and (cli.cwd/'runs'/'digits-simclr-2'/'summary.json').exists()
    assert cli('clae_train', *little, '--name', 'dead').returncode == 0
    assert not (tmp_path/'nowhere').exists()

@posix
@pytest.mark.parametrize('make', [Path.touch, lambda o: o.symlink_to('nothing')], ids=['file','link'])
def test_no_folder_where_one_is_needed(cli, command, make):
    for name,func,args in (('runs',clae_train,['--limit',64]),
                           ('res',clae_table,['random','--scale','smoke','--out','res']),
                           ('res',clae_table,['random','--scale','smoke','--out','res/deep'])):
        if not os.path.lexists(cli.cwd/name): make(cli.cwd/name)
        err = command(func, *args)
        assert 'is no folder' in err and 'move it away' in err, err

def test_no_folder_is_named(command):
    for data in ('cifar10=','photos='):
        assert f'{data}FOLDER' in command(clae_table, 'random', '--scale', 'smoke', '--data', data)

def test_no_room_to_begin(cli, full_for):
    "The name is free again"
    full_for.add('settings.json')
    assert cli('clae_train', '--limit', 64, '--epochs', 1, '--name', 'run').returncode == 2
    full_for.clear()
    assert cli('clae_train', '--limit', 64, '--epochs', 1, '--name', 'run').returncode == 0

# 5. Children and parents

def processes_of(folder):
    "Numbers of processes at work in a folder"
    found = []
    for o in Path('/proc').iterdir():
        try:
            here = o.name.isdecimal() and Path(os.readlink(o/'cwd')) == folder
            if here and (o/'stat').read_text().rpartition(')')[2].split()[0] != 'Z': # no zombie
                found.append(int(o.name))
        except OSError: pass
    return found

def workers_of(parent):
    "The processes that do trials"
    def _args(o): return (Path('/proc')/str(o)/'cmdline').read_text()
    children = (Path('/proc')/str(parent)/'task'/str(parent)/'children').read_text().split()
    return [int(o) for o in children if 'spawn_main' in _args(o)]

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
def test_killed_parents_and_children(tmp_path, pytestconfig):
    """SIGKILL or SIGTERM at random moments of a sweep: nobody is left, and the table is that of a sweep
    that nobody disturbed"""
    args = '1', '--scale', 'smoke', '--workers', 2, '--data', tmp_path/'photos'
    draw_images(tmp_path/'photos', 600, seed=3)
    (tmp_path/'calm').mkdir(); (tmp_path/'killed').mkdir()
    assert (p := start(tmp_path/'calm', *args, command='clae_table')).communicate(timeout=600) and p.returncode == 0
    rng,moments = random.Random(pytestconfig.getoption('--moments')),4*pytestconfig.getoption('--moments')
    for i in range(moments):
        p = start(tmp_path/'killed', *args, command='clae_table', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: p.poll() is not None or len(workers_of(p.pid)) == 2)
        time.sleep(rng.uniform(0, 20))
        if p.poll() is not None: break
        whom,sig = (('parent',signal.SIGKILL), ('child',signal.SIGKILL),
                    ('parent',signal.SIGTERM), ('child',signal.SIGKILL))[i%4]
        if whom == 'child' and (children := workers_of(p.pid)):
            os.kill(rng.choice(children), sig)
            time.sleep(1)
            p.kill()
        else: p.send_signal(sig)
        p.wait()
        wait_for(lambda: not processes_of(tmp_path/'killed'), 10)
        print(f'{signal.Signals(sig).name} to the {whom}: '
              f'{len([*(tmp_path/"killed").rglob("summary.json")])} trials are done')
    for _ in range(2): # the first run may find a trial that a killed one has left as failed
        p = start(tmp_path/'killed', *args, command='clae_table')
        out,err = p.communicate(timeout=900)
        if p.returncode == 0: break
    assert p.returncode == 0, err
    tables = [pd.read_csv(tmp_path/o/'results'/'trials.csv').set_index('trial').sort_index() for o in ('calm','killed')]
    a,b = (t.drop(columns=[c for c in t if 'seconds' in c]) for t in tables)
    pd.testing.assert_frame_equal(a, b, check_exact=True)

# 6. Ranks

@pytest.mark.parametrize('left', [dict(RANK='1'), dict(RANK='abc'), dict(RANK='1', LOCAL_RANK='1'),
                                  dict(WORLD_SIZE='1', RANK='0')], ids=str)
def test_leftovers_of_a_launcher(cli, monkeypatch, left):
    for k,v in left.items(): monkeypatch.setenv(k, v)
    # fastai's callback asks, too
    r = cli('clae_train', '--limit', 64, '--epochs', 1, '--name', 'run', '--log', 'tensorboard')
    assert r.returncode == 0 and 'training images' in r.stdout, r.stderr
    assert [*(cli.cwd/'runs'/'run'/'tensorboard').iterdir()]
    assert checkpoints(cli.cwd/'runs'/'run'/'checkpoints') and (cli.cwd/'runs'/'run'/'summary.json').exists()

def test_leftovers_in_python(monkeypatch, quiet, tmp_path):
    "A script of one process is one, and saves"
    monkeypatch.setenv('RANK', '1')
    assert launched() == (0,1) and this_rank() == 0
    dls = get_dls('digits', limit=64, bs=32)
    quiet(clae_learner(dls, resnet8, cbs=Checkpoint(tmp_path))).fit(1)
    assert len(checkpoints(tmp_path)) == 1

@pytest.mark.parametrize('left', [dict(WORLD_SIZE='2'), dict(WORLD_SIZE='2', RANK='abc'), dict(WORLD_SIZE='x')],
                         ids=str)
def test_half_of_a_launcher(command, monkeypatch, left):
    for k,v in left.items(): monkeypatch.setenv(k, v)
    assert 'unset WORLD_SIZE' in command(clae_train, '--limit', 64, '--epochs', 1)

def test_two_that_write_one_file(cli, command, monkeypatch):
    "The second hears of the first before it works"
    draw_images(cli.cwd/'photos')
    assert cli('clae_train', '--path', 'photos', *quick, '--size', 16, '--name', 'a').returncode == 0
    args,said = ('a','--path','photos'),[]
    write = runs.write_features
    def _write(*args, **kwargs):
        said.append(command(clae_embed, *args_again))
        return write(*args, **kwargs)
    args_again = args
    with monkeypatch.context() as m:
        m.setattr(runs, 'write_features', _write)
        assert cli('clae_embed', *args).returncode == 0
    assert 'Another process is at work on' in said[0] and 'features.csv' in said[0]
    assert 'nothing is overwritten' in command(clae_embed, *args)
    assert not list(cli.cwd.glob('.*'))
