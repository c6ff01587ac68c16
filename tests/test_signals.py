"Told to stop, or without a parent: a checkpoint is saved and no process stays behind"
import os, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from programs import Program, descendants, environment, words

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent
def saved_within(): return 5*max(1, os.getloadavg()[0]/(os.cpu_count() or 1)) # seconds; more on a machine that is busy now
SMALL = dict(n_class=2, n_pos=32, n_neg=8, n_extra_neg=24, monitor_every=0, steps=100_000)
WAYS = {
    'python': [sys.executable, '-m', 'drift_rae.distill', '--nproc', '1'],
    'two': [sys.executable, '-m', 'drift_rae.distill', '--nproc', '2'],
    'torchrun': [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'drift_rae.distill'],
    'papermill': [sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT/'nbs/06_distill.ipynb'), 'out.ipynb', '-p', 'nproc', '1'],
    'papermill two': [sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT/'nbs/06_distill.ipynb'), 'out.ipynb', '-p', 'nproc', '2'],
}

def heed():
    "In the new program: signals as at a terminal, also if the tests themselves run in the background or under nohup"
    for name in (signal.SIGINT, signal.SIGHUP): signal.signal(name, signal.SIG_DFL)

@pytest.fixture(scope='module', autouse=True)
def on_few_latents(few_latents): SMALL['latents'] = few_latents

def begin(way, folder, fork=False):
    "Start a run that only a signal ends (with `fork`, without its imports); returns it and all its processes once it has made steps"
    option = (lambda k: ['-p', k]) if 'papermill' in way else (lambda k: [f'--{k}'])
    command = [*WAYS[way], *(w for k, v in dict(SMALL, out=folder/'run').items() for w in [*option(k), str(v)])]
    if fork: process = Program(command[1:], folder, out=folder/'said.txt')
    else: process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=open(folder/'said.txt', 'w'), stderr=subprocess.STDOUT, preexec_fn=heed)
    log, deadline = folder/'run/log.csv', time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count('\n') > 3: break
        time.sleep(.1)
    else:
        process.kill()
        pytest.fail((folder/'said.txt').read_text()[-3000:])
    parent = psutil.Process(process.pid)
    return process, descendants(parent)

def alive(p):
    try: return p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    except psutil.Error: return False

def ends(process, family, folder):
    "All processes end in time, and a checkpoint is there"
    deadline = time.monotonic() + saved_within()
    while time.monotonic() < deadline and (process.poll() is None or any(map(alive, family))): time.sleep(.05)
    left = [words(p)[:80] for p in family if alive(p)]
    still = process.poll() is None
    for p in family:
        if alive(p): p.kill()
    process.kill()
    process.wait()
    saved = list((folder/'run/checkpoints').glob('step_*.json'))
    assert not left and not still and saved, (left, still, saved, (folder/'said.txt').read_text()[-3000:])

@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
@pytest.mark.parametrize('way', list(WAYS))
def test_a_signal_to_the_program(way, name, tmp_path):
    process, family = begin(way, tmp_path, fork=name != 'SIGTERM')
    process.send_signal(getattr(signal, name))
    ends(process, family, tmp_path)
    assert process.returncode != 0

@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_signal_to_papermills_kernel(name, tmp_path):
    process, family = begin('papermill', tmp_path, fork=name != 'SIGTERM')
    kernel, = psutil.Process(process.pid).children()
    kernel.send_signal(getattr(signal, name))
    ends(process, family, tmp_path)

@pytest.mark.parametrize('way', ['two', 'torchrun', 'papermill', 'papermill two'])
def test_a_killed_parent(way, tmp_path):
    process, family = begin(way, tmp_path, fork=way != 'two')
    process.kill()
    ends(process, family, tmp_path)

def test_nohup_is_respected(tmp_path):
    code = f"import small_runs; small_runs.forever({str(tmp_path)!r})"
    environment = {**os.environ, 'PYTHONPATH': f'{ROOT}:{HERE}'}
    command = ['nohup', sys.executable, '-c', code]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith('step 2'): break
    process.send_signal(signal.SIGHUP)
    for line in process.stdout:
        if line.startswith('step 20'): break
    assert process.poll() is None
    process.terminate()
    process.communicate()
