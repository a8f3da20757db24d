"Everything the package says of itself stands in `settings.ini`; this file hands it to setuptools."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = cfg['DEFAULT']
test = cfg['test_requirements'].split()

def absolute(md):
    "Links and pictures of the repository by their whole address: a package index shows the text without the files"
    def whole(m): return f"{m[1]}]({cfg['git_url']}/{'raw' if m[1][0] == '!' else 'blob'}/{cfg['branch']}/{m[2]})"
    return re.sub(r'(!?\[[^\]]*)\]\((?!\w+:|#)([^)\s]+)\)', whole, md)

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=absolute(Path(__file__).with_name('README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    keywords=cfg['keywords'],
    license='Apache-2.0',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: 3.{v}' for v in (11, 12, 13))],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_path'] + '*']),
    include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require={'test': test, 'dev': test + cfg['dev_requirements'].split(),
                    'timm': ['timm'], 'ray': ['ray'], 'onnx': ['onnx', 'onnxscript'],
                    'tensorboard': ['tensorboard'], 'wandb': ['wandb']},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
