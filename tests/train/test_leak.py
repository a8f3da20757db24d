"""Does a long run need more and more memory? A minute here;
half an hour with `pytest -m slow tests/train/test_leak.py --leak-minutes 30`."""
import subprocess
import sys
from pathlib import Path

import pytest

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_peak_memory_stays(tmp_path, pytestconfig):
    seconds = 60*pytestconfig.getoption('--leak-minutes')
    r = subprocess.run([sys.executable, Path(__file__).with_name('leak_worker.py'), str(seconds), tmp_path],
        capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    early,epoch,late,last = map(int, r.stdout.split()[-4:])
    print(f'{early/1024:.0f} MiB after epoch {epoch}, {late/1024:.0f} MiB after epoch {last}')
    assert last > epoch + 10 and late < 1.01*early
