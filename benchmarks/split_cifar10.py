#!/usr/bin/env python3
"""Folders to choose settings on, and to report them on: `python benchmarks/split_cifar10.py DIR OUT`. DIR is a
folder of CIFAR-10 images, train/<class>/*.png and test/<class>/*.png. Of each class's training images, by name,
every other one is trained on. `OUT/cifar10_choose` tests on the others, `OUT/cifar10_report` on the test images."""
import shutil
import sys
from pathlib import Path

def copy(files, folder):
    for f in files:
        to = folder/f.parent.name/f.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, to)

def main(source, out):
    for folder in sorted(Path(source, 'train').iterdir()):
        files = sorted(folder.glob('*.png'))
        for name in ('cifar10_choose', 'cifar10_report'): copy(files[::2], Path(out, name, 'train'))
        copy(files[1::2], Path(out, 'cifar10_choose', 'test'))
    copy(sorted(Path(source, 'test').glob('*/*.png')), Path(out, 'cifar10_report', 'test'))

if __name__ == '__main__':
    if len(sys.argv) != 3: sys.exit(f'usage: {sys.argv[0]} DIR OUT')
    main(*sys.argv[1:])
