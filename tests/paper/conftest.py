"Sweeps that are done once, in whatever process of pytest, for all tests that look at them."
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import pytest

@pytest.fixture(scope='session')
def once(tmp_path_factory):
    """`once(name, make)`: a folder, and what `make(folder)` returned, as JSON has it.
    The first of pytest's processes that asks calls it, and the others wait"""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: root = root.parent
    def _once(name, make):
        folder,done = root/name,root/f'{name}.json'
        with filelock.FileLock(root/f'{name}.lock'):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                done.write_text(json.dumps(make(folder)))
        return folder,json.loads(done.read_text())
    return _once

@dataclass
class State:
    "Of a sweep's folder: its finished trials, with the time of their summaries, and how often training has started"
    done:dict
    starts:int

def state(out):
    done = {f.parent.name: f.stat().st_mtime_ns for f in out.glob('runs/*/summary.json')}
    return State(done, sum(f.read_text().count(' training images of ') for f in out.glob('runs/*/log.txt')))

@dataclass
class Sweep:
    "Table 1 at smoke by `clae_table`: killed half-way, then gone on with by two processes at once"
    out:Path
    killed:State
    texts:list # of the two
    finished:State
    state = staticmethod(state)

def _kill_and_go_on(folder):
    exe = Path(sys.executable).with_name('clae_table')
    def start():
        return subprocess.Popen([exe, '1', '--scale', 'smoke'], cwd=folder, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    out,p = folder/'results',start()
    while len(state(out).done) < 3:
        assert p.poll() is None, p.stdout.read()
        time.sleep(.05)
    p.kill()
    p.communicate()
    killed = state(out)
    ps = [start() for _ in range(2)]
    texts = [p.communicate(timeout=600)[0] for p in ps]
    assert [p.returncode for p in ps] == [0,0], texts
    return dict(killed=asdict(killed), texts=texts, finished=asdict(state(out)))

@pytest.fixture(scope='session')
def smoke(once):
    folder,o = once('smoke', _kill_and_go_on)
    return Sweep(folder/'results', State(**o['killed']), o['texts'], State(**o['finished']))
