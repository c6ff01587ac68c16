"""Python programs as a person starts them, for all tests. Importing torch, papermill and Jupyter takes longer than many
of the programs that tests start, so one process per test process imports them (and nothing of drift_rae), and each
program is a fork of it: the same code, with its own folder, environment, output and exit code. The kernel that papermill
starts is a fork, too, and so are the fork server of a program's workers and the processes of torchrun."""
import atexit
import gc
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
IMPORTED = ('torch', 'torch._dynamo', 'torch.distributed.run', 'timm', 'safetensors.torch', 'scipy.linalg', 'papermill.cli',
            'papermill.iorw', 'papermill.engines', 'nbclient', 'jupyter_client', 'ipykernel.kernelapp', 'ipykernel.ipkernel',
            'sklearn.datasets', 'sklearn.model_selection', 'sklearn.neighbors', 'matplotlib.pyplot')


def environment(**more):
    "As a stranger's: without the marks of a test run"
    ours = ('IN_TEST', 'PYTEST_CURRENT_TEST') # with the latter ipykernel does not look at what other processes print
    return {**{k: v for k, v in os.environ.items() if k not in ours}, 'PYTHONPATH': str(ROOT), **more}


@lru_cache
def server():
    "The process that has imported what takes long"
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    atexit.register(process.stdin.close)
    return process


def descendants(process):
    "The processes that `process` (of psutil) has started, without Python's own resource tracker; one may end while it is looked at"
    def counts(p):
        try: return 'resource_tracker' not in ' '.join(p.cmdline())
        except psutil.NoSuchProcess: return False
    return [p for p in process.children(recursive=True) if counts(p)]


def words(process):
    "The command of a process of psutil; of one that has ended in the meantime, that it has"
    try: return ' '.join(process.cmdline())
    except psutil.NoSuchProcess: return 'ended'


class Started:
    "A process with the methods of subprocess.Popen that tests and jupyter_client use; a subclass has `pid` and `poll`"
    args = returncode = None

    def wait(self, timeout=None):
        end = time.monotonic() + timeout if timeout else float('inf')
        while self.poll() is None:
            if time.monotonic() > end: raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def terminate(self): self.send_signal(signal.SIGTERM)

    def kill(self): self.send_signal(signal.SIGKILL)


class Program(Started):
    "A started program"
    def __init__(self, argv, cwd=None, env=None, out=None, err=None):
        self.folder = tempfile.TemporaryDirectory()
        self.args, self.returncode, self.status = list(map(str, argv)), None, Path(self.folder.name, 'status')
        self.out, self.err = (Path(f or Path(self.folder.name, name)).absolute() for f, name in ((out, 'out'), (err or out, 'err')))
        job = dict(argv=self.args, cwd=str(cwd or os.getcwd()), env=env or environment(), status=str(self.status), out=str(self.out), err=str(self.err))
        server().stdin.write(json.dumps(job) + '\n')
        server().stdin.flush()
        answer = server().stdout.readline()
        if not answer: raise RuntimeError('the process that forks programs has ended')
        self.pid = int(answer)

    def poll(self):
        if self.returncode is None and self.status.exists(): self.returncode = int(self.status.read_text())
        return self.returncode

    def finished(self):
        "Wait; the program with its output, as subprocess.run returns it"
        self.wait()
        return subprocess.CompletedProcess(self.args, self.returncode, *(f.read_text(errors='replace') for f in (self.out, self.err)))


def run(argv, cwd=None, env=None):
    "`python *argv` in a folder, as subprocess.run does it with captured text"
    return Program(argv, cwd, env).finished()


def papermill(notebook, folder, made='out.ipynb', env=None, /, **parameters):
    "Run a notebook of the book from a folder, with parameters"
    given = [x for k, v in parameters.items() for x in ('-p', k, str(v))]
    return run(['-m', 'papermill', '--no-progress-bar', ROOT/'nbs'/f'{notebook}.ipynb', made, *given], folder, environment(**(env or {})))


@contextmanager
def forked_workers():
    "Processes of `launch` are forks of one that has imported torch, as those of the main job are: the import takes longer than most tests"
    from drift_rae.engine import launch
    before = launch.START
    if 'forkserver' in multiprocessing.get_all_start_methods():
        multiprocessing.get_context('forkserver').set_forkserver_preload(['torch._dynamo', 'torch.distributed.fsdp', 'drift_rae.distill'])
        launch.START = 'forkserver'
    try: yield
    finally: launch.START = before


# --- in the process that imports and forks

def settle(cwd, env):
    "Folder, environment and search path of a new program"
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [*filter(None, env.get('PYTHONPATH', '').split(os.pathsep)), *PATHS]
    import matplotlib
    if 'MPLBACKEND' in env: matplotlib.rcParams['backend'] = env['MPLBACKEND'] # it is read when matplotlib is imported


class Waiting(Started):
    "A fork, made while its parent has no threads yet, that waits to be told which function to call; it ends with its parent"
    stdin = stdout = stderr = None

    def __init__(self, group=False):
        self.told, hears = socket.socketpair()
        self.pid = os.fork()
        if self.pid:
            hears.close()
            while group and os.getpgid(self.pid) != self.pid: time.sleep(.001) # signals are sent to this group
            return
        self.told.close()
        if group: os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN) # of the parent's group
        order, files, *_ = socket.recv_fds(hears, 2**20, 4)
        while more := hears.recv(2**20): order += more
        hears.close()
        if not order: os._exit(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function, given = json.loads(order)
        to_the_end(lambda: globals()[function](*files, **given))

    def tell(self, function, files=(), **given):
        "Call a function of this file in the fork, with open files, which have other numbers there, and keywords"
        socket.send_fds(self.told, [json.dumps((function, given)).encode()], list(files))
        self.told.shutdown(socket.SHUT_WR) # later forks have copies of it
        return self

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def papermill_kernel(waiting):
    "What starts papermill's kernel, in place of jupyter_client.launcher.launch_kernel"
    def start(command, cwd=None, env=None, **options):
        assert command[1:3] == ['-m', 'ipykernel_launcher'], command
        env = dict(env or os.environ, JPY_PARENT_PID=str(os.getpid()))
        parent = f'--IPKernelApp.parent_handle={os.getpid()}' # ipykernel reads the variable when it is imported
        return waiting.tell('become_kernel', argv=[*command[3:], parent], cwd=str(cwd or os.getcwd()), env=env)
    return start


def become_kernel(argv, cwd, env):
    "The kernel, as `python -m ipykernel_launcher` runs it"
    settle(cwd, {'MPLBACKEND': 'module://matplotlib_inline.backend_inline', **env})
    fork_servers_fork()
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance(argv=argv)
    os._exit(0)


def fork_servers_fork():
    "Let the fork server of this process be a fork, which has imported what workers import"
    from multiprocessing import util
    waiting, start = [Waiting()], util.spawnv_passfds
    def spawn(path, args, files):
        if not waiting or 'multiprocessing.forkserver' not in args[-1]: return start(path, args, files)
        return waiting.pop().tell('become_fork_server', (*files, 1, 2), args=[*map(os.fsdecode, args)], cwd=os.getcwd(), env=dict(os.environ)).pid
    util.spawnv_passfds = spawn


def become_fork_server(listener, alive, out, err, args, cwd, env):
    "`python -c 'from multiprocessing.forkserver import main; main(...)'` with the numbers that its files have here"
    for here, number in ((out, 1), (err, 2)): os.dup2(here, number)
    settle(cwd, env)
    sys.path.insert(0, '')
    sys.orig_argv = args
    exec(re.sub(r'main\(\d+, \d+', f'main({listener}, {alive}', args[-1], count=1), {})


def torchrun_forks(number):
    "Let the processes of torchrun be forks"
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler as handler
    waiting = [Waiting(group=True) for _ in range(number)]
    def start(args, env, stdout, stderr, start_new_session):
        assert args[1:3] == ('-u', '-m'), args
        return waiting.pop().tell('become_worker', (stdout or 1, stderr or 2), argv=args[2:], cwd=os.getcwd(), env=env)
    handler.Popen = start


def become_worker(out, err, argv, cwd, env):
    "`python -u *argv` with its output in open files"
    for here, number in ((out, 1), (err, 2)): os.dup2(here, number)
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(write_through=True)
    settle(cwd, env)
    run_python(argv)


def become(job):
    "In the fork: `python *argv`"
    for number in (signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    settle(job['cwd'], job['env'])
    where = {name: os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ('out', 'err')}
    for number, name in ((1, 'out'), (2, 'err')): os.dup2(where[name], number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    run_python(job['argv'])


def run_python(argv):
    "`python *argv` in this process"
    option, what, *rest = argv if argv[0] in ('-c', '-m') else ('', *argv)
    sys.argv, sys.orig_argv = [option or what, *rest], [sys.executable, *argv]
    if what == 'papermill':
        from jupyter_client.provisioning import local_provisioner
        local_provisioner.launch_kernel = papermill_kernel(Waiting(group=True))
        from papermill.cli import papermill as program
        program(args=rest, prog_name='papermill')
    elif option == '-c':
        sys.path.insert(0, '')
        main = sys.modules['__main__'] = type(sys)('__main__')
        exec(compile(what, '<string>', 'exec'), main.__dict__)
    elif option == '-m':
        if what == 'torch.distributed.run': torchrun_forks(int(rest[rest.index('--nproc-per-node') + 1]))
        else: fork_servers_fork()
        sys.path.insert(0, os.getcwd())
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str(Path(what).parent.absolute()))
        runpy.run_path(what, run_name='__main__')


def to_the_end(act):
    "Call a function as the program of this process, and end with its exit code"
    code = 1
    try:
        act()
        code = 0
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc() # papermill reports a failed cell so
    finally:
        import threading
        for hook in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush): hook() # as at the end of python
        os._exit(code)


def supervise(job):
    "Fork the program, tell its number, wait, and leave its exit code where the test looks"
    program = os.fork()
    if program == 0: to_the_end(lambda: become(job))
    print(program, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    made = Path(job['status'] + '.tmp')
    made.write_text(str(code))
    made.rename(job['status'])
    os._exit(0)


def serve():
    "One fork for each line"
    import importlib
    for name in IMPORTED: importlib.import_module(name)
    import torch
    torch.set_num_threads(1)
    gc.freeze() # no fork looks for garbage among what was imported here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN) # nobody waits for the supervisors
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(0)
            supervise(json.loads(line))


PATHS = [p for p in sys.path[1:] if p != str(ROOT)] # without this folder and PYTHONPATH
if __name__ == '__main__': serve()
