"Several processes (gloo, on the CPU): the same numbers on 1, 2 and 4, the first failure's own words, stops, nothing left behind"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest, torch
from programs import ROOT, descendants, environment, forked_workers, run, server
import launched
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.launch import Interrupted, LaunchError, launch

HERE = Path(__file__).parent

def children(): return descendants(psutil.Process())

@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    server() # stays
    before, handlers = set(children()), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    more = list(set(children()) - before)
    psutil.wait_procs(more, timeout=10) # a program's exit code is there a moment before its process is gone
    assert not [p for p in more if p.is_running()]
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

@pytest.fixture(scope='module')
def one(): return {n: launched.run(n_class=n) for n in (4, 3)}

@pytest.fixture(scope='module')
def four():
    with forked_workers(): return dict(zip(['ddp', 'fsdp'], launch(launched.several, ('run', 'ddp'), ('run', 'fsdp'), nproc=4)))

@pytest.fixture(scope='module')
def two(four):
    "What two processes say, and how they continue what four have saved"
    return dict(zip(['talk', 'uneven', 'ddp after fsdp', 'fsdp after ddp'], launch(launched.several, ('small_talk',), ('run', 'ddp', 3),
        ('run', 'ddp', 4, four['fsdp']['halfway']), ('run', 'fsdp', 4, four['ddp']['halfway']), nproc=2)))

def assert_same(a, b, tolerance=1e-12):
    "Weights, average, Adam's moments and the figures of the steps that both have"
    for name in ('model', 'average'):
        assert list(a[name]) == list(b[name])
        for k, v in a[name].items():
            assert type(v) is torch.Tensor and v.dtype == b[name][k].dtype
            torch.testing.assert_close(v, b[name][k], atol=tolerance, rtol=0)
    assert set(a['optimiser']['state']) == set(b['optimiser']['state'])
    for k, v in a['optimiser']['state'].items():
        for name in v: torch.testing.assert_close(v[name], b['optimiser']['state'][k][name], atol=tolerance, rtol=0)
    for x, y in zip(reversed(a['rows']), reversed(b['rows'])): assert x == pytest.approx(y, abs=tolerance)

def test_one_process_trains(one):
    rows = one[4]['rows']
    assert len(rows) == launched.STEPS and all(r['norm'] > .05 for r in rows), 'the clip has to have an effect'

@pytest.mark.parametrize('sharding', ['ddp', 'fsdp'])
def test_four_processes_compute_what_one_does(one, four, sharding): assert_same(one[4], four[sharding])

def test_an_uneven_deal_on_two_processes(one, two): assert_same(one[3], two['uneven'])

@pytest.mark.parametrize('how', ['ddp after fsdp', 'fsdp after ddp'])
def test_two_processes_continue_what_four_have_saved(one, two, how): assert_same(one[4], two[how])

def test_one_process_continues_what_four_have_saved(one, four): assert_same(one[4], launched.run(states=four['fsdp']['halfway']))

def test_small_messages(two):
    talk = two['talk']
    assert (talk['world'], talk['device'], talk['threads']) == (2, 'cpu', 1)
    assert talk['share'] == [0, 2, 4, 6, 8] and talk['any'] == [True, False] and talk['said'] == 'from 1'
    assert '1 classes for 2 processes' in talk['too_few']
    assert talk['mean']['a'] == pytest.approx((.1 + 2*1.1)/3, abs=1e-15) and talk['mean']['b'] == pytest.approx([2/3, 1])
    assert talk['mean']['c'].dtype == torch.float32 and talk['mean']['c'].tolist() == pytest.approx([2/3, 2/3])

def test_a_wrong_parameter_stays_one():
    with pytest.raises(ParameterError) as caught: launch(launched.fail, 'parameter', nproc=2)
    assert str(caught.value) == 'n_class=3: too few'

def test_a_killed_process():
    with pytest.raises(LaunchError, match='^rank 1 of 2 was ended by SIGKILL'): launch(launched.fail, 'kill', nproc=2)

@pytest.mark.parametrize('arguments, keywords, sentence', [
    ((lambda: 1,), dict(nproc=2), 'can only import it from a module'),
    ((launched.fail, lambda: 1), dict(nproc=2), 'fail and its arguments cannot be sent'),
    ((launched.fail,), dict(nproc=-1), 'nproc=-1'),
    ((launched.fail,), dict(nnodes=0), 'nnodes=0'),
    ((launched.fail,), dict(nnodes=2), 'host:port'),
    ((launched.fail,), dict(nnodes=2, rdzv='node01'), "rdzv='node01'"),
])
def test_what_cannot_be_started_is_refused(arguments, keywords, sentence):
    with pytest.raises(ParameterError, match=sentence): launch(*arguments, **keywords)

def test_torchrun(tmp_path):
    done = run(['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'launched', tmp_path/'out.json'], HERE)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/'out.json').read_text())
    assert found['world'] == 2 and found['share'] == [0, 2, 4, 6, 8] and found['said'] == 'from 1'

def test_slurm_variables(monkeypatch):
    from drift_rae.engine.launch import _environment
    for k, v in dict(SLURM_NTASKS='16', SLURM_PROCID='11', SLURM_LOCALID='3').items(): monkeypatch.setenv(k, v)
    assert _environment() == 0, 'without an address there is nothing to join'
    monkeypatch.setenv('MASTER_ADDR', 'node01')
    for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'): monkeypatch.setenv(k, ''); monkeypatch.delenv(k) # so that they are removed again
    assert _environment() == 16
    assert [os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'MASTER_PORT')] == ['11', '3', '29500']

def notebook(path, *sources):
    cells = [dict(cell_type='code', execution_count=None, metadata={}, outputs=[], source=s) for s in sources]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')), nbformat=4, nbformat_minor=4)))

def test_a_notebook_shows_rank_0_and_fails_with_rank_1(tmp_path):
    notebook(tmp_path/'in.ipynb', 'import launched\nfrom drift_rae.engine.launch import launch', "launch(launched.fail, 'raise', nproc=2)", "print('not reached')")
    done = run(['-m', 'papermill', '--no-progress-bar', 'in.ipynb', 'out.ipynb'], tmp_path, environment(PYTHONPATH=f'{ROOT}{os.pathsep}{HERE}'))
    assert done.returncode == 1
    assert 'LaunchError: FloatingPointError: step 7: the loss is nan (rank 1 of 2)' in done.stderr, "the failing rank's own words, not its peer's lost connection"
    assert "raise FloatingPointError('step 7" in done.stderr
    cells = [c for c in json.loads((tmp_path/'out.ipynb').read_text())['cells'] if c['cell_type'] == 'code'][-3:]
    assert ''.join(''.join(o['text']) for o in cells[1]['outputs'] if o['output_type'] == 'stream') == 'rank 0 prints\n'
    assert cells[1]['outputs'][-1]['ename'] == 'LaunchError' and not cells[2]['outputs']

def test_a_stop_saves_first(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport launched\nfrom drift_rae.engine.launch import launch\nif __name__ == '__main__': launch(launched.wait, {str(tmp_path)!r}, nproc=2)"
    (tmp_path/'main.py').write_text(code)
    parent = subprocess.Popen([sys.executable, 'main.py'], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        pids = [tmp_path/f'{r}.pid' for r in (0, 1)]
        deadline = time.monotonic() + 60
        while not all(p.exists() and p.read_text() for p in pids) and time.monotonic() < deadline: time.sleep(.1)
        time.sleep(.5)
        parent.send_signal(signal.SIGTERM)
        error = parent.communicate(timeout=60)[1]
    finally: parent.kill()
    assert parent.returncode == 1
    assert 'Interrupted: stopped by SIGTERM after step' in error and error.rstrip().endswith('all is saved')
    assert (tmp_path/'saved').exists()
    assert not any(psutil.pid_exists(int(p.read_text())) for p in pids)
