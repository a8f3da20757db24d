"""A newcomer's path: the home page, which is README.md: how long it is, in which order, and every line of it
that a machine reads, copied as it stands, in an empty folder. (`.ci/run` runs the two lines that install,
`nbdev_test` tutorials and guides.)"""
import ast
import json, os, re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
readme = (root/'README.md').read_text()
fenced = re.compile(r'^```(\w*)\n(.*?)^```$', re.M|re.S)
shell = [l.strip() for l in readme.splitlines() if l.startswith('    ')]
commands = [l for l in shell if l.startswith('clae_')] + re.findall(r'`(clae_\w+ [^`]+)`', readme)
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini')

def code(kind): return [text for k,text in fenced.findall(readme) if k == kind]
def is_word(o): return re.search(r'\w', o)

def test_it_is_short(): assert len(list(filter(is_word, fenced.sub('', readme).split()))) <= 700

parts = ['# clae_fastai', '![', '**For you if**', '**Not for you if**',
         '## Install', '    git clone ', '    pip install -e . && clae_train',
         "    pip install -e '.[dev]' && nbdev_test && pytest",
         '## Your images', '    clae_train --path', '| your folder |', '## In Python', '```python',
         '## What it costs', '## What to expect', '## Read on', '## Citation', '```bibtex', '## Licence']

def test_its_order():
    "What a visitor asks, one after the other, each once, and no other heading"
    lines = readme.splitlines()
    found = [[i for i,l in enumerate(lines) if l.startswith(p)] for p in parts]
    assert [p for p,o in zip(parts, found) if len(o) != 1] == []
    assert found == sorted(found)
    headings = {o for o in fenced.sub('', readme).splitlines() if o.startswith('#')}
    assert headings - {p for p in parts if p[0] == '#'} == {'## Is it for you?'}

def test_one_sentence_and_a_picture():
    opening = readme.partition('![')[0].split('\n\n')
    assert [o for o in opening if o and o[0] not in '<#>'] == [opening[3]]
    assert opening[3].count('.') == 1 and opening[3].endswith('.')
    picture, = re.findall(r'!\[[^\]]+\]\((.+?)\)', readme)
    assert (root/picture).is_file()

def test_versions_are_those_of_the_package():
    python,fastai = re.search(r'Python (\S+) or newer; .*fastai \((\S+) or newer\)', readme).groups()
    assert python == settings['DEFAULT']['min_python']
    assert f'fastai>={fastai}' in settings['DEFAULT']['requirements'].split()

@pytest.mark.parametrize('word', ['GPU', 'what it is worth', 'units of', 'harder to tell', 'temperature', '--every '])
def test_words_that_a_visitor_need_not_know(word): assert word not in fenced.sub('', readme)

def test_it_links_every_tutorial_and_guide():
    pages = {p.relative_to(root).as_posix()
             for o in ('tutorials','guides') for p in (root/'nbs'/o).glob('[!._]*.ipynb')}
    links = re.findall(r'\]\(([^)]+)\)', readme)
    assert pages | {f'nbs/{o}.ipynb' for o in ('results','digits','others','modules')} <= set(links)
    assert [o for o in links if '://' not in o and not (root/o).is_file()] == []

def test_its_numbers_are_those_of_the_results(monkeypatch):
    "What its cells show is what their code makes of the files, and the caveat in words is the verdict of the claims"
    monkeypatch.chdir(root/'nbs')
    cells = [c for c in json.loads(Path('index.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    names,shown = {},0
    for source,outputs in ((''.join(c['source']), c['outputs']) for c in cells):
        if 'clae_fastai.all' in source or 'unlink' in source: continue # Python for a visitor, tested below
        text = [''.join(o['data']['text/markdown']) for o in outputs if 'text/markdown' in o['data']]
        *body,last = ast.parse(source).body
        exec('\n'.join(map(ast.unparse, body)) if text else source, names)
        if text: assert text == [eval(ast.unparse(last), names).data]
        shown += len(text)
    assert shown == 5
    claims = (root/'results'/'claims.md').read_text().splitlines()
    def claim(text):
        line, = [l for l in claims if f'Not in the paper: {text} |' in l]
        return line
    line = claim('CLAE in each fourth step with a linear head: above SimCLR')
    assert 'n = 8' in line and line.endswith('| kNN: within noise<br>LR: within noise |')
    line = claim('under weak views, CLAE of eps .1 in each step with a linear head: above SimCLR')
    assert 'n = 5' in line and line.endswith('| kNN: reproduced<br>LR: reproduced |')
    assert re.search(r'LR: .*?difference \+4\.[5-9]|LR: .*?difference \+5\.[0-4]', line) # five points

def test_the_line_that_clones(tmp_path):
    "As it stands, of this repository in the place of its address"
    line, = [l for l in shell if l.startswith('git clone ')]
    instead = dict(GIT_CONFIG_COUNT='1', GIT_CONFIG_KEY_0=f'url.{root}.insteadOf',
                   GIT_CONFIG_VALUE_0=settings['DEFAULT']['git_url'])
    res = subprocess.run(f'{line} && ls', shell=True,
        cwd=tmp_path, env={**os.environ, **instead}, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    assert {'setup.py','nbs','README.md'} <= set(res.stdout.split())

# Folders as the table has them

layouts = [(re.findall('`([^`]+/[^`]+)`', l), '--unlabelled' in l, *map(str.strip, l.split('|')[2:4]))
           for l in readme.splitlines() if re.match(r'\| `\w+/', l)]

def make_folder(folder, files, digits_dir, n=80):
    "`n` images in the place of each `1.jpg`, of a cat and of a dog where there are cats"
    images = sorted((digits_dir/'flat').glob('[!.]*'))
    for file in [f.replace('cat', o) for f in files for o in ('cat','dog')]:
        (folder/file).parent.mkdir(parents=True, exist_ok=True)
        for i in range(n): shutil.copy(images[i], (folder/file).with_name(f'{i}.png'))

@pytest.mark.parametrize('files,unlabelled,labels,held_out', layouts)
def test_layouts_of_folders(files, unlabelled, labels, held_out, digits_dir, tmp_path):
    from clae_fastai.data.catalogue import get_dls
    make_folder(tmp_path, files, digits_dir)
    dls = get_dls('folder', tmp_path/'photos', bs=4, unlabelled=unlabelled)
    assert list(getattr(dls, 'vocab', ())) == {'none': [], 'names of folders': ['cat','dog']}[labels]
    n = len(dls.train_ds) + len(dls.valid_ds)
    assert len(dls.valid_ds) == {'1 in 20': n//20, '1 in 5': n//5, '`test`': n//2}[held_out]

def test_there_are_layouts(): assert len(layouts) == 4

# Commands and Python

@pytest.mark.slow
def test_commands(cli, digits_dir):
    "One after the other, on a folder of images without labels"
    assert len(commands) > 3
    make_folder(cli.cwd, ['photos/1.jpg'], digits_dir)
    for line in commands:
        name,*args = shlex.split(line)
        res = cli(name, *args)
        assert res.returncode == 0, (line, res.stderr[-2000:])
    assert {'runs','photos','features.csv'} == {o.name for o in cli.cwd.iterdir()}
    assert {'encoder.safetensors','report.html'} <= {o.name for o in (cli.cwd/'runs'/'mine').iterdir()}

@pytest.mark.parametrize('option', [o for o in re.findall(r'`(--[\w-]+)', readme)])
def test_options_exist(option, cli): assert option in cli('clae_train', '--help').stdout

def test_python_is_twelve_lines():
    block, = code('python')
    assert len([l for l in block.splitlines() if l.strip()]) <= 12

@pytest.mark.slow
def test_python_of_the_readme(tmp_path):
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': 'ignore'}
    block, = code('python')
    res = subprocess.run([sys.executable, '-c', block],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, env=env)
    assert res.returncode == 0, res.stderr[-3000:]
    assert 'knn' in res.stdout.lower(), res.stdout[-2000:]
    assert [o.name for o in tmp_path.iterdir()] == ['encoder.safetensors']
