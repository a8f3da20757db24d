"""Look at all of fastai, import the modules that are named, and print what is another than before:
`patches_worker.py NAMES`"""
import importlib
import json
import pkgutil
import sys
import types

import fastai
import plum

watched = 'fastai','fastcore','fasttransform'

def parts(v):
    "What an attribute consists of, where it could be changed in place"
    if isinstance(v, plum.Function): return [m.implementation for m in v.methods]
    if isinstance(v, plum.Dispatcher): return [*v.functions, *v.functions.values()]
    if isinstance(v, types.FunctionType): return [v.__code__, v.__defaults__, v.__kwdefaults__, *vars(v).values()]
    if isinstance(v, (staticmethod,classmethod)): return [v.__func__, *parts(v.__func__)]
    if isinstance(v, property): return [v.fget, v.fset, v.fdel]
    if isinstance(v, types.SimpleNamespace): return [*vars(v), *vars(v).values()]
    if isinstance(v, dict): return [*v, *v.values()]
    return [*v] if isinstance(v, (list,tuple,set)) else []

def look():
    """`{(owner, name of an attribute): (what it is, its parts)}` of modules and of their classes;
    held, so that no id is used twice"""
    mods = [m for n,m in list(sys.modules.items()) if n.split('.')[0] in watched and isinstance(m, types.ModuleType)]
    classes = {o for m in mods for o in vars(m).values()
               if isinstance(o, type) and str(o.__module__).split('.')[0] in watched}
    names = {m: m.__name__ for m in mods} | {c: f'{c.__module__}.{c.__qualname__}' for c in classes}
    return {(name,k): (v,parts(v)) for owner,name in names.items() for k,v in list(vars(owner).items())
            if not isinstance(v, types.ModuleType)}

def same(a, b):
    def ids(o): return sorted(map(id, o[1]))
    return a[0] is b[0] and ids(a) == ids(b)

def import_or_not(name):
    try: importlib.import_module(name)
    except Exception: pass # it needs a package that is not installed

for m in pkgutil.walk_packages(fastai.__path__, 'fastai.', onerror=lambda name: None): import_or_not(m.name)
importlib.import_module('fastai.vision.all')
importlib.import_module('fastai.distributed')
before = look()
for name in sys.argv[1:]: importlib.import_module(name)
after = look()
owners = {o for o,_ in before}
changed = [f'{o}.{k} ' + ('is gone' if (o,k) not in after else 'is another') for o,k in before
           if (o,k) not in after or not same(before[o,k], after[o,k])]
print(json.dumps(sorted(changed + [f'{o}.{k} is new' for o,k in after if o in owners and (o,k) not in before])))
