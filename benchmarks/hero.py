#!/usr/bin/env python3
"""The home page's picture, of an encoder trained for it: `python benchmarks/hero.py` writes results/hero.png and
results/hero.md. Needs scikit-image; a few minutes on a CPU."""
import io
import itertools
import tempfile
from pathlib import Path

from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

from clae_fastai.all import clae_learner, get_dls, resnet8, set_seed
from clae_fastai.paper.analysis import adversarial_images, plot_adversarial_images
from report import machine, root

side,height,step,epochs = 64,160,24,20 # pixels of a tile, of a picture, and from tile to tile
shown = 5,18,19,26 # of the first batch, chosen by eye
credits = ('*china* by danielbuechele and *flower* by vultilion (Creative Commons attribution) from scikit-learn; '
           'the others are in the public domain or CC0, from scikit-image.')

def pictures():
    return dict(
        astronaut=data.astronaut(), cat=data.chelsea(), china=load_sample_image('china.jpg'), coffee=data.coffee(),
        flower=load_sample_image('flower.jpg'), tissue=data.immunohistochemistry())

def write_tiles(folder):
    "Overlapping tiles of the pictures, made so small that a tile shows a thing and not a texture"
    for name,x in pictures().items():
        im = Image.fromarray(x)
        im = im.resize((round(height*im.width/im.height), height), Image.LANCZOS)
        tops,lefts = (range(0, o-side+1, step) for o in (im.height, im.width))
        for i,(top,left) in enumerate(itertools.product(tops, lefts)):
            file = folder/name/f'{i:02}.png'
            file.parent.mkdir(exist_ok=True)
            im.crop((left, top, left+side, top+side)).save(file)

def main():
    set_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        write_tiles(Path(tmp))
        learn = clae_learner(get_dls('folder', tmp, bs=32), resnet8, views='weak', temperature=.1, head='mlp', every=1)
        learn.fit_one_cycle(epochs, 3e-3)
        images = adversarial_images(learn, 32).iloc[[*shown]]
    plot_adversarial_images(images).savefig(picture := io.BytesIO(), dpi=150)
    Image.open(picture).convert('RGB').quantize(255, dither=Image.Dither.NONE).save(
        root/'results'/'hero.png', optimize=True)
    numbers = images[['linf','cos_p','cos_adv']].round(3)
    rows = ['| image | largest change, normalised | cosine of views A and B | of view A and adversary |',
            '|---|---|---|---|',
            *(f'| {i+1} | {o.linf} | {o.cos_p} | {o.cos_adv} |' for i,o in enumerate(numbers.itertuples()))]
    (root/'results'/'hero.md').write_text('\n'.join([*rows, '',
        'The rows of `hero.png`: resnet8, SimCLR with temperature .1, an attack in each step, views `weak`, eps .03, '
        f'{epochs} epochs on {len(learn.dls.train_ds)} tiles of {side} pixels. Pictures: {credits}', '',
        f'`python benchmarks/hero.py` on {machine()}']) + '\n')

if __name__ == '__main__': main()
