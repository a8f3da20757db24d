"What goes into the wheel and the source distribution, and that the wheel works outside the repository."
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import clae_fastai

root = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "Wheel and sdist of the files under version control"
    pytest.importorskip('build', reason="needs pip install -e '.[test]'")
    src,out = tmp_path_factory.mktemp('src'),tmp_path_factory.mktemp('dist')
    for f in subprocess.run(['git','ls-files','-z'], cwd=root, capture_output=True, text=True,
                            check=True).stdout.split('\0'):
        if f and (root/f).is_file():
            (src/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/f, src/f)
    p = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, src],
        capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    return out

def test_contents(dist):
    wheel, = dist.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f.relative_to(root).as_posix() for f in (root/'clae_fastai').rglob('*.py')}
    extras = {'clae_fastai/imagenet100.txt','clae_fastai/measure/report.html'}
    assert len(modules) > 25
    assert {o for o in names if '.dist-info/' not in o} == modules | extras
    sdist, = dist.glob('*.tar.gz')
    inside = {o.partition('/')[2] for o in tarfile.open(sdist).getnames()}
    assert modules | extras | {'settings.ini','setup.py','README.md','LICENSE','CITATION.cff'} <= inside
    assert not [o for o in inside
                if o.startswith(('tests/','results/','benchmarks/','nbs/')) or o.endswith(('.npz','.png','.csv'))]

def test_the_description_needs_no_files(dist):
    "Links and pictures of README.md as a package index shows it: whole addresses, of files that are there"
    wheel, = dist.glob('*.whl')
    files = zipfile.ZipFile(wheel)
    metadata, = [o for o in files.namelist() if o.endswith('.dist-info/METADATA')]
    text = files.read(metadata).decode()
    links = re.findall(r'\]\((\S+?)\)', text)
    home = re.search('^(?:Home-page|Project-URL: Homepage)[:,] (.*)$', text, re.M)[1]
    assert len(links) > 10 and [o for o in links if not o.startswith('https://')] == []
    ours = [re.match(f'{home}/(blob|raw)/main/(.*)', o) for o in links if o.startswith(f'{home}/')]
    assert 'results/hero.png' in [m[2] for m in ours if m[1] == 'raw']
    assert [m[2] for m in ours if not (root/m[2].partition('#')[0]).is_file()] == []

def test_citation():
    "CITATION.cff says what the package says, and names the paper"
    yaml = pytest.importorskip('yaml', reason="needs pip install -e '.[dev]'")
    cite = yaml.safe_load((root/'CITATION.cff').read_text())
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    cfg = cfg['DEFAULT']
    assert {'cff-version','message','title','authors'} <= set(cite) # what the format asks for
    assert cite['version'] == cfg['version'] == clae_fastai.__version__
    assert [cite[o] for o in ('title','repository-code')] == [cfg['title'], cfg['git_url']]
    assert cite['authors'] == [dict(name=cfg['author'])] and cite['abstract'] == cfg['description']
    paper = cite['preferred-citation']
    assert [o['family-names'] for o in paper['authors']] == ['Ho','Vasconcelos'] and '2010.12050' in paper['url']
    bibtex = (root/'README.md').read_text().partition('```bibtex')[2]
    assert all(str(o) in bibtex
               for o in (paper['title'], paper['year'], paper['volume'], paper['collection-title'], paper['url']))

@pytest.mark.slow
def test_the_wheel_runs_outside_the_repository(dist, tmp_path):
    "In an environment of its own, which borrows only the dependencies"
    wheel, = dist.glob('*.whl')
    env = tmp_path/'env'
    venv.create(env, with_pip=True)
    python = env/'bin'/'python'
    clean = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'}
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', wheel], check=True, env=clean)
    site = next(env.glob('lib/python*/site-packages'))
    (site/'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    def run(*args):
        quiet = {**clean, 'PYTHONWARNINGS': 'ignore'}
        return subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, env=quiet)
    where = run(python, '-c', 'import clae_fastai; print(clae_fastai.__file__)').stdout
    assert where.strip().startswith(str(site)), where
    p = run(env/'bin'/'clae_train', '--limit', '64', '--epochs', '1')
    assert p.returncode == 0 and (tmp_path/'runs'/'digits-simclr-1'/'encoder.safetensors').exists(), p.stderr
