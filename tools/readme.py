#!/usr/bin/env python3
"""Make README.md of nbs/index.ipynb: its prose, its code, and what that printed. No Quarto needed.
`python tools/readme.py`"""
import json, re
from pathlib import Path

root = Path(__file__).parent.parent

def text(o): return ''.join(o) if isinstance(o, list) else o

def output(o):
    data = o.get('data', {})
    if 'text/markdown' in data: return relink(text(data['text/markdown']).strip())
    return '\n'.join('    ' + l for l in text(o.get('text') or data.get('text/plain', '')).rstrip().splitlines())

def relink(md):
    "On GitHub a link to a page leads to its notebook"
    return re.sub(r'\]\(((?:\w+/)?[\w.]+\.ipynb)', r'](nbs/\1', md)

def render(cell):
    src = text(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return relink(src)
    if cell['cell_type'] != 'code' or not src or '#| hide' in src: return ''
    code = '\n'.join(l for l in src.splitlines() if not l.startswith('#|')).strip()
    if '#| output: false' in src: return f'```python\n{code}\n```'
    # a picture's own file, and not its copy in the notebook
    if picture := re.search(r"Image\('\.\./(.+?)',\s+alt='(.+?)'\)", code): return f'![{picture[2]}]({picture[1]})'
    return '\n\n'.join(([] if '#| echo: false' in src else [f'```python\n{code}\n```'])
                       + list(filter(None, map(output, cell['outputs']))))

cells = json.loads((root/'nbs/index.ipynb').read_text())['cells']
parts = [p for p in map(render, cells) if p]
(root/'README.md').write_text('<!-- Made of nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n'
                              + '\n\n'.join(parts) + '\n')
