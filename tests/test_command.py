"The command line: names and defaults, exit codes, messages as typed, help everywhere, what a first import loads"
import configparser, contextlib, importlib, io, json, os, re, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from drift_rae import _instead
from drift_rae.commands.command import COMMANDS, _source, load_command, main, overview
from drift_rae.engine.command import make_parser
from drift_rae.evaluate import load_extractor, save_reference, statistics
from programs import run

ROOT = Path(__file__).parents[1]
HERE = sorted(n for n in COMMANDS if _source(n))
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != 'IN_TEST'}, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}

def python(*words, cwd=None): return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)

def command(*words):
    "Exit code and both streams of a command, in this process"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main([str(w) for w in words])
        except SystemExit as e: code = e.code
    return code, out.getvalue(), err.getvalue()

# names and defaults of all options: a script may rely on them, so a change here is a change that CHANGELOG.md names
FROZEN = json.loads((ROOT/'tests/fixtures/commands.json').read_text())

def options_of(name):
    "Option -> default, or 'required' for a word in a fixed place"
    actions = make_parser(load_command(name), name)._actions
    return {a.dest: a.default if a.option_strings or a.nargs == '?' else 'required' for a in actions if a.dest not in ('help', 'pdb', 'xtra')}

@pytest.mark.parametrize('name', HERE)
def test_names_and_defaults_are_frozen(name): assert options_of(name) == FROZEN[name]

def test_every_command_is_frozen(): assert set(FROZEN) == set(HERE)

def test_the_commands_that_are_promised(): assert set(COMMANDS) == {'encode', 'teach', 'distill', 'sample', 'evaluate', 'fid', 'run', 'bench'}

def test_the_installed_names():
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    entries = dict(e.split('=') for e in settings['DEFAULT']['console_scripts'].split())
    assert set(entries) == {'drift_rae', 'drift_rae_distill'}
    for place in entries.values():
        module, _, function = place.partition(':')
        assert callable(getattr(importlib.import_module(module), function))

def test_help_and_version_do_not_load_torch():
    code = 'import sys; from drift_rae.commands.command import main; main([sys.argv[1]]); assert "torch" not in sys.modules'
    for word in ('--help', '--version'): assert python('-c', code, word).returncode == 0

@pytest.mark.parametrize('name', HERE)
def test_help_of_a_command(name):
    code, out, _ = command(name, '--help')
    assert code == 0 and 'nbs/' not in out and 'notebook' not in out
    for option in options_of(name): assert option in out
    undescribed = [a.dest for a in make_parser(load_command(name), name)._actions if not re.sub(r'\(default.*', '', a.help or '').strip()]
    assert not undescribed

def test_exit_codes(tmp_path):
    (tmp_path/'empty').mkdir()
    assert command('fid', 'nowhere', tmp_path)[0] == 1
    assert command('fid', tmp_path/'empty', 'tiny', '--features', 'judge')[0] == 1
    assert command('fid', 'tiny')[0] == 2 and command('fid', 'tiny', 'tiny', '--k', 'three')[0] == 2
    assert command()[0] == 2 and command('nothing')[0] == 2 and command('--help')[:2] == (0, overview() + '\n')

def test_interrupted(tmp_path, monkeypatch):
    module = importlib.import_module('drift_rae.commands.sample') # the package's attribute is the function's module
    def interrupted(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'make_images', interrupted)
    assert command('sample', 'tiny', '--out', tmp_path/'x')[0] == 130

def test_messages_name_options_as_typed(tmp_path):
    assert '--labels=' in command('sample', 'tiny', '--labels', 'eleven', '--out', tmp_path/'x')[2]
    assert '--features=' in command('fid', 'tiny', 'tiny', '--features', 'clip')[2]
    done = run(['-m', 'drift_rae.distill', '--model', 'xl', '--dry_run'], tmp_path)
    assert done.returncode == 1 and '--latents PATH' in done.stderr and '-p ' not in done.stderr
    assert 'Traceback' not in done.stderr and 'notebook' not in done.stderr

def test_the_old_entry_and_its_switches(tmp_path):
    words = ['-m', 'drift_rae.distill', '--n_class', 2, '--n_pos', 8, '--n_neg', 4, '--n_extra_neg', 4, '--steps', 3, '--out', tmp_path/'out']
    done = run([*words, '--dry-run'], tmp_path)
    assert done.returncode == 0 and 'dry run: 3 steps of 2 classes x (4 + 4) generated' in done.stdout
    assert run(['-m', 'drift_rae.distill', '--stepz', 3], tmp_path).returncode == 2

def test_python_m_never_says_nothing():
    assert 'usage: drift_rae' in python('-m', 'drift_rae', '--help').stdout
    done = python('-m', 'drift_rae.evaluate', '--help')
    assert done.returncode == 0 and 'drift_rae evaluate' in done.stdout
    runnable = {'distill', 'ablations', '__main__'} | {f'own.{n}' for n in ('encode', 'teach', 'distill', 'run')}
    for path in (ROOT/'drift_rae').rglob('*.py'):
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
        if name not in ('drift_rae', 'drift_rae._modidx'): assert bool(_instead(name)) or "__name__ == '__main__'" in path.read_text(), name
    for name in runnable: assert not _instead(f'drift_rae.{name}'), name

def pictures(folder, n, kind='png', size=16, value=0):
    folder.mkdir()
    g = np.random.default_rng(value)
    for i in range(n): Image.fromarray(g.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder/f'{i}.{kind}')
    return folder

def test_fid_of_every_mixture(tmp_path):
    a = pictures(tmp_path/'a', 80)
    images = np.random.default_rng(1).integers(0, 255, (90, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path/'images.npz', arr_0=images)
    kinds = {'folder': a, 'npz': tmp_path/'images.npz', 'run': 'tiny'}
    for first in kinds.values():
        for second in kinds.values():
            code, out, err = command('fid', first, second, '--features', 'judge', '--json')
            assert code == 0, err
            found = json.loads(out)
            assert set(found['metrics']) == {'fd', 'fd_corrected', 'kid', 'precision', 'recall'}
            for m in found['metrics'].values():
                if m['interval']: assert m['interval'][0] <= m['value'] <= m['interval'][1] # never beside its own point

def test_fid_with_moments(tmp_path):
    judge = load_extractor('judge')
    g = np.random.default_rng(2).normal(size=(500, judge.dims))
    save_reference(tmp_path/'moments.npz', statistics(g), judge)
    code, out, _ = command('fid', pictures(tmp_path/'a', 6), tmp_path/'moments.npz', '--features', 'judge', '--json')
    found = json.loads(out)
    assert code == 0 and set(found['metrics']) == {'fd'} and 'too few' in found['notes'][0]
    np.savez(tmp_path/'others.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = command('fid', tmp_path/'a', tmp_path/'others.npz', '--features', 'judge')
    assert code == 1 and 'accepted for inception only' in err

def test_fid_with_inception(tmp_path):
    code, out, _ = command('fid', pictures(tmp_path/'a', 5), pictures(tmp_path/'b', 7, value=1), '--weights', 'random', '--json')
    found = json.loads(out)
    assert code == 0 and found['features']['dims'] == 2048 and [found[k]['n'] for k in 'ab'] == [5, 7]
    assert any('random' in n for n in found['notes']) and any('50,000' in n for n in found['notes'])

def test_fid_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    a = pictures(tmp_path/'a', 3)
    code, _, err = command('fid', a, a)
    assert code == 1 and '--weights FILE' in err and 'sha256 6726825d0af5f729' in err and 'weights-inception-2015-12-05-6726825d.pth' in err
    assert 'no such file' in command('fid', a, a, '--weights', tmp_path/'nowhere.pth')[2]
    assert not list(tmp_path.rglob('*.pth'))

def test_fid_of_pictures_of_many_sizes(tmp_path):
    a = pictures(tmp_path/'a', 5, 'jpg', 40)
    pictures(a/'more', 5, 'webp', 25)
    assert '--size=SIDE' in command('fid', a, 'tiny', '--features', 'judge')[2]
    code, out, _ = command('fid', a, 'tiny', '--features', 'judge', '--size', 16, '--json')
    assert code == 0 and any('JPEG' in n for n in json.loads(out)['notes'])

LAZY = ('timm', 'torchvision', 'matplotlib', 'sklearn')
FIRST = ['drift_rae.parts.generator', 'drift_rae.distill', 'drift_rae.drifting', 'drift_rae.commands.sample']

@pytest.fixture(scope='module')
def first_imports():
    "Module -> for each of three programs: CPU seconds of its import in units of torch's own, and the heavy packages that it loads"
    code = f'''
import os, sys, time
start = time.process_time()
import torch
of_torch = time.process_time() - start
for module in {FIRST}: # each in a fork, so that it is the first import there
    if os.fork(): os.wait(); continue
    start = time.process_time()
    __import__(module)
    print(module, (time.process_time() - start)/of_torch, *[m for m in {LAZY} if m in sys.modules], flush=True)
    os._exit(0)'''
    found = [python('-c', code) for _ in range(3)]
    assert all(f.returncode == 0 for f in found), found[0].stderr
    return {module: [words for f in found for first, *words in map(str.split, f.stdout.splitlines()) if first == module] for module in FIRST}

@pytest.mark.parametrize('module', FIRST)
def test_a_first_import_is_light(module, first_imports):
    "No heavy package, and at most two thirds of what torch itself takes (1.5 s on an idle machine): the best of three"
    ratios, packages = zip(*((float(ratio), names) for ratio, *names in first_imports[module]))
    assert len(ratios) == 3 and not any(packages)
    assert min(ratios) < 2/3, ratios

def test_papermill_shows_the_running_step(tmp_path):
    import nbformat
    code = 'from drift_rae.engine.progress import Progress\nshow = Progress(3)\nfor i in range(3): show(i, loss=1.5)'
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(name='python3', display_name='Python', language='python')))
    nbformat.write(book, tmp_path/'in.ipynb')
    done = python('-m', 'papermill', 'in.ipynb', 'out.ipynb', cwd=tmp_path)
    assert done.returncode == 0 and 'step 3/3  loss 1.5' in done.stderr and 'step 3/3  loss 1.5' in (tmp_path/'out.ipynb').read_text()
    logged = python('-m', 'papermill', '--log-output', 'in.ipynb', 'out.ipynb', cwd=tmp_path)
    assert logged.stderr.count('step 3/3') == 1

def test_the_examples_of_contributing_are_short_and_run():
    "All but the switch of the field, which is a change of a class that exists"
    blocks = re.findall(r'(?ms)^```python\n(.*?)^```', (ROOT/'CONTRIBUTING.md').read_text())
    assert len(blocks) >= 5 and all(len(b.splitlines()) < 30 for b in blocks)
    import torch
    from torch import Tensor, nn
    from fastcore.test import test_close, test_eq
    from drift_rae.engine.files import hash_weights
    from drift_rae.engine.parameters import ParameterError
    from drift_rae.engine.streams import stream
    from drift_rae.metrics.extractors import EXTRACTORS, Extractor, load_extractor
    from drift_rae.networks.vit import ENCODERS, make_encoder
    names = dict(locals())
    for block in blocks:
        if '    ...' not in block: exec(block, names)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 512))
    names['load_my_network'] = lambda weights: network
    try: assert load_extractor('mine')(images)['features'].shape == (2, 512)
    finally: EXTRACTORS.pop('mine'), ENCODERS.pop('mine')
