"""The house stands: every module has its notebook, imports run downward, no private name leaves its module,
lines stay short."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
by_hand = {'all','_modidx'} # the modules that no notebook makes

def notebooks(house):
    """`[(name, the module that it exports or None)]` of the numbered notebooks, in their order,
    which is the order of the modules"""
    def exports(file):
        code = [''.join(c['source']) for c in json.loads(file.read_text())['cells'] if c['cell_type'] == 'code']
        return next(iter(re.findall(r'^#\| *default_exp +(\S+)', '\n'.join(code), re.M)), None)
    return [(f.stem.partition('_')[2], exports(f)) for f in sorted((house/'nbs').glob('[0-9]*_*.ipynb'))]

def modules(house):
    "`{name: file}` of the library's modules, packages left out"
    lib = house/'clae_fastai'
    return {'.'.join(f.relative_to(lib).with_suffix('').parts): f
            for f in sorted(lib.rglob('*.py')) if f.stem != '__init__'}

def package_of(module): return 'clae_fastai' + '.'.join(['', *module.split('.')[:-1]])

def imports(file, package, known):
    """`[(line, module, name, called)]` of all that `file`, of a module in `package`, imports from the library,
    at its top or later: the `name` of a `module`, or a whole module (then `name` is None),
    and how it is called in the file"""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): found += [(node.lineno, o.name, None, o.asname or o.name) for o in node.names]
        if isinstance(node, ast.ImportFrom):
            parts = package.split('.')
            above = parts[:len(parts) - node.level + 1] if node.level else []
            name = '.'.join([*above, *filter(None, [node.module])])
            found += [(node.lineno, name, o.name, o.asname or o.name) for o in node.names]
    ours = [(line, m.partition('.')[2], n, called) for line,m,n,called in found if m.split('.')[0] == 'clae_fastai']
    def whole(m, n): return (f'{m}.{n}'.strip('.'), None) if f'{m}.{n}'.strip('.') in known else (m, n)
    return [(line, *whole(m, n), called) for line,m,n,called in ours]

def all_imports(house):
    "`{module: imports}`"
    known = modules(house)
    return {m: imports(f, package_of(m), known) for m,f in known.items()}

# What can be wrong with a house: each returns its complaints

def homeless(house):
    "Modules and notebooks without each other, and packages that are entered twice"
    sources,mods,bad = notebooks(house),modules(house),[]
    for name,exported in sources:
        if exported != name: bad.append(f'the notebook {name} exports {exported}')
        elif name not in mods: bad.append(f'the notebook {name} has no module: nbdev_export')
    names = [n for n,_ in sources]
    bad += [f'the module {m} has no notebook: delete it' for m in mods if m not in {*names, *by_hand}]
    packages = [n.partition('.')[0] for n in names]
    again = {f for i,f in enumerate(packages) if f in packages[:i] and f != packages[i-1]}
    return bad + [f'the notebooks of {f} do not stand together' for f in sorted(again)]

def upward(house):
    "Imports of a module that comes later, or of itself, or of `all`"
    order = {n: i for i,(n,_) in enumerate(notebooks(house))} | dict(all=10**6)
    return [f'{mod}:{line} imports {to}, which is not above it'
            for mod,found in all_imports(house).items() if mod in order
            for line,to,*_ in found if to in order and order[to] >= order[mod]]

def circles(house):
    "Modules that import each other, whatever their numbers"
    graph = {m: {to for _,to,*_ in found} for m,found in all_imports(house).items()}
    while leaves := [m for m,needs in graph.items() if not needs & graph.keys()]:
        for m in leaves: del graph[m]
    return [f'in a circle, or upon one: {", ".join(graph)}'] if graph else []

def is_private(name): return bool(name) and name[0] == '_' and not name.endswith('__')

def private(house):
    "Private names that are imported from a module of the library, or taken from one, in the library and in tests"
    known,bad = modules(house),[]
    files = {f: package_of(m) for m,f in known.items() if m != '_modidx'}
    for file in [*files, *sorted((house/'tests').rglob('*.py'))]:
        here,found = file.relative_to(house).as_posix(),imports(file, files.get(file, 'tests'), known)
        bad += [f'{here}:{line} imports {name} of {m}' for line,m,name,_ in found if is_private(name)]
        whole = {called for _,_,name,called in found if name is None}
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and (m := ast.unparse(node.value)) in whole:
                bad.append(f'{here}:{node.lineno} takes {node.attr} of {m}')
    return bad

def long_lines(house):
    "Of the code in notebooks and of tests, which ruff sees as well; what nbdev writes into modules is as it is"
    sources = {f: [f.read_text()] for f in sorted((house/'tests').rglob('*.py'))}
    for f in sorted((house/'nbs').rglob('*.ipynb')):
        sources[f] = [''.join(c['source']) for c in json.loads(f.read_text())['cells'] if c['cell_type'] == 'code']
    return [f'{f.relative_to(house)}: {line[:40]}... has {len(line)} characters' for f,texts in sources.items()
            for text in texts for line in text.splitlines() if len(line) > 120]

checks = [homeless, upward, circles, private, long_lines]

@pytest.mark.parametrize('check', checks)
def test_the_house_stands(check):
    bad = check(root)
    if bad: pytest.fail('\n'.join([f'{len(bad)} complaints:', *bad[:20]]), pytrace=False)

# Each check finds what it looks for, and nothing in a house that stands

@pytest.fixture
def house(tmp_path):
    "A small house: core, and two packages of two modules"
    def notebook(name, exports):
        return json.dumps(dict(cells=[dict(cell_type='code', source=[f'#| default_exp {exports}'])]))
    code = {'core': 'def f(): pass', 'a.one': 'from ..core import *',
            'a.two': 'from .one import *\nfrom .. import __version__',
            'b.one': 'from ..a.two import *\nfrom clae_fastai import core',
            'b.two': 'from . import one\nimport clae_fastai.core'}
    for i,(name,text) in enumerate(code.items()):
        for file,content in ((f'nbs/{i:02}_{name}.ipynb', notebook(name, name)),
                             (f'clae_fastai/{name.replace(".", "/")}.py', text)):
            (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/file).write_text(content)
    (tmp_path/'clae_fastai'/'all.py').write_text('from clae_fastai.b.two import *')
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests'/'test_a.py').write_text('from clae_fastai.all import f, g\nfrom clae_fastai import core')
    def change(file, text=None):
        if text is None: (tmp_path/file).unlink()
        else: (tmp_path/file).write_text(text)
        return {c.__name__: c(tmp_path) for c in checks}
    return change

damages = [
    (upward, 'clae_fastai/a/one.py', 'from ..b.one import *'),
    (upward, 'clae_fastai/a/one.py', 'def f():\n    from .two import g'),
    (upward, 'clae_fastai/core.py', 'from .a import two'),
    (upward, 'clae_fastai/b/two.py', 'from clae_fastai.all import *'),
    (circles, 'clae_fastai/core.py', 'import clae_fastai.b.one'),
    (homeless, 'clae_fastai/a.py', ''), # as an export leaves it beside the folder `a`
    (homeless, 'clae_fastai/b/two.py', None),
    (homeless, 'nbs/02_a.two.ipynb', None),
    (homeless, 'nbs/09_a.three.ipynb', '{"cells": []}'),
    (private, 'clae_fastai/b/two.py', 'from .one import _f'),
    (private, 'clae_fastai/b/two.py', 'from . import one\none._f()'),
    (private, 'tests/test_a.py', 'from clae_fastai.a.one import f, _g'),
    (private, 'tests/test_a.py', 'import clae_fastai.core as c\nc._f()'),
    (long_lines, 'nbs/00_core.ipynb', json.dumps(dict(cells=[dict(cell_type='code', source=[f'x = {"1"*117}'])]))),
    (long_lines, 'tests/test_a.py', f'x = {"1"*117}')]

@pytest.mark.parametrize('check,file,text', damages)
def test_what_is_wrong_is_found(house, check, file, text):
    assert not any(house('tests/test_b.py', '').values())
    assert house(file, text)[check.__name__]

# The method on one screen, and the size of the whole

def test_the_method_on_one_screen():
    "`CLAECallback`, docments and blank lines included"
    text = (root/'clae_fastai'/'method'/'callback.py').read_text()
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == 'CLAECallback')
    lines = text.splitlines()[node.lineno-1:node.end_lineno]
    assert [ast.unparse(b) for b in node.bases] == ['Callback']
    n,widest = len(lines),max(map(len, lines))
    assert n <= 45 and widest <= 120

def test_commands_import_nothing_heavy():
    "The parsers need Python alone: neither torch nor fastai, nor anything else that was installed, nor another module"
    code = 'import sys; before = set(sys.modules); import clae_fastai.cli; print(*set(sys.modules) - before)'
    res = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    other = [o for o in res.stdout.split() if o.split('.')[0] not in sys.stdlib_module_names]
    assert sorted(other)[:9] == ['clae_fastai','clae_fastai.cli'] # of a thousand others the first ones will do

def test_what_is_newest_is_there(pytestconfig):
    "The list of tests for the newest line, in pyproject.toml, names files and functions that exist"
    names = pytestconfig.getini('newest')
    files = {o: root/'tests'/o.partition('::')[0] for o in names}
    assert names and [o for o,f in files.items() if not f.is_file()] == []
    assert [o for o,f in files.items() if '::' in o and f'def {o.partition("::")[2]}(' not in f.read_text()] == []

def test_the_table_of_modules():
    "Every module has its line, in their order, and links to its notebook"
    table = re.findall(r'^\| \[([\w.]+)\]\(([\w.]+)\) \|',
        (root/'nbs'/'modules.ipynb').read_text().replace('    "', ''), re.M)
    files = [f.name for f in sorted((root/'nbs').glob('[0-9]*_*.ipynb'))]
    assert table == [(f.removesuffix('.ipynb').partition('_')[2], f) for f in files]

def test_pages_do_not_show_a_machine():
    "No warning of an installed package, with its place, stays in a notebook's outputs"
    assert [f.name for f in (root/'nbs').rglob('*.ipynb') if '/site-packages/' in f.read_text()] == []
