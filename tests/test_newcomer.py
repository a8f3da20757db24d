"""A newcomer's path: the README's Python, copied as it stands, in an empty folder. (Its two lines of shell are what `.ci/run`
runs, the tutorials are run by `nbdev_test`.)"""
import os, re, subprocess, sys
from pathlib import Path

import pytest

readme = (Path(__file__).parent.parent/'README.md').read_text()
blocks = re.findall(r'^```python\n(.*?)^```', readme, re.M|re.S)

def test_there_is_one_block(): assert len(blocks) == 1 and 'clae_learner' in blocks[0]

@pytest.mark.slow
def test_python_of_the_readme(tmp_path):
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'PYTHONWARNINGS': 'ignore'}
    res = subprocess.run([sys.executable, '-c', blocks[0]], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=env)
    assert res.returncode == 0, res.stderr[-3000:]
    assert 'knn' in res.stdout.lower(), res.stdout[-2000:]
    assert [o.name for o in tmp_path.iterdir()] == ['encoder.safetensors']
