#!/usr/bin/env python3
"Make README.md of nbs/index.ipynb: its prose, its code, and what that printed. No Quarto needed. `python tools/readme.py`"
import json, re
from pathlib import Path

root = Path(__file__).parent.parent
# on GitHub a link to a page leads to its notebook
pages = {re.sub(r'^\d+[a-z]*_', '', p.stem): p.relative_to(root).as_posix() for p in (root/'nbs').glob('*.ipynb')}

def text(o): return ''.join(o) if isinstance(o, list) else o

def output(o):
    data = o.get('data', {})
    if 'text/markdown' in data: return text(data['text/markdown']).strip()
    return '\n'.join('    ' + l for l in text(o.get('text') or data.get('text/plain', '')).rstrip().splitlines())

def render(cell):
    src = text(cell['source']).strip()
    if cell['cell_type'] == 'markdown':
        src = re.sub(r'\]\(([\w.]+)\.html\)', lambda m: f']({pages[m[1]]})', src) # an unknown page is an error
        return re.sub(r'\]\(((?:\w+/)?[\w.]+\.ipynb)\)', lambda m: m[0] if m[1].startswith('nbs/') else f'](nbs/{m[1]})', src)
    if cell['cell_type'] != 'code' or not src or '#| hide' in src: return ''
    code = '\n'.join(l for l in src.splitlines() if not l.startswith('#|')).strip()
    if '#| output: false' in src: return f'```python\n{code}\n```'
    # a picture's own file, and not its copy in the notebook
    if picture := re.search(r"Image\('\.\./(.+?)', alt='(.+?)'\)", code): return f'![{picture[2]}]({picture[1]})'
    return '\n\n'.join(([] if '#| echo: false' in src else [f'```python\n{code}\n```']) + list(filter(None, map(output, cell['outputs']))))

cells = json.loads((root/'nbs/index.ipynb').read_text())['cells']
parts = [p for p in map(render, cells) if p]
(root/'README.md').write_text('<!-- Made of nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n' + '\n\n'.join(parts) + '\n')
