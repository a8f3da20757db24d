"The documentation site of tools/docs.py: its links, its API, its formulas; and how it behaves in a browser"
import ast, json, re, subprocess, sys
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

yaml = pytest.importorskip('yaml', reason="needs pip install -e '.[dev]'")
pytest.importorskip('mkdocs', reason="needs pip install -e '.[dev]'")
pytest.importorskip('material', reason="needs pip install -e '.[dev]'")
if int(version('nbdev').split('.')[0]) > 2:
    pytest.skip('the documentation is built with nbdev 2', allow_module_level=True)
root = Path(__file__).parent.parent

class Html(HTMLParser):
    "Ids, links, what the page loads, and its text outside of code"
    def __init__(self, path):
        super().__init__()
        self.ids,self.hrefs,self.loads,self.text,self.code,self.depth = set(),[],[],'','',0
        self.source = path.read_text()
        self.feed(self.source)
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if d.get('id'): self.ids.add(d['id'])
        if tag == 'a' and d.get('href'): self.hrefs.append(d['href'])
        if tag in ('img', 'script') and d.get('src'): self.loads.append(d['src'])
        if tag == 'link' and d.get('rel') in ('stylesheet', 'icon', 'preload', 'preconnect'):
            self.loads.append(d['href'])
        if tag in ('pre', 'code', 'script', 'style'): self.depth += 1
    def handle_endtag(self, tag):
        if tag in ('pre', 'code', 'script', 'style'): self.depth -= 1
    def handle_data(self, data):
        if self.depth: self.code += data
        else: self.text += data

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')/'site'
    watched = ['nbs/*.yml', 'clae_fastai/_modidx.py', 'README.md', '_proc', '_docs']
    def written():
        return subprocess.run(['git','status','--porcelain','--',*watched],
            cwd=root, capture_output=True, text=True).stdout
    before = written()
    command = [sys.executable, '-W', 'ignore', root/'tools'/'docs.py', '--out', out]
    res = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-4000:]
    assert written() == before, 'building the docs changed the working tree'
    return out

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Html(p) for p in sorted(site.rglob('*.html'))}

def notebooks():
    found = sorted((root/'nbs').rglob('*.ipynb'))
    return [p for p in found if not re.search(r'(^|/)[._]', p.relative_to(root/'nbs').as_posix())]

def page_of(nb):
    rel = nb.relative_to(root/'nbs')
    return rel.with_name(re.sub(r'^\d+[a-z0-9]*_', '', rel.stem.lower()) + '.html').as_posix()

def test_every_notebook_has_a_page(pages): assert set(pages) == {page_of(p) for p in notebooks()}

def listed(entries):
    "The notebooks of nbs/sidebar.yml, in its order"
    for o in entries:
        if isinstance(o, str): yield o
        elif 'section' in o: yield from listed(o['contents'])
        else: yield o['href']

def sidebar(): return yaml.safe_load((root/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']

def test_the_sidebar_lists_every_notebook():
    "Once; a guide may be listed before it is written"
    names,there = list(listed(sidebar())),{p.relative_to(root/'nbs').as_posix() for p in notebooks()}
    assert len(names) == len(set(names)) and there - set(names) == set()
    assert [o for o in names if o not in there and not o.startswith('guides/')] == []

def test_the_sidebar_is_what_a_visitor_looks_for():
    "Its sections, the modules to use and to extend, and all others inside"
    top = {o.get('text') or o['section']: o for o in sidebar()}
    assert list(top) == ['Start','Tutorials','Guides','Results','API']
    sections = [o for o in top['API']['contents'] if 'section' in o]
    parts = {o['section']: [re.sub(r'^\d+[a-z]*_|\.ipynb$', '', n) for n in listed(o['contents'])] for o in sections}
    assert list(parts) == ['Use','Extend','Inside']
    assert (parts['Use'][0] == 'train.learner' and
            {o.split('.')[0] for o in parts['Use'][1:]} == {'data','method','measure','cli'})
    assert parts['Extend'] == ['method.losses','method.attacks','method.models']

def test_the_changes_are_those_of_the_changelog():
    cell = json.loads((root/'nbs'/'changes.ipynb').read_text())['cells'][-1]
    shown = ''.join(cell['outputs'][0]['data']['text/markdown'])
    assert shown == (root/'CHANGELOG.md').read_text().removeprefix('# Changelog').strip().replace('](nbs/', '](')

def test_next_leads_a_visitor(site, pages):
    "From home page by page through tutorials, guides, results and API, to every page of the site"
    order,name = [],'index.html'
    while name:
        order.append(name)
        assert len(order) <= len(pages)
        to = re.search(r'<a href="([^"]+)" class="md-footer__link md-footer__link--next"', pages[name].source)
        name = to and ((site/name).parent/to[1]).resolve().relative_to(site.resolve()).as_posix()
    assert order == [page_of(root/'nbs'/o) for o in listed(sidebar()) if (root/'nbs'/o).is_file()]
    assert set(order) == set(pages)
    assert order[1] == 'tutorials/images.html'

def test_the_sidebar_says_where_one_is(pages):
    "Sections and titles of the sidebar, in its order, on the home page"
    shown = [plain(o).strip()
             for o in re.findall(r'<span class="md-ellipsis">(.*?)</span>', pages['index.html'].source, re.S)]
    want = ['Start','Tutorials','Guides','Results','API','What is where','Use','train.learner','commands','Extend',
            'Inside','core','runs']
    assert [o for o in dict.fromkeys(shown) if o in want] == want

def test_links(site, pages):
    bad = []
    for name,page in pages.items():
        for href in page.hrefs:
            u = urlsplit(href)
            if 'clae-fastai.github.io' in u.netloc: bad.append(f'{name}: {href} leaves the site')
            if u.scheme or u.netloc: continue
            to = (site/name).parent/unquote(u.path) if u.path else site/name
            if to.is_dir(): to = to/'index.html'
            if not to.resolve().is_file(): bad.append(f'{name}: {href}')
            elif u.fragment and to.suffix == '.html' and u.fragment != '__top':
                page_there = pages[to.resolve().relative_to(site.resolve()).as_posix()]
                if unquote(u.fragment) not in page_there.ids: bad.append(f'{name}: {href} (anchor)')
    assert not bad, '\n'.join(bad)

def test_it_loads_nothing_from_elsewhere(site, pages):
    for name,page in pages.items():
        for src in page.loads:
            assert not urlsplit(src).netloc, f'{name} loads {src}'
            if not src.startswith('data:'):
                assert ((site/name).parent/unquote(urlsplit(src).path)).is_file(), f'{name}: {src} is missing'

source_text = ('](', '$$', '\\frac', '\\mathcal', '\\(', '\\[', ':::', '{.callout', '{ .', '{ #', '#|', 'AUTOGENERATED')

def test_nothing_is_left_raw(pages):
    for name,page in pages.items():
        for raw in source_text:
            where = page.text.find(raw)
            assert where < 0, f'{name}: {raw!r} in {page.text[max(0, where-100):where+100]!r}'
        assert not re.search(r'^#\|', page.code, re.M), f'{name}: a directive of nbdev or Quarto in a code cell'
        assert '<Figure size' not in page.code + page.text, f'{name}: a figure without its picture'
    assert '<math' in pages['method.losses.html'].source

def test_callbacks_do_not_list_fastais_events(pages):
    for name,page in pages.items(): assert 'before_validate=None' not in page.code, name

def test_docments_survive(pages):
    assert 'images in train/<class> and test/<class>, or <class>, or alone' in pages['cli.html'].text

def test_search_finds_what_people_ask_for(site):
    index = next(site.rglob('search_index.*')).read_text().lower()
    asked = ('greyscale','grayscale','medical','unlabeled','unlabelled','inference','tensorboard','wandb','umap',
             'duplicates','imbalanced','gpu memory','x-ray','fine-tune','similar images','out of memory')
    assert not [o for o in asked if o not in index]

line = 'id="for-the-other-modules"'

def entries(html): return re.findall(r'<h[2-6] class="api" id="[^"]+">(.+?)<a', html)

def test_what_users_call_comes_first(pages):
    "What only other modules call stands below a line, at the end of the page; pages without such names have no line"
    helpers = yaml.safe_load((root/'tools'/'docs'/'helpers.yml').read_text())
    for name,page in pages.items():
        listed = helpers.get(name[:-5], [])
        assert bool(listed) == (line in page.source), name
        if not listed: continue
        above,below = page.source.split(line)
        if listed == 'all': assert not entries(above) and entries(below), name
        else:
            shown = [plain(o) for o in re.findall(r'<h[23][^>]*>(.*?)<a class="headerlink"', below, re.S)]
            assert {o.removeprefix('## ').replace('`', '') for o in listed} <= set(shown), name
            assert entries(above) and not {o.split('.')[0] for o in entries(above)} & set(listed), name
    for module,user,helper in (('method.views','TwoViews','check_pixels'),
                               ('method.models','create_encoder','arch_name'),
                               ('train.checkpoint','Resume','run_state'),
                               ('data.images','memory_dls','label_indices')):
        html = pages[f'{module}.html'].source
        assert html.index(f'id="{user.lower()}"') < html.index(line) < html.index(f'id="{helper}"')
    html = pages['core.html'].source
    assert (html.index('id="gather"') < html.index(line) <
            min(html.index('id="at_least_float32"'), html.index('id="world_size"')))

def test_no_tutorial_calls_what_is_below_the_line(pages):
    "Nor do guides and the home page, in their code or in commands"
    below = {o for page in pages.values() if line in page.source for o in entries(page.source.split(line)[1])}
    assert {'at_least_float32','world_size','look_up','new_file'} <= below
    used = {}
    for name,page in pages.items():
        if name.startswith(('tutorials/','guides/')) or name == 'index.html':
            used |= {o: name for o in re.findall(r'(?<![.\w])\w+(?=\()', page.code) if o in below}
    assert not used

def test_symbols_stand_as_in_the_source(pages):
    shown = [o for o in entries(pages['cli.html'].source) if o.startswith('clae_')]
    assert shown == [f'clae_{o}' for o in 'train eval embed report export table figure'.split()]

def test_every_cell_is_shown():
    "Cells of another type are shown nowhere"
    for p in notebooks():
        assert {c['cell_type'] for c in json.loads(p.read_text())['cells']} <= {'markdown','code'}, p

def test_training_tables_have_heads():
    "fastai's rows without their names say nothing; without a progress bar it prints nothing else"
    for p in notebooks():
        for c in json.loads(p.read_text())['cells']:
            for o in c.get('outputs', []): assert not re.search(r'^\[0, [\d.]+, ', ''.join(o.get('text', '')), re.M), p

def public_names():
    for p in sorted((root/'clae_fastai').rglob('*.py')):
        if p.stem == 'all' or p.stem[0] == '_': continue
        module = '.'.join(p.relative_to(root/'clae_fastai').with_suffix('').parts)
        assigned = [n for n in ast.parse(p.read_text()).body if isinstance(n, ast.Assign)]
        exported = [n.value for n in assigned if getattr(n.targets[0], 'id', '') == '__all__']
        for name in ast.literal_eval(exported[0]) if exported else []: yield module,name

def section(page, name):
    "What stands between the heading of the symbol `name` and the next heading"
    m = re.search(rf'<h[2-6] class="api" id="[^"]+">{re.escape(name)}<.*?</h\d>(.*?)(?=<h[1-6] |$)', page.source, re.S)
    return m and m[1]

def plain(h): return re.sub('<.*?>', '', h).replace('&gt;', '>').replace('&lt;', '<').replace('&#39;', "'")

def test_every_public_name_has_a_signature(pages):
    bad,names = [],list(public_names())
    assert len(names) > 100
    for mod,name in names:
        html = section(pages[f'{mod}.html'], name)
        sig = html and re.search(r'<pre>(.*?)</pre>', html, re.S)
        if not sig or not re.match(rf'{name}(\(| ?[=:])', plain(sig[1]).strip()): bad.append(f'{mod}.{name}')
    assert not bad, f'without signature: {bad}'

def test_arguments_in_a_table(pages):
    html = section(pages['train.learner.html'], 'clae_learner')
    rows = {plain(r).split()[0]: r for r in re.findall(r'<tr>(.*?)</tr>', html, re.S)}
    assert {'argument', 'dls', 'arch', 'eps', 'alpha', 'attack', 'returns'} <= set(rows)
    assert 'Weight of the adversarial loss' in plain(rows['alpha'])
    assert 'https://docs.fast.ai/' in rows['dls'] # types are links
    assert 'method.models.html#create_encoder' in html # so are the symbols in comments

def test_symbols_are_links(pages):
    assert any(h.endswith('train.learner.html#clae_learner')
               for h in pages['index.html'].hrefs + pages['method.callback.html'].hrefs)
    assert any(h.startswith('https://docs.fast.ai/learner.html#') for h in pages['index.html'].hrefs)

def test_no_prose_beside_the_title():
    "nbdev keeps the title and the description of a notebook's first cell, and drops what else stands in it"
    first = {p.name: ''.join(json.loads(p.read_text())['cells'][0]['source']) for p in notebooks()}
    bad = [name for name,text in first.items() if not re.fullmatch(r'# .*\n*(>.*\n*)*(- .*\n*)*', text)]
    assert not bad, f'split the first cell of {bad}'

# In a browser

prose = '''() => {
    const article = document.querySelector('article').cloneNode(true)
    article.querySelectorAll('pre, code, script').forEach(e => e.remove())
    return article.textContent
}'''
broken_images = '[...document.images].filter(o => !o.naturalWidth).map(o => o.src)'
too_wide = '''[document.documentElement, ...document.querySelectorAll("article > *")]
    .filter(o => o.getBoundingClientRect().right > innerWidth ||
        o == document.documentElement && o.scrollWidth > innerWidth)
    .map(o => o.outerHTML.slice(0, 80))'''

cut = '''[...document.querySelectorAll(
    "article pre > code, article .output-html, article .output-html .md-typeset__scrollwrap")]
    .filter(o => o.scrollWidth > o.clientWidth).map(o => o.textContent.trim().slice(0, 80))'''
broken_columns = '''[...document.querySelectorAll("article .columns code")].flatMap(o => {
    const pen = document.createElement("canvas").getContext("2d"), style = getComputedStyle(o)
    pen.font = `${style.fontSize} ${style.fontFamily}`
    const room = o.clientWidth - 2*parseFloat(style.paddingLeft)
    return o.textContent.split("\\n").filter(l => /\\S {2,}\\S/.test(l) && pen.measureText(l).width > room)
})'''

@pytest.mark.parametrize('width', (1280, 390))
def test_in_a_browser(site, pages, browser, width):
    tab,bad = browser.new_page(viewport={'width': width, 'height': 900}),[]
    tab.on('console', lambda m: m.type == 'error' and bad.append(f'{tab.url}: {m.text}'))
    tab.on('pageerror', lambda e: bad.append(f'{tab.url}: {e}'))
    tab.on('request',
        lambda r: urlsplit(r.url).scheme in ('http', 'https') and bad.append(f'{tab.url}: asks for {r.url}'))
    tab.on('requestfailed', lambda r: bad.append(f'{tab.url}: {r.url} failed'))
    shots = site.parent/'screenshots'
    for name in pages:
        tab.goto((site/name).as_uri())
        bad += [f'{name}: broken image {o}' for o in tab.evaluate(broken_images)]
        text = tab.evaluate(prose)
        bad += [f'{name}: {raw!r} unrendered' for raw in ('](', '$$', '\\frac', '\\(') if raw in text]
        bad += [f'{name}: wider than {width} px: {o}' for o in tab.evaluate(too_wide)]
        if width == 1280:
            bad += [f'{name}: code or output runs out of its box: {o}' for o in tab.evaluate(cut)]
            bad += [f'{name}: columns are broken into two lines: {o}' for o in tab.evaluate(broken_columns)]
        shot = shots/f'{name[:-5].replace("/", "-")}-{width}.png'
        tab.screenshot(path=shot, full_page=True)
        assert shot.stat().st_size > 10_000
    tab.close()
    assert not bad, '\n'.join(bad)

def test_dark_is_dark(site, browser):
    def background(scheme):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto((site/'index.html').as_uri())
        return sum(map(int, re.findall(r'\d+', tab.evaluate('getComputedStyle(document.body).backgroundColor'))[:3]))
    assert background('dark') < 200 < 600 < background('light')

def test_search_from_a_file(site, browser):
    tab = browser.new_page(viewport={'width': 1280, 'height': 900})
    tab.goto((site/'index.html').as_uri())
    tab.fill('.md-search__input', 'FGSM')
    tab.wait_for_selector('.md-search-result__item a', timeout=20_000)
    assert any('method.attacks.html' in o.get_attribute('href')
               for o in tab.query_selector_all('.md-search-result__item a'))
