"No public name without documentation: a docstring, and a docment for every argument and result."
import importlib
import inspect
import pkgutil
from dataclasses import fields, is_dataclass

import pytest
from fastcore.docments import docments

import clae_fastai

modules = [m.name.removeprefix('clae_fastai.') for m in pkgutil.walk_packages(clae_fastai.__path__, 'clae_fastai.')
           if not m.ispkg and m.name != 'clae_fastai.all' and '._' not in m.name]
names = [(m,n) for m in modules for n in importlib.import_module(f'clae_fastai.{m}').__all__]

def undocumented(f):
    "Arguments of `f` without a docment"
    docs = docments(f, returns=False)
    named = [k for k,p in inspect.signature(f).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [k for k in named if k != 'self' and not docs.get(k)]

def test_every_module_is_in_all():
    import clae_fastai.all as everything
    hidden = {'cli','runs','paper.experiments'} # commands, and what they are made of
    for m,n in names:
        if m not in hidden: assert hasattr(everything, n), f'{m}.{n}'

@pytest.mark.parametrize('module,name', names)
def test_documented(module, name):
    o = getattr(importlib.import_module(f'clae_fastai.{module}'), name)
    if not callable(o): return # a constant, which the notebook describes
    assert (inspect.getdoc(o) or '').strip()
    docs = docments(o, returns=False)
    if is_dataclass(o): assert not (missing := [f.name for f in fields(o) if not docs.get(f.name)]), missing
    elif inspect.isclass(o): assert '__init__' not in vars(o) or not undocumented(o.__init__), undocumented(o.__init__)
    else: assert not undocumented(o), undocumented(o)
