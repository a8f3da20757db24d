"A run as one page, and its pictures: of runs with labels and without, of files with hostile names, in a browser."
import contextlib
import html
import inspect
import io
import json
import os
import random
import re
import shutil
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clae_fastai import cli as commands, runs as runs_module
from clae_fastai.data.catalogue import get_dls
from clae_fastai.data.folders import folder_dl
from clae_fastai.data.images import MemoryImages, memory_dls
from clae_fastai.measure.evaluate import Evaluation
from clae_fastai.measure.features import extract_features
from clae_fastai.measure.report import look_at, near_duplicates, plot_neighbours, report_page
from clae_fastai.method.models import create_encoder

root = Path(__file__).parent.parent.parent
old_runs = root/'tests'/'fixtures'/'runs-0.1.0'
bare = dict(settings={}, versions={}, metrics={})
hostile = [ # the first is a script across a folder and a file
    b"<script>document.title='owned'<" + b"/script>.png", b'"><img src=x onerror="document.title=\'owned\'">.png',
    b"' onload='document.title=1.png",
    b'<svg onload=document.title=1>.png', b'a,b;c.png', b'two\nlines.png', b'bell\x07 tab\t esc\x1b[2J.png',
    b'\xff\xfe no text.png', '\u202egnp.exe'.encode() + b'.png', b'{{ 7*7 }}{% raw %}.png', b'&amp;lt;b&gt;.png',
    b'<!--.png', b'x' + b'l'*180 + b'.png']

@contextlib.contextmanager
def quiet(folder):
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()): yield

@pytest.fixture(scope='module')
def places(tmp_path_factory, digits_dir):
    """A folder with the runs `labelled` and `flat`; `flat` was trained on 560 files, with hostile names,
    copies and re-saved images"""
    from sklearn.datasets import load_digits
    here = tmp_path_factory.mktemp('reports')
    folder = os.fsencode(here/'flat')
    os.mkdir(folder)
    def image(i):
        return (Image.fromarray((load_digits_images[i]*255/16).astype(np.uint8))
                .resize((16,16), Image.BILINEAR).convert('RGB'))
    load_digits_images = load_digits().images
    names = hostile + [b'%04d.png' % i for i in range(len(hostile), 540)]
    for i,name in enumerate(names):
        file = os.path.join(folder, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        image(i).save(here/'x.png')
        os.rename(here/'x.png', file)
    for i in range(20,30): shutil.copy(here/'flat'/f'{i:04}.png', here/'flat'/f'copy of {i:04}.png')
    for i in range(30,40): image(i).save(here/'flat'/f'saved {i:04}.jpg', quality=75)
    with quiet(here):
        commands.clae_train.main(['--limit','64','--epochs','1','--name','labelled'])
        commands.clae_train.main(['--path','flat','--unlabelled','--arch','resnet8','--epochs','1','--workers','0',
                                  '--name','flat'])
        for name in ('labelled','flat'): commands.clae_report.main([name])
    return here

def page_of(places, name): return (places/'runs'/name/'report.html').read_bytes().decode() # valid UTF-8

# What the page is

class Strict(HTMLParser):
    """Every tag is closed in its order, attributes are quoted and none is an event's,
    and nothing stands where it may not"""
    void = {'meta','img','br'}
    known = void | set('html head title style body header main section h1 h2 p ul li dl dt dd div table thead tbody '
        'tr th td figure figcaption strong b i span details summary'.split())
    in_p = {'strong','b','i','span','br'}
    attributes = 'charset content http-equiv name lang class style src width height alt title scope tabindex'.split()
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open,self.bad,self.loads,self.headings,self.images,self.titles = [],[],[],[],[],[]
        assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
        self.feed(text)
        self.close()
        if self.open: self.bad.append(f'left open: {self.open}')

    def handle_starttag(self, tag, attrs):
        if tag not in self.known: self.bad.append(f'<{tag}>')
        if 'p' in self.open and tag not in self.in_p: self.bad.append(f'<{tag}> in <p>')
        if len(dict(attrs)) < len(attrs): self.bad.append(f'an attribute twice: {attrs}')
        for k,v in attrs:
            if k.startswith('on') or k not in self.attributes: self.bad.append(f'{tag} {k}={v}')
            if k in ('src','href'): self.loads.append(v)
        if re.search(r'=\s*[^"\s>]', re.sub(r'"[^"]*"', '""', self.get_starttag_text())):
            self.bad.append(self.get_starttag_text()[:200])
        if tag == 'img': self.images.append(dict(attrs))
        if tag in ('h1','h2'): self.headings.append(tag)
        if tag == 'figure': self.titles.append(dict(attrs)['title'])
        if tag not in self.void: self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.bad.append(f'</{tag}> closes something else')

    def handle_data(self, data):
        if self.open and self.open[-1] in ('ul','dl','table','tr','tbody','thead') and data.strip():
            self.bad.append(data)
        if '<' in data and self.open[-1] == 'style':
            self.bad.append(data)

    def handle_comment(self, data): self.bad.append(f'<!--{data}')
    def unknown_decl(self, data): self.bad.append(data)

@pytest.mark.parametrize('name', ['labelled','flat'])
def test_valid_html(places, name):
    text = page_of(places, name)
    page = Strict(text)
    assert not page.bad
    assert page.headings == ['h1'] + ['h2']*(len(page.headings)-1) and len(page.headings) > 6
    assert all(o['src'].startswith('data:image/') and o['alt'] and int(o['width']) and int(o['height'])
               for o in page.images)
    assert (len(page.images) == len(page.loads) and
            not any(o in text.replace('http-equiv', '') for o in ('http','url(','@import')))
    assert not any(ord(c) < 32 and c != '\n' or 0xd800 <= ord(c) < 0xe000 or c in '\x7f\u202e' for c in text)
    assert len(text) < 4e6
    with contextlib.suppress(ImportError):
        import html5lib
        html5lib.HTMLParser(strict=True).parse(text)

def test_the_check_of_html_finds_what_is_wrong():
    head = '<!DOCTYPE html>\n<html lang="en">'
    assert not Strict(f'{head}<p>a &lt;b&gt; <b>c</b></p></html>').bad
    for wrong in ('<p><ul></ul></p>', '<b>', '</b>', '<b><i></b></i>', '<script></script>', '<p onclick="x">a</p>',
                  '<p class=x>a</p>', '<!-- a -->'):
        assert Strict(f'{head}{wrong}</html>').bad, wrong

def test_hostile_names_are_text(places):
    """Each name stands in the page as it is, or spelled out, when it stands there;
    all of them do in a page about them alone"""
    dl = folder_dl(places/'flat', 16, bs=64, num_workers=0)
    seen = look_at(places/'runs'/'flat'/'encoder.safetensors', {'': dl})
    few = [i for i,name in enumerate(seen.names) if not re.fullmatch(r'\d{4}\.png|(copy of|saved) .*', name)]
    assert len(few) == len(hostile)
    data = dl.dataset.take(few)
    few = look_at(places/'runs'/'flat'/'encoder.safetensors', {'': dl.new(data)})
    page = Strict(report_page('x', bare, few))
    assert not page.bad
    spelled = {o.decode(errors='surrogateescape') for o in hostile}
    def spell(c): return c if c.isprintable() else c.encode('unicode_escape').decode()
    assert {*page.titles} == {''.join(map(spell, o)) for o in spelled}
    assert r'\udcff\udcfe no text.png' in page.titles and r'two\nlines.png' in page.titles

# What it says

def test_labelled_and_unlabelled(places):
    labelled,flat = (html.unescape(page_of(places, o)) for o in ('labelled','flat'))
    for o in ('trained encoder','1 label a class','Red: of another class','by chance it would be','simclr',
              'fgsm, eps 0.03'):
        assert o in labelled, o
    for o in ('Accuracy','trained encoder','of another class','by chance it'): assert o not in flat, o
    for o in ('Losses','What training saw','Nearest neighbours','A map of the images','Near-duplicates',
              'All settings','torchvision'):
        assert o in labelled and o in flat, o
    notes = json.loads((places/'runs'/'flat'/'summary.json').read_text())['settings']['images']
    assert notes and all(''.join(c for c in o if c.isprintable()) in flat for o in notes)
    for name,text in (('labelled',labelled), ('flat',flat)): # whatever the run has found
        verdict = json.loads((places/'runs'/name/'summary.json').read_text())['metrics']['verdict']
        assert ('Has it learnt?' in text and verdict['sentence'] in text and
                all(o['meaning'] in text for o in verdict['numbers'].values()))
    assert 'All 514 images of the run' in labelled and '532 to train on, 28 held out' in flat

def test_verdict_evaluations_and_a_second_report(places, cli):
    run = shutil.copytree(places/'runs'/'labelled', cli.cwd/'runs'/'labelled')
    summary = json.loads((run/'summary.json').read_text())
    summary['metrics']['verdict'] = dict(state='still falling', sentence='A <b>longer</b> training pays.',
        numbers=dict(spread=dict(value=.123456, scale='0 to 1', meaning='1 & more')))
    (run/'summary.json').write_text(json.dumps(summary))
    found = dict(dataset='digits', protocol='honest', knn=.8123, knn_mean_per_class=.7456, result=.9)
    assert found.keys() - {f.name for f in fields(Evaluation)} == {'result'}
    (run/'eval-digits-honest.json').write_text(json.dumps(found))
    (run/'eval-half.json').write_text('')
    first = (run/'report.html').read_bytes()
    r = cli('clae_report', 'labelled')
    assert r.returncode == 0 and 'report-2.html' in r.stdout and 'eval-half.json is left out' in r.stdout
    text = (run/'report-2.html').read_text()
    for o in ('<strong>Still falling:</strong> A &lt;b&gt;longer&lt;/b&gt; training pays.','0.1235','0 to 1',
              '1 &amp; more'):
        assert o in text, o
    for o in ('eval-digits-honest.json','81.2','74.6','90.0'): assert f'>{o}</td>' in text, o
    assert 'eval-half' not in text and not Strict(text).bad
    assert (run/'report.html').read_bytes() == first

def test_neighbours_are_those_of_numpy(places):
    "In the page of 560 files: twelve of them, and their six nearest, in their order"
    run = places/'runs'/'flat'
    dls = get_dls('folder', places/'flat', size=16, unlabelled=True, num_workers=0, seed=42)
    x = np.concatenate([extract_features(run/'encoder.safetensors', dl)[0].double().numpy() for dl in dls.loaders])
    files = [os.path.relpath(f, places/'flat') for dl in dls.loaders for f in dl.dataset.files]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -2)
    shown = Strict(page_of(places, 'flat')).titles[:84]
    index = {''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in f): i
             for i,f in enumerate(files)}
    assert [index[shown[i]] for i in range(0, 84, 7)] == np.linspace(0, len(files)-1, 12).round().tolist()
    for i in range(0, 84, 7):
        q,*near = (index[o] for o in shown[i:i+7])
        assert len({*near}) == 6 and q not in near
        assert np.allclose(cosines[q,near], np.sort(cosines[q])[::-1][:6], atol=1e-5)

def test_copies_are_found(places):
    text = page_of(places, 'flat')
    titles = Strict(text).titles[84:]
    pairs = {frozenset(titles[i:i+2]) for i in range(0, len(titles), 2)}
    planted = {frozenset((f'{i:04}.png', f'copy of {i:04}.png')) for i in range(20,30)}
    planted |= {frozenset((f'{i:04}.png', f'saved {i:04}.jpg')) for i in range(30,40)}
    assert planted <= pairs and len(pairs - planted) <= 2
    assert f'There are {len(pairs)} pairs, of ' in text

@pytest.mark.parametrize('quality,share', [(75,.97),(50,.8)])
def test_photographs_saved_again(cifar_dir, tmp_path, quality, share):
    "As JPEG files, seen by an encoder that was never trained; of the different ones none is taken for another"
    files = sorted(cifar_dir.glob('test/*/*.png'))[::4]
    images = [np.array(Image.open(f)) for f in files]
    for i,o in enumerate(images): Image.fromarray(o).save(tmp_path/f'{i}.jpg', quality=quality)
    images += [np.array(Image.open(tmp_path/f'{i}.jpg')) for i in range(len(files))]
    x = MemoryImages(torch.tensor(np.stack(images)).permute(0,3,1,2))
    torch.manual_seed(0)
    features = extract_features(create_encoder('resnet8', 'cifar', 3), memory_dls(x, x).valid)[0]
    assert F.normalize(features.mean(0), dim=0) @ F.normalize(features, dim=1).mean(0) > .9 # all alike
    pairs,n,n_images,_ = near_duplicates(features, x.images, 10**6)
    right = {(i, i+len(files)) for i in range(len(files))}
    assert n == len(pairs) and {(i,j) for i,j,_ in pairs} <= right and n_images == 2*n >= 2*share*len(files)

def test_pairs_are_counted_and_few_are_shown():
    x = torch.rand(40, 3, 8, 8).repeat(2,1,1,1)
    images = MemoryImages((x*255).byte(), torch.arange(80)%40//20 ^ (torch.arange(80) == 79).long(), ['a','b'])
    seen = look_at(create_encoder('resnet8', 'cifar', 3), dict(training=memory_dls(images, images, bs=16).valid))
    text = report_page('x', bare, seen)
    assert ('There are 40 pairs, of 80 images. These are the 24 most similar ones.' in text and
            text.count('class="pair"') == 24)

def test_what_stands_below_counts_all_pairs(monkeypatch):
    "Also those that are less alike than the 24 that are shown"
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(31, 3, 8, 8, generator=g)*255).byte()
    again = (x[30:].int() + torch.randint(-2, 3, x[30:].shape, generator=g)).clamp(0, 255).byte()
    def loader(x, y): return memory_dls(o := MemoryImages(x, y, ['a','b']), o, bs=16).valid
    def page(last):
        loaders = {'training': loader(torch.cat([x[:30]]*2 + [x[30:]]), torch.zeros(61).long()),
            'held-out': loader(again if last else x[:1]*0, torch.ones(1).long())}
        return report_page('x', bare, look_at(create_encoder('resnet8', 'cifar', 3), loaders))
    torch.manual_seed(0)
    with_it,without = page(True),page(False)
    said = 'accuracies are too good','Red: of two classes'
    assert 'There are 31 pairs' in with_it and all(o in with_it for o in said)
    assert 'There are 30 pairs' in without and not any(o in without for o in said)

# Bounds

def test_many_images(places, cli, monkeypatch):
    "Some of them, evenly spread over training and held-out images; the page says so"
    assert inspect.signature(look_at).parameters['most'].default <= 10_000
    shutil.copytree(places/'runs', cli.cwd/'runs')
    seen = []
    def few(*args):
        seen.append(look_at(*args, most=50))
        return seen[0]
    monkeypatch.setattr(runs_module, 'look_at', few)
    assert cli('clae_report', 'labelled').returncode == 0
    assert len(seen[0].features) == len(seen[0].small) == len(seen[0].names) == len(seen[0].labels) == 50
    assert seen[0].parts.count('held-out') == pytest.approx(50*450/514, abs=1) # 64 were trained on
    assert '50 of the 514 images of the run' in (cli.cwd/'runs'/'labelled'/'report-2.html').read_text()

def test_what_was_looked_at_is_what_is_shown():
    "Thumbnails, images, labels and features belong together, whichever part they come from"
    x = (torch.rand(30, 3, 8, 8)*255).byte()
    sets = [MemoryImages(o, y, list('abc')) for o,y in zip(x.split([20,10]), (torch.arange(30)%3).split([20,10]))]
    dls = memory_dls(*sets, bs=4)
    model = create_encoder('resnet8', 'cifar', 3).eval()
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
              dls.train.rng.getstate()]
    for most in (100,13):
        seen = look_at(model, dict(zip(('training','held-out'), dls.loaders)), most=most)
        idxs = np.linspace(0, 29, min(30, most)).round().astype(int)
        assert (seen.small == x[idxs]).all() and seen.labels.tolist() == (idxs%3).tolist() and seen.n_all == 30
        assert all((seen.images[i][0] == x[j]).all() for i,j in enumerate(idxs))
        assert seen.parts == ['training' if i < 20 else 'held-out' for i in idxs]
        assert seen.names == [f'image {i%20 + 1}' for i in idxs]
        assert torch.allclose(seen.features, model(x[idxs].float()/255).flatten(1), atol=1e-4)
        fig = plot_neighbours(seen.images, seen.features, seen.labels, seen.vocab)
        cosines = F.normalize(seen.features, dim=1) @ F.normalize(seen.features, dim=1).T
        queries = np.linspace(0, len(idxs)-1, 12).round().astype(int)
        near = (cosines - 9*torch.eye(len(idxs)))[queries].topk(6)[1]
        others = int((seen.labels[near] != seen.labels[queries][:,None]).sum())
        assert 0 < others < 72 and len(fig.axes[0].patches) == others
        before,_,after = report_page('x', bare, seen).partition('<h2>Near-duplicates')
        assert before.count('<figure class="other"') == others
        plt.close('all')
    assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                      dls.train.rng.getstate()]

@pytest.mark.parametrize('channels', [1,2,4,12])
def test_channels(channels):
    x = (torch.rand(12, channels, 80, 100)*255).byte()
    images = MemoryImages(x)
    seen = look_at(create_encoder('resnet8', 'cifar', channels), {'': memory_dls(images, images, bs=4).valid})
    assert seen.small.shape == (12,channels,51,64)
    assert not Strict(report_page('x', bare, seen)).bad
    assert len(plot_neighbours(seen.images, seen.features).axes) == 1

# Every run's own picture

def test_every_run_has_neighbours(places, monkeypatch, cli):
    for name in ('labelled','flat'): assert Image.open(places/'runs'/name/'neighbours.png').size > (500,1000)
    titles = []
    def plot(images, features, labels, vocab, among):
        titles.append((among, len(features), labels is None))
        return plot_neighbours(images, features, labels, vocab, among)
    monkeypatch.setattr(runs_module, 'plot_neighbours', plot)
    runs = shutil.copytree(places/'runs', cli.cwd/'runs')
    for name in ('labelled','flat'): # a training that is finished, and whose run is not
        for file in ('summary.json','neighbours.png'): (runs/name/file).unlink()
        r = cli('clae_train', '--resume', name)
        assert r.returncode == 0 and (runs/name/'summary.json').exists(), r.stderr
        assert (runs/name/'neighbours.png').read_bytes() == (places/'runs'/name/'neighbours.png').read_bytes()
    assert titles == [('450 held-out images', 450, False), ('500 of 532 training images', 500, True)]

def test_names_of_classes(cli, recwarn):
    "Formulas, letters that no font has, and bytes that are no text: in pictures and in the page"
    for i in range(40):
        file = os.fsencode(cli.cwd/'images') + (b'/$\\frac{', '/中'.encode(), b'/\xff<b>')[i%3] + b'/%02d.png' % i
        os.makedirs(os.path.dirname(file), exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16,16,3), dtype=np.uint8)).save(cli.cwd/'x.png')
        os.rename(cli.cwd/'x.png', file)
    r = cli('clae_train', '--path', 'images', '--arch', 'resnet8', '--bs', 8, '--epochs', 1, '--workers', 0,
            '--name', 'names')
    assert (r.returncode == 0 and 'WRITTEN' not in r.stderr and
            not any('Glyph' in str(o.message) for o in recwarn)), r.stderr
    r = cli('clae_report', 'names')
    text = (cli.cwd/'runs'/'names'/'report.html').read_bytes().decode()
    assert r.returncode == 0 and not Strict(text).bad
    for o in ('$\\frac{','中',r'\udcff&lt;b&gt;'): assert f'</span>{o}</li>' in text and f'<b>{o}</b>' in text, o

# Refusals, what is damaged, and runs of other versions

def test_what_is_damaged_is_left_out(cli):
    "Each is said, and the page has all else; of a report that finds no room nothing stays"
    run = shutil.copytree(old_runs, cli.cwd/'runs')/'finished'
    for name,text in (('history.csv',''), ('views.png','no picture'), ('eval-digits-authors.json','[]')):
        (run/name).write_text(text)
    r = cli('clae_report', 'finished')
    assert r.returncode == 0 and [o.split()[0] for o in r.stdout.splitlines() if 'is left out' in o] == [
        'runs/finished/history.csv','runs/finished/views.png','runs/finished/eval-digits-authors.json'], r.stderr
    text = (run/'report.html').read_text()
    assert ('trained encoder' in text and
            not any(o in text for o in ('Losses','What training saw','clae_eval')) and not Strict(text).bad)
    with pytest.MonkeyPatch.context() as m:
        def no_room(self, target): raise OSError(28, 'No space left on device')
        m.setattr(Path, 'replace', no_room)
        r = cli('clae_report', 'finished')
    assert (r.returncode == 2 and 'No space left' in r.stderr and
            sorted(o.name for o in run.glob('*report*')) == ['report.html'])

def test_refusals(places, cli, command):
    shutil.copytree(old_runs, cli.cwd/'runs')
    for name in ('labelled','flat'): shutil.copytree(places/'runs'/name, cli.cwd/'runs'/name)
    assert '--resume stopped' in command(commands.clae_report, 'stopped')
    assert 'no run nothing' in command(commands.clae_report, 'nothing')
    assert 'no folder' in command(commands.clae_report, 'labelled', '--path', 'nothing')
    settings = cli.cwd/'runs'/'flat'/'settings.json'
    saved = settings.read_text()
    settings.write_text(saved.replace(json.dumps(str(places/'flat')), json.dumps(str(places/'gone'))))
    message = command(commands.clae_report, 'flat')
    assert 'gone, which is not there' in message and '--path FOLDER' in message
    settings.write_text(re.sub('"contents": "[^"]*"', '"contents": "x"', saved))
    message = command(commands.clae_report, 'flat')
    assert 'their contents' in message and '--path FOLDER' in message
    (cli.cwd/'runs'/'flat'/'summary.json').write_text('[]')
    assert 'damaged' in command(commands.clae_report, 'flat')
    (cli.cwd/'runs'/'labelled'/'encoder.safetensors').unlink()
    assert 'encoder.safetensors' in command(commands.clae_report, 'labelled')

def test_old_runs_and_other_images(cli, digits_dir):
    """A run of 0.1.0 has less to tell; its encoder looks at another folder, whatever its layout,
    read as its own images were"""
    runs = shutil.copytree(old_runs, cli.cwd/'runs')
    for i,args in enumerate([(), ('--path', digits_dir/'rgb')], 1):
        r = cli('clae_report', 'finished', *args)
        assert r.returncode == 0, r.stderr
        text = (runs/'finished'/f"report{'' if i == 1 else '-2'}.html").read_text()
        assert not Strict(text).bad and 'eval-digits-authors.json' in text and 'trained encoder' in text
        for o in ('Has it learnt','What training saw','done to them'): assert o not in text, o
        assert 'Losses' in text and (f'240 images in {digits_dir}' in text) == (i == 2)
    assert 'Red:' not in text and '0/000.png' in text

# In a browser

@pytest.fixture
def visit(browser):
    "Opens a page; whatever goes wrong is in the list that it returns"
    tabs = []
    def _visit(file, **kwargs):
        tab,bad = browser.new_page(**kwargs),[]
        tabs.append(tab)
        tab.on('console', lambda m: bad.append(m.text))
        tab.on('pageerror', lambda e: bad.append(str(e)))
        tab.on('dialog', lambda d: bad.append(d.message))
        tab.on('request', lambda r: urlsplit(r.url).scheme not in ('file','data') and bad.append(r.url))
        tab.goto(Path(file).as_uri())
        return tab,bad
    yield _visit
    for tab in tabs: tab.close()

@pytest.mark.parametrize('scheme', ['light','dark'])
@pytest.mark.parametrize('width', [1280,390])
@pytest.mark.parametrize('name', ['labelled','flat'])
def test_in_a_browser(places, visit, name, width, scheme):
    tab,bad = visit(places/'runs'/name/'report.html', viewport={'width': width, 'height': 900}, color_scheme=scheme)
    assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
    outside = '''[...document.querySelectorAll("body *")]
        .filter(o => !o.closest(".wide > *") && o.getBoundingClientRect().right > innerWidth)
        .map(o => o.outerHTML.slice(0, 80))'''
    assert tab.evaluate(outside) == []
    assert tab.evaluate('[...document.images].filter(o => !o.naturalWidth)'
                        '.map(o => o.alt)') == []
    assert tab.evaluate('[...document.images].filter(o => o.naturalWidth != o.getAttribute("width"))'
                        '.map(o => o.alt)') == []
    tab.evaluate('document.querySelectorAll("details").forEach(o => o.open = true)')
    assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
    colours = [tab.evaluate(f'getComputedStyle(document.body).{o}') for o in ('backgroundColor','color')]
    back,text = (sum(map(int, re.findall(r'\d+', o)[:3])) for o in colours)
    assert (back < 150 and text > 500) if scheme == 'dark' else (back > 700 and text < 200)
    assert tab.evaluate('getComputedStyle(document.querySelector(".card")).backgroundColor') == 'rgb(255, 255, 255)'
    assert bad == []

def test_no_script_runs(places, visit, tmp_path):
    "Not of hostile names, with the page's policy or without; and the test would notice"
    text = page_of(places, 'flat')
    dl = folder_dl(places/'flat', 16, bs=64, num_workers=0)
    seen = look_at(places/'runs'/'flat'/'encoder.safetensors', {'': dl})
    few = [i for i,name in enumerate(seen.names) if not re.fullmatch(r'\d{4}\.png|(copy of|saved) .*', name)]
    seen = look_at(places/'runs'/'flat'/'encoder.safetensors', {'': dl.new(dl.dataset.take(few))})
    evil = '</title><script>document.title="owned"</script>'
    text = report_page(f'x{evil}', dict(bare, settings={evil: evil, 'images': [f'{evil}\udcff\0']}), seen, evil)
    assert rf'{html.escape(evil, quote=False).replace(chr(34), "&#34;")}\udcff\x00' in text
    policy = re.search('<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    unsafe = text.replace('</main>', '<img src="x" onerror="document.title=\'owned\'">'
                                     '<script>document.title="owned"</script></main>')
    for page,title in ((text, f'Run x{evil}'), (text.replace(policy, ''), f'Run x{evil}'), (unsafe, f'Run x{evil}'),
                       (unsafe.replace(policy, ''), 'owned')):
        (tmp_path/'page.html').write_text(page)
        tab,_ = visit(tmp_path/'page.html')
        tab.wait_for_timeout(100)
        assert tab.title() == title
