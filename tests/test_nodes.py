"Several machines: network namespaces of one machine, joined by a bridge, are the nodes of a run; one loses its cable"
import os, shutil, subprocess, sys, time
from pathlib import Path
import pytest, torch
import node_runs
from drift_rae.engine.launch import launch

TESTS = Path(__file__).parent
SILENT = 8 # seconds after which a machine is given up

def ip(words): subprocess.run(['ip', *words.split()], check=True, capture_output=True, text=True)

def permitted():
    "Why namespaces cannot be made here; empty if they can"
    if not shutil.which('ip') or not shutil.which('unshare'): return 'ip (iproute2) or unshare is not installed'
    name = f'dr{os.getpid()}try'
    made = subprocess.run(['ip', 'netns', 'add', name], capture_output=True, text=True)
    if made.returncode: return f'network namespaces are not permitted: {made.stderr.strip()}'
    subprocess.run(['ip', 'netns', 'del', name])
    inside = subprocess.run(['unshare', '--uts', '--mount', '--net', 'sh', '-c', 'hostname x && mount --bind /dev/null /etc/hosts'], capture_output=True, text=True)
    return f'host names in namespaces are not permitted: {inside.stderr.strip()}' if inside.returncode else ''

class Machines:
    "Namespaces named node1, node2, ... with the addresses 10.77.0.1, ..., on a bridge in a namespace of its own"
    def __init__(self, n, folder):
        self.n, self.folder, self.prefix = n, folder, f'dr{os.getpid()}'
        (folder/'hosts').write_text('127.0.0.1 localhost\n' + ''.join(f'10.77.0.{i} node{i}\n' for i in self))
    def __iter__(self): return iter(range(1, self.n+1))
    def name(self, i): return f'{self.prefix}n{i}'
    def __enter__(self):
        hub = self.name(0)
        ip(f'netns add {hub}'); ip(f'-n {hub} link add br0 type bridge'); ip(f'-n {hub} link set br0 up')
        for i in self:
            ip(f'netns add {self.name(i)}')
            ip(f'-n {hub} link add port{i} type veth peer name eth0 netns {self.name(i)}')
            ip(f'-n {hub} link set port{i} master br0'); ip(f'-n {hub} link set port{i} up')
            ip(f'-n {self.name(i)} addr add 10.77.0.{i}/24 dev eth0')
            ip(f'-n {self.name(i)} link set lo up'); self.cable(i, 'up')
        return self
    def __exit__(self, *_):
        for i in range(self.n+1): subprocess.run(['ip', 'netns', 'del', self.name(i)], capture_output=True)
    def cable(self, i, state): ip(f'-n {self.name(i)} link set eth0 {state}')
    def start(self, folder, pause):
        "The same command on each machine; open files of what they say"
        here = f'hostname node$0 && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        env = {**os.environ, 'PYTHONPATH': f'{TESTS.parent}:{TESTS}', 'GLOO_SOCKET_IFNAME': 'eth0', 'DRIFT_RAE_SILENT': str(SILENT)}
        self.said = [folder/f'said_{i}.txt' for i in self]
        return [subprocess.Popen(['ip', 'netns', 'exec', self.name(i), 'unshare', '--uts', '--mount', 'sh', '-c', here, str(i), sys.executable, '-m', 'node_runs', str(folder), str(self.n), str(pause)],
            cwd=TESTS, env=env, stdout=open(said, 'w'), stderr=subprocess.STDOUT) for i, said in zip(self, self.said)]

def wait_for(said, text, seconds=500):
    end = time.monotonic() + seconds
    while text not in said.read_text():
        assert time.monotonic() < end, said.read_text()[-3000:]
        time.sleep(.1)

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_a_machine_is_cut_off_and_the_run_continues(n, tmp_path):
    "All end, with the name of the lost machine; the next start ends where an undisturbed run ends, to the bit; one machine writes"
    if why := permitted(): pytest.skip(why)
    (tmp_path/'alone').mkdir(); (tmp_path/'cut').mkdir()
    launch(node_runs.work, str(tmp_path/'alone'), 0., nproc=n)
    with Machines(n, tmp_path) as machines:
        running = machines.start(tmp_path/'cut', 3.) # slow enough for the cut to come between
        try:
            wait_for(machines.said[0], 'finished step 5')
            machines.cable(n, 'down')
            begin = time.monotonic()
            codes = [p.wait(500) for p in running]
            print(f'{n} machines: all ended {time.monotonic() - begin:.0f} s after the cut (given up after {SILENT} s)')
            said = [s.read_text() for s in machines.said]
            assert all(codes), said
            for text in said[:-1]: assert f'no sign of life from node{n}' in text, text
            assert f'node{n} has lost node1' in said[-1], said[-1]
            assert not (tmp_path/'cut/result.pt').exists()
            machines.cable(n, 'up')
            running = machines.start(tmp_path/'cut', 0.)
            assert [p.wait(500) for p in running] == [0]*n, [s.read_text()[-2000:] for s in machines.said]
        finally:
            for p in running: p.kill()
        assert 'finished step 1\n' not in machines.said[0].read_text() # it went on
    a, b = (torch.load(tmp_path/f/'result.pt') for f in ('alone', 'cut'))
    assert a['figures'] == b['figures'] and torch.equal(a['weights'], b['weights'])
    assert {p.name for p in (tmp_path/'cut').iterdir() if p.is_dir()} == {'node1'}, 'another machine than that of rank 0 has written'
