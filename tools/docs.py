#!/usr/bin/env python3
"""Render the documentation without Quarto: `python tools/docs.py`, then open `_docs/index.html`.

nbdev processes the notebooks (signatures, links), this script writes them as Markdown, and MkDocs with the Material
theme makes the site: sidebar, search, phone and dark layouts, all of it also from `file://` and without a network.
nbconvert has none of that, and Jupyter Book 2 and Sphinx bring far more machinery along. LaTeX becomes MathML, which
browsers draw themselves."""
import ast, html, io, json, os, posixpath, re, shutil, tempfile, tokenize
from base64 import b64decode
from itertools import groupby
from pathlib import Path
from textwrap import fill
import yaml
from fastcore.script import call_parse

root = Path(__file__).resolve().parent.parent
nbs,proc,assets = root/'nbs',root/'_proc',root/'tools'/'docs'
nbsp = '\xa0'
helpers = yaml.safe_load((assets/'helpers.yml').read_text()) # by page: names, and sections as '## Title'; or 'all'

def text(o): return ''.join(o) if isinstance(o, list) else o or ''

class Page:
    "A processed notebook, and where it goes"
    def __init__(self, path): # relative to `nbs`
        self.path,self.nb = path,json.loads((proc/path).read_text())
        front = self.nb['cells'][0]
        self.meta = yaml.safe_load(text(front['source']).strip().strip('-')) if front['cell_type'] == 'raw' else {}
        self.out = path.with_name(re.sub(r'^\d+[a-z0-9]*_', '', path.stem.lower()) + '.md') # as nbdev names its html
        self.title = self.meta.get('title', self.out.stem)
        code = '\n'.join(text(c['source']) for c in json.loads((nbs/path).read_text())['cells']
                         if c['cell_type'] == 'code')
        mod = re.search(r'^#\| *default_exp +(\S+)', code, re.M)
        self.src = (root/'clae_fastai'/f'{mod[1].replace(".", "/")}.py').read_text() if mod else ''
        self.functions = functions(self.src)
        self.helpers = helpers.get(self.out.stem, []) if mod else []

# Links: to our own pages they are relative ones, whichever of its names a page is called by

def relink(md, page, pages, cfg):
    site,repo = cfg.doc_host + cfg.doc_baseurl + '/', f'{cfg.git_url}/blob/{cfg.branch}/'
    def target(m):
        url,_,anchor = m[1].partition('#')
        if not url or ('://' in url and not url.startswith(site)) or url.startswith('mailto:'): return m[0]
        path = url[len(site):] if url.startswith(site) else posixpath.normpath(f'{page.path.parent.as_posix()}/{url}')
        anchor = anchor and '#' + anchor
        if (to := pages.get(re.sub(r'\.(html|ipynb)$', '', path))):
            return f']({posixpath.relpath(to.out.as_posix(), page.out.parent.as_posix())}{anchor})'
        inside = posixpath.normpath(f'nbs/{path}') # a file beside the notebooks: on GitHub
        return f']({repo}{inside}{anchor})' if path.startswith('..') and (root/inside).is_file() else m[0]
    return re.sub(r'\]\(([^)\s]+)\)', target, md)

def type_link(typ, lookup):
    "`typ` as code, linked to its documentation where that is known"
    if '[' not in typ and '|' in typ: return r' \| '.join(type_link(o.strip(), lookup) for o in typ.split('|'))
    typ = re.sub(r'torch\.nn\.modules\.\w+\.', 'nn.', typ)
    url,torch = lookup.doc(typ),'https://docs.pytorch.org/docs/stable/'
    if typ in ('Tensor', 'torch.Tensor'):
        url = f'{torch}tensors.html#torch.Tensor'
    elif re.fullmatch(r'(torch\.)?(nn|optim)\.\w+', typ):
        url = f'{torch}generated/torch.{typ.removeprefix("torch.")}.html'
    return f'[`{typ}`]({url})' if url else f'`{typ}`'

# What `show_doc` wrote: heading, source, signature with the docments as comments, docstring

def arguments(f, src):
    "`name: (type, default, comment)` of the arguments of the function `f` and of its result, as they stand in `src`"
    tokens = tokenize.generate_tokens(io.StringIO(src).readline)
    notes = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    a,text_of = f.args, lambda o: ast.get_source_segment(src, o) if o else ''
    pos = a.posonlyargs + a.args
    defaults = [None]*(len(pos) - len(a.defaults)) + a.defaults + a.kw_defaults
    args = [(o.arg, o, d) for o,d in zip(pos + a.kwonlyargs, defaults)]
    if a.vararg: args.insert(len(pos), (f'*{a.vararg.arg}', a.vararg, None))
    if a.kwarg: args.append((f'**{a.kwarg.arg}', a.kwarg, None))
    res = {n: (text_of(o.annotation), text_of(d), notes.get(o.lineno, '')) for n,o,d in args if n != 'self'}
    if f.returns:
        own_line = not args or f.returns.end_lineno > args[-1][1].lineno # else the comment is the last argument's
        res['returns'] = (text_of(f.returns), '', notes.get(f.returns.end_lineno, '') if own_line else '')
    return res

def heading(level, name):
    shown = name.replace('_', r'\_')
    return f'<h{level} id="{name.lower()}" class="api" markdown="span">{shown}</h{level}>'

re_heading = re.compile(r'<h(\d) id="(\S+)" class="api" markdown="span">(.+?)</h\d>')

def functions(src):
    """The functions of a module by the names that `show_doc` gives them;
    a class is its `__init__`, its own or its base's"""
    res = {}
    for n in ast.parse(src).body:
        if isinstance(n, ast.FunctionDef): res[n.name] = n
        if isinstance(n, ast.ClassDef):
            methods = {o.name: o for o in n.body if isinstance(o, ast.FunctionDef)}
            of_bases = [res[b.id] for b in n.bases if isinstance(b, ast.Name) and b.id in res]
            res[n.name] = methods.get('__init__') or next(iter(of_bases), None)
            res.update({f'{n.name}.{k}': o for k,o in methods.items()})
    return res

def escaped(comment):
    "A docment as Markdown: `<class>` and `*` outside of code are themselves"
    parts = comment.split('`')
    return '`'.join(re.sub(r'(?<!\\)([*|])', r'\\\1', o.replace('<', '&lt;')) if i % 2 == 0
                    else re.sub(r'(?<!\\)\|', r'\|', o) for i,o in enumerate(parts))

re_shown = re.compile(r'''---\n\n
    (?:\[source\]\((?P<src>[^)]*)\)\{.*?\}\n\n)?
    (?P<h>\#+)\ (?P<name>.+?)\n\n
    ```python\n(?P<sig>.*?)```\s*
    (?P<doc>.*)''', re.S|re.X)

def as_table(rows):
    "Rows of text as a Markdown table, without the columns that are empty"
    cols = [i for i in range(len(rows[0])) if i == 0 or any(r[i] for r in rows[1:])]
    head,*body = [[r[i] for i in cols] for r in rows]
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [head, ['---']*len(cols), *body])

def wrapped(name, args, typ):
    "A signature, its lines broken between arguments"
    parts = [n + (t and f':{t}') + (d and f'={d}') for n,(t,d,_) in args.items() if n != 'returns']
    sig = f'{name}({", ".join(o.replace(" ", nbsp) for o in parts)})' + (typ and f'{nbsp}->{nbsp}{typ}')
    if len(sig) > 84: sig = fill(sig, 84, subsequent_indent=' '*4, break_long_words=False, break_on_hyphens=False)
    return sig.replace(nbsp, ' ')

def api(md, page, lookup):
    m = re_shown.fullmatch(md.strip())
    if not m: return md
    name,sig,table = m['name'].replace('\\', ''),m['sig'].rstrip(),''
    # a dataclass has `=<factory>`
    sig = re.sub('=<[^<>]*>', '=...', re.sub(r'^def [\w.]+', 'def f', sig)) + '\n    pass'
    try: tree = ast.parse(sig)
    except SyntaxError: sig = m['sig'].removeprefix('def ').rstrip() # some other repr that is no Python
    else:
        args,f = arguments(tree.body[0], sig),page.functions.get(name) or page.functions.get(name.split('.')[-1])
        # types and defaults as they were written; arguments from elsewhere (`delegates`), and links, as nbdev has them
        if f:
            own = arguments(f, page.src)
            def written(n, t, d, c):
                return (own[n][0] or t, own[n][1] or d, c if own[n][2] else '') if n in own else (t,d,c)
            args = {n: written(n, *o) for n,o in args.items()}
            kw = next((n for n in own if n.startswith('**')), None) # fastcore gives their comment to the result
            if kw in args and own[kw][2]: args[kw] = (*args[kw][:2], own[kw][2])
        if args.get('returns', ('','',''))[::2] == ('None',''): del args['returns'] # said of every `__init__`
        if not f and {'before_fit','after_batch'} <= args.keys():
            args = {} # a callback without arguments: fastai's events
        args = {n: (t if t != 'NoneType' else '', d, c) for n,(t,d,c) in args.items()} # said of every `x=None`
        sig = wrapped(name, args, args.get('returns', ('',))[0])
        def row(n, t, d, c):
            return [n if n == 'returns' else f'`{n}`', t and type_link(t, lookup), d and f'`{d}`', escaped(c)]
        rows = [['argument','type','default','meaning'], *(row(n, *o) for n,o in args.items())]
        if any(r[3] for r in rows[1:]): table = f'<div class="args" markdown>\n\n{as_table(rows)}\n\n</div>'
    source = f'[source]({m["src"]}){{ .source }}\n\n' if m['src'] else ''
    return f'{heading(len(m["h"]), name)}\n\n{source}```python\n{sig}\n```\n\n{m["doc"].strip().strip("*")}\n\n{table}'

def constants(page, shown):
    "What a module exports besides functions and classes: `show_doc` says nothing of it"
    assigned = [n for n in ast.parse(page.src).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    body = {n.targets[0].id: n for n in assigned}
    names = [n for n in ast.literal_eval(body['__all__'].value) if n.lower() not in shown] if '__all__' in body else []
    parts = [f'{heading(3, n)}\n\n````python\n{ast.get_source_segment(page.src, body[n])}\n````'
             for n in names if n in body]
    return ['## Constants', *parts] if parts else []

# Cells

def callouts(md):
    "Quarto's callouts as MkDocs' admonitions; its other divs only style"
    def note(m):
        kind,attrs,body = m.groups()
        # as an attribute, or as the first heading
        title = re.search('title="(.*?)"', attrs) or re.match(r'\s*#+ +(.*)\n', body)
        body = body[title.end():] if title and title.re.pattern[0] != 't' else body
        return (f'!!! {kind} "{title[1] if title else kind.title()}"\n\n'
                + re.sub('^', '    ', body.strip(), flags=re.M) + '\n')
    md = re.sub(r'^:::+ *\{ *\.callout-(\w+)(.*?)\} *\n(.*?)^:::+ *$', note, md, flags=re.M|re.S)
    return re.sub(r'^:::+.*$', '', md, flags=re.M)

def fence(s, kind): return f'````{{ {kind} }}\n{s.rstrip()}\n````'

def output(o, save, page, lookup):
    data = o.get('data', {})
    if 'text/markdown' in data: return api(text(data['text/markdown']), page, lookup)
    alt = o.get('metadata', {}).get('image/png', {}).get('alt', 'Output of the code above')
    if 'image/png' in data:
        return f'![{alt}]({save(b64decode(text(data["image/png"])), "png")}){{ .figure }}'
    if 'image/jpeg' in data:
        return f'![{alt}]({save(b64decode(text(data["image/jpeg"])), "jpg")}){{ .figure }}'
    if 'image/svg+xml' in data:
        return f'![Output of the code above]({save(text(data["image/svg+xml"]).encode(), "svg")}){{ .figure }}'
    if 'text/html' in data: # blank lines would end the HTML; a pandas table gets the site's style instead of its own
        styles = ('<style.*?</style>', '(?<=<table) border="1" class="dataframe"', '(?<=<table) class="fastprogress"',
                  '(?<=<tr) style="[^"]*"')
        h = re.sub('|'.join(styles), '', text(data['text/html']), flags=re.S)
        return '<div class="output-html">\n' + re.sub(r'\n\s*\n', '\n', h) + '\n</div>'
    s = text(o.get('text') or data.get('text/plain')) or '\n'.join(o.get('traceback', []))
    s = re.sub(r'\x1b\[[0-9;]*m', '', s)
    columns = re.findall(r'^.*\S {2,}\S.*', s, re.M)
    kind = '.text .output' + ' .columns'*(len(columns) > 1) + ' .wide'*(max(map(len, columns), default=0) > 100)
    return fence(s, kind) if s.strip() else ''

def merge_headings(parts):
    """A heading that only names the symbol documented below it is that symbol's;
    and no two have the same id (a function `grid`, a class `Grid`)"""
    res,seen = [],set()
    for p in parts:
        if m := re_heading.match(p):
            level,id,name = m[1],m[2],m[3].replace('\\', '')
            above = res and re.fullmatch(r'(#+) \[?`?(.+?)`?(?:\]\(\S*\))?', res[-1])
            if above and above[2] == name:
                level = len(above[1])
                res.pop()
            if id in seen: id = name
            seen.add(id)
            p = f'<h{level} id="{id}" class="api" markdown="span">{m[3]}</h{level}>' + p[m.end():]
        res.append(p)
    return res

def in_order(parts, page):
    "`parts` with neighbouring symbols as they stand in the source: nbdev turns those of a cell around"
    order = {n: i for i,n in enumerate(page.functions)}
    res = []
    for is_symbol,group in groupby(parts, lambda p: bool(re_heading.match(p))):
        res += (sorted(group, key=lambda p: order.get(symbol(p), order.get(symbol(p).split('.')[-1], -1)))
                if is_symbol else group)
    return res

def symbol(part):
    "The name that a part of a page documents, or nothing"
    m = re_heading.match(part)
    return m[3].replace('\\', '') if m else ''

def sections(parts):
    "Lists of `parts`, each but the first with a heading of the second level at its beginning"
    res = [[]]
    for p in parts:
        if p.startswith('## '): res.append([])
        res[-1].append(p)
    return res

def helpers_last(parts, helpers):
    "`parts` of a page, at the end and below a line those that only other modules need (`helpers` as in helpers.yml)"
    if not helpers: return parts
    def lowered(part): return part if part.startswith('````') else re.sub('^##(?=#* )', '###', part, flags=re.M)
    line = '## For the other modules\n\nWhat other modules of the library call. A user needs none of it.'
    if helpers == 'all':
        i = next(i for i,p in enumerate(parts) if p.startswith('## ') or symbol(p))
        return [*parts[:i], line, *map(lowered, parts[i:])]
    above,below,found = [],[],set()
    for s in sections(parts):
        if (title := s[0].partition('\n')[0]) in helpers:
            found.add(title)
            below += map(lowered, s)
        else:
            moved = [p for p in s if symbol(p).split('.')[0] in helpers]
            found.update(symbol(p).split('.')[0] for p in moved)
            below += moved
            if len(moved) < len(s) - (s[0] == '## Constants'): above += [p for p in s if p not in moved]
    assert found == set(helpers), \
        f'tools/docs/helpers.yml: no {sorted(set(helpers) - found)} on the page {parts[0][2:]}'
    return [*above, line, *below]

def markdown(page, pages, cfg, lookup, out):
    files = []
    def save(data, ext):
        f = page.out.with_name(f'{page.out.stem}_{len(files)}.{ext}'); files.append(f)
        (out/f).write_bytes(data)
        return f.name
    parts = [f'# {page.title}', page.meta.get('description', '') and page.meta['description'] + '\n{ .lead }']
    for c in page.nb['cells']:
        src = text(c['source']).strip('\n')
        if c['cell_type'] == 'markdown': parts += re.split(r'\n+(?=## )', callouts(src))
        if c['cell_type'] != 'code': continue
        opts = dict(re.findall(r'^#\| *([\w-]+): *(.*?) *$', src, re.M))
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
        if opts.get('include') == 'false': continue
        if src and opts.get('echo') != 'false':
            code = fence(src, '.python')
            fold = opts.get('code-fold')
            if fold in ('true', 'show'):
                summary = opts.get('code-summary', 'Code').strip('"')
                code = (f'???{"+" if fold == "show" else ""} code "{summary}"\n\n'
                        + re.sub('^', '    ', code, flags=re.M))
            parts.append(code)
        if opts.get('output') != 'false': parts += [output(o, save, page, lookup) for o in c.get('outputs', [])]
    if page.src: parts += constants(page, {m[2] for p in parts if (m := re_heading.match(p))})
    parts = merge_headings(helpers_last(in_order([p for p in parts if p], page), page.helpers))
    front = yaml.dump({'title': page.title, 'description': page.meta.get('description', '').replace('`', '')})
    return f'---\n{front}---\n' + relink('\n\n'.join(parts), page, pages, cfg)

def on_page_content(page_html, **kwargs): # MkDocs calls it on each page: see `hooks` in mkdocs.yml
    from latex2mathml.converter import convert
    def math(m):
        res = convert(html.unescape(m[2]), display='block' if m[1] == 'div' else 'inline')
        # `\mathrm{sign}` is one word
        def word(w): return '<mi mathvariant="normal">' + re.sub('<.*?>', '', w[0]) + '</mi>'
        return re.sub(r'(?:<mi mathvariant="normal">\w</mi>)+', word, res)
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', math, page_html, flags=re.S)

# The site

def process():
    "`nbdev_proc_nbs`, which would install Quarto: the notebooks with their links and `show_doc`s, in `_proc`"
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    os.chdir(root)
    cfg = get_config()
    stale = proc.exists() and (cfg.lib_path/'_modidx.py').stat().st_mtime > proc.stat().st_mtime # links come from there
    proc_nbs(n_workers=2, force=stale)
    return cfg

def navigation(entries, found):
    "The sidebar: `entries` of nbs/sidebar.yml by the titles of their pages, without those that are not there"
    pages,nav = {p.path.as_posix(): p for p in found},[]
    for o in entries:
        if isinstance(o, str): o = dict(href=o)
        if 'section' in o: nav.append({o['section']: navigation(o['contents'], found)})
        elif p := pages.get(o['href']): nav.append({o.get('text', p.title): p.out.as_posix()})
    return nav

def hidden(p): return bool(re.search(r'(^|/)[._]', p.as_posix()))

def build(out):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from nbdev.doclinks import NbdevLookup
    cfg,lookup = process(),NbdevLookup()
    found = [Page(p) for o in sorted(nbs.rglob('*.ipynb')) if not hidden(p := o.relative_to(nbs))]
    found.sort(key=lambda p: (p.path.parent, p.path.stem != 'index')) # else in the order of their names
    pages = {n.as_posix(): p for p in found for n in (p.path.with_suffix(''), p.out.with_suffix(''))}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        shutil.copytree(assets/'static', tmp/'static')
        for p in (o for o in nbs.rglob('*') if o.suffix in ('.png', '.jpg', '.svg', '.gif')):
            to = tmp/p.relative_to(nbs)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, to)
        for p in found:
            (tmp/p.out).parent.mkdir(parents=True, exist_ok=True)
            (tmp/p.out).write_text(markdown(p, pages, cfg, lookup, tmp))
        names = dict(site_name=cfg.title, site_description=cfg.description, repo_url=cfg.git_url,
                     repo_name=f'{cfg.user}/{cfg.repo}', copyright=f'{cfg.copyright}. Apache-2.0.')
        sidebar = yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents']
        build(load_config(str(assets/'mkdocs.yml'), docs_dir=str(tmp), site_dir=str(out),
                          nav=navigation(sidebar, found), **names))
    (out/'404.html').unlink(missing_ok=True) # its links start at the server's root
    return found

def browser(play):
    "Debian's, Google's or playwright's own Chromium"
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    return play.chromium.launch(executable_path=exe)

def take_screenshots(site, out, names):
    from playwright.sync_api import sync_playwright
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        b = browser(play)
        for scheme in ('light', 'dark'):
            for width in (1280, 390):
                page = b.new_page(viewport={'width': width, 'height': 900}, color_scheme=scheme)
                for n in names:
                    page.goto((site/f'{n}.html').as_uri())
                    page.screenshot(path=out/f'{n.replace("/", "-")}-{width}-{scheme}.png', full_page=scheme == 'light')
        b.close()

@call_parse
def main(
    out:str='_docs', # Folder of the site; what is in it goes
    screenshots:str=None, # Folder for pictures of home, a tutorial, guide, results and API page, on desktop and phone
):
    "Render the documentation"
    site,shots = Path(out).resolve(),screenshots and Path(screenshots).resolve() # before the working directory changes
    found = build(site)
    print(f'{len(found)} pages: {site/"index.html"}')
    if shots:
        take_screenshots(site, shots, ['index', 'tutorials/images', 'guides/your_images', 'results', 'method.attacks'])
