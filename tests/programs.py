"""papermill as a person starts it, for all tests. Importing papermill takes longer than many of the notebooks that
tests run, so one process per test process imports it, and each run is a fork of that process: the same program, with
its own folder, environment, output and exit code."""
import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more):
    "As a stranger's: without the marks of a test run"
    ours = ('IN_TEST', 'PYTEST_CURRENT_TEST') # with the latter ipykernel does not look at what other processes print
    return {**{k: v for k, v in os.environ.items() if k not in ours}, 'PYTHONPATH': str(ROOT), **more}


@lru_cache
def server():
    "The process that has imported papermill"
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    atexit.register(process.stdin.close)
    return process


def run(argv, cwd, env):
    "`papermill *argv` in a folder; returns the finished process with its output, as subprocess.run does"
    with tempfile.TemporaryDirectory() as d:
        job = dict(argv=list(map(str, argv)), cwd=str(cwd), env=env, out=f'{d}/out', err=f'{d}/err')
        server().stdin.write(json.dumps(job) + '\n')
        server().stdin.flush()
        answer = server().stdout.readline()
        if not answer: raise RuntimeError('the process that forks papermill has ended')
        return subprocess.CompletedProcess(['papermill', *job['argv']], int(answer), *(Path(job[k]).read_text() for k in ('out', 'err')))


def papermill(notebook, folder, made='out.ipynb', env=None, /, **parameters):
    "Run a notebook of the book from a folder, with parameters"
    given = [x for k, v in parameters.items() for x in ('-p', k, str(v))]
    return run(['--no-progress-bar', ROOT/'nbs'/f'{notebook}.ipynb', made, *given], folder, environment(**(env or {})))


def become(job):
    "In the fork: papermill, as its console script runs it"
    from papermill.cli import papermill as program
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['env'])
    for number, name in ((1, job['out']), (2, job['err'])): os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    program(args=job['argv'], prog_name='papermill')


def serve():
    "One fork for each line"
    import papermill.cli, papermill.iorw, papermill.engines, nbclient, jupyter_client # noqa: what a run needs
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try: become(json.loads(line))
            except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
            except BaseException:
                import traceback
                traceback.print_exc() # papermill reports a failed cell so
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == '__main__': serve()
