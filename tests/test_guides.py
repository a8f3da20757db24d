"What the guides name exists: options of the commands, names of the library, benchmarks; and they stay small."
import json, re, shlex
from pathlib import Path
import PIL.Image
import pytest
import clae_fastai.all as everything
from clae_fastai import cli

root = Path(__file__).parent.parent
guides = sorted((root/'nbs'/'guides').glob('*.ipynb'))
options = {o for name in dir(cli) if name.startswith('clae_')
           for o in cli.parser(getattr(cli, name))._option_string_actions}
elsewhere = {'--nproc_per_node','--config-path','--config-name','--tiny'} # of torchrun, solo-learn, a benchmark

def cells(guide, kind):
    return [''.join(c['source']) for c in json.loads(guide.read_text())['cells'] if c['cell_type'] == kind]

@pytest.mark.parametrize('guide', guides, ids=lambda o: o.stem)
def test_options_exist(guide):
    used = {o for text in cells(guide, 'markdown') for o in re.findall(r'(?<![\w-])--[a-z][\w-]*', text)}
    assert not used - options - elsewhere, used - options - elsewhere

@pytest.mark.parametrize('guide', guides, ids=lambda o: o.stem)
def test_views_and_choices_exist(guide):
    text = '\n'.join(cells(guide, 'markdown'))
    views = {o for o in re.findall(r"(?:--views |views=')(\w+)", text)}
    assert views <= set(everything.view_presets), views
    for script in re.findall(r'python (benchmarks/\w+\.py)', text): assert (root/script).is_file(), script

@pytest.mark.parametrize('guide', guides, ids=lambda o: o.stem)
def test_small_and_executed(guide):
    assert guide.stat().st_size < 300_000
    shown = [c for c in json.loads(guide.read_text())['cells']
             if c['cell_type'] == 'code' and '#| hide' not in ''.join(c['source'])]
    assert any(c['outputs'] for c in shown)
    assert not [o for c in shown for o in c['outputs'] if o['output_type'] == 'error']

def test_options_are_found(): assert {'--lr','--on-nonfinite','--path'} <= options # the parsers were read

pages = [*guides, *sorted((root/'nbs'/'tutorials').glob('*.ipynb')), root/'nbs'/'cost.ipynb']

@pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)
def test_code_is_narrow_enough_to_be_read(page):
    "Lines of code that are shown, beside a table of contents at 1280 pixels"
    shown = [o for o in cells(page, 'code') if '#| hide' not in o and '#| echo: false' not in o]
    assert not [line for o in shown for line in o.splitlines() if len(line) > 84]

# Commands

def commands(page):
    """Those of this library in a page's prose, as they stand, without remarks behind them;
    what ends in three dots is none"""
    text = '\n'.join(cells(page, 'markdown'))
    found = re.findall(r'(?:^ {4}|`)(clae_\w+ [^`\n]+)(?:`|$)', text, re.M)
    return [o for o in (shlex.split(line, comments=True) for line in found) if '...' not in o]

@pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)
def test_commands_are_understood(page):
    for name,*args in commands(page): cli.parser(getattr(cli, name)).parse_args(args)

def test_commands_are_found():
    found = {' '.join(o) for page in pages for o in commands(page)}
    assert {'clae_report mine', 'clae_export mine --format onnx',
            'clae_train --path photos --pretrained --epochs 20'} <= found

@pytest.mark.slow
@pytest.mark.parametrize('page', ['guides/search_and_map','guides/which_settings','tutorials/01_images'])
def test_commands_run(page, cli, digits_dir):
    "One after the other, those that take a folder of images, or what such a one has left"
    def _runs(name, *args):
        return name not in ('clae_table','clae_figure') and not {*args} & {'NAME','--recipe','--data','--pretrained'}
    for folder in ('photos','tiles','other_photos','xrays','my_images'):
        for f in (digits_dir/'grey').glob('*/*.png'):
            to = cli.cwd/folder/f.relative_to(digits_dir/'grey')
            to.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.open(f).resize((8,8)).save(to)
    ran = [o for o in commands(root/'nbs'/f'{page}.ipynb') if _runs(*o)]
    assert len(ran) > 3 and ran[0][0] == 'clae_train'
    for name,*args in ran:
        res = cli(name, *args)
        assert res.returncode == 0, (name, args, res.stderr[-2000:])
    assert {'encoder.safetensors','report.html'} <= {o.name for o in (cli.cwd/'runs'/'mine').iterdir()}
