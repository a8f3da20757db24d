"What the guides name exists: options of the commands, names of the library, benchmarks; and they stay small."
import json, re
from pathlib import Path
import pytest
import clae_fastai.all as everything
from clae_fastai import cli

root = Path(__file__).parent.parent
guides = sorted((root/'nbs'/'guides').glob('*.ipynb'))
options = {o for name in dir(cli) if name.startswith('clae_') for o in cli.parser(getattr(cli, name))._option_string_actions}
elsewhere = {'--nproc_per_node','--config-path','--config-name','--tiny'} # of torchrun, solo-learn, a benchmark

def cells(guide, kind): return [''.join(c['source']) for c in json.loads(guide.read_text())['cells'] if c['cell_type'] == kind]

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
    shown = [c for c in json.loads(guide.read_text())['cells'] if c['cell_type'] == 'code' and '#| hide' not in ''.join(c['source'])]
    assert any(c['outputs'] for c in shown)
    assert not [o for c in shown for o in c['outputs'] if o['output_type'] == 'error']

def test_options_are_found(): assert {'--lr','--on-nonfinite','--path'} <= options # the parsers were read

pages = [*guides, *sorted((root/'nbs'/'tutorials').glob('*.ipynb')), root/'nbs'/'cost.ipynb']

@pytest.mark.parametrize('page', pages, ids=lambda o: o.stem)
def test_code_is_narrow_enough_to_be_read(page):
    "Lines of code that are shown, beside a table of contents at 1280 pixels"
    shown = [o for o in cells(page, 'code') if '#| hide' not in o and '#| echo: false' not in o]
    assert not [line for o in shown for line in o.splitlines() if len(line) > 84]
