"The house itself: exports in sync, notebooks clean, parameters tagged, README in sync"
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def copy_of_the_house(tmp_path):
    "The files that nbdev reads and writes, in a folder of their own"
    for name in ('settings.ini', 'nbs', 'drift_rae', 'README.md'):
        src = ROOT/name
        (shutil.copytree if src.is_dir() else shutil.copy)(src, tmp_path/name, **(dict(ignore=shutil.ignore_patterns('weights', '__pycache__', 'runs', '.ipynb_checkpoints'), symlinks=True) if src.is_dir() else {}))
    return tmp_path

def run(command, cwd): return subprocess.run(command, cwd=cwd, env={**os.environ, 'PYTHONPATH': str(cwd)}, capture_output=True, text=True)

def differences(a, b, pattern):
    "Files of `a` that `b` lacks or has otherwise"
    found = [p.relative_to(a) for p in sorted(a.rglob(pattern)) if '.ipynb_checkpoints' not in p.parts]
    return [p for p in found if not (b/p).exists() or (a/p).read_bytes() != (b/p).read_bytes()]

def test_modules_are_what_the_notebooks_export(tmp_path):
    house = copy_of_the_house(tmp_path)
    for p in (house/'drift_rae').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    done = run(['nbdev_export'], house)
    assert done.returncode == 0, done.stderr
    assert not differences(ROOT/'drift_rae', house/'drift_rae', '*.py')
    assert not differences(house/'drift_rae', ROOT/'drift_rae', '*.py')

def test_notebooks_are_clean(tmp_path):
    house = copy_of_the_house(tmp_path)
    done = run(['nbdev_clean'], house)
    assert done.returncode == 0, done.stderr
    assert not differences(ROOT/'nbs', house/'nbs', '*.ipynb')

def code_cells(path): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
def source(cell): return ''.join(cell['source'])

def test_every_notebook_that_checks_parameters_has_the_tag():
    checked = [p for p in NOTEBOOKS if p.stem != '01_parameters' and any(re.search(r'^check_parameters\(', source(c), re.M) for c in code_cells(p))]
    assert {'02_rae', '02a_vae', '02b_judge', '05_flow', '06_distill', '07_evaluate'} <= {p.stem for p in checked}
    for path in checked:
        cells = code_cells(path)
        tagged = [i for i, c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1, path.name
        values = [n for n in ast.walk(ast.parse(source(cells[tagged[0]]))) if isinstance(n, ast.Assign)]
        assert values and all(isinstance(ast.literal_eval(n.value), (int, float, str)) for n in values), path.name
        first_check = min(i for i, c in enumerate(cells) if 'check_parameters(' in source(c))
        imports_only = lambda s: all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(s).body)
        work_between = [source(c) for c in cells[tagged[0]+1:first_check] if not imports_only(source(c))]
        assert not work_between, f'{path.name}: {work_between}'

def test_a_notebook_with_parameters_runs_from_any_folder():
    "nbdev_export, with which other notebooks end, works within a checkout only"
    tagged = [p for p in NOTEBOOKS if any('parameters' in c['metadata'].get('tags', []) for c in code_cells(p))]
    assert len(tagged) > 15
    assert not [p.name for p in tagged if any('nbdev_export()' in source(c) for c in code_cells(p))]

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_small_and_free_of_machine_paths(path):
    raw = path.read_text()
    assert len(raw) < 2_000_000
    assert not re.search(r'/(work|root|tmp|home)/[\w.]', raw)
    nb = json.loads(raw)
    assert nb['metadata']['kernelspec']['name'] == 'python3'
    assert not [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert any(c.get('outputs') for c in nb['cells']), 'a reader of the rendered page would see no result'

def test_nobody_imports_nbdev():
    for path in (ROOT/'drift_rae').rglob('*.py'):
        assert not re.search(r'^\s*(import|from) nbdev', path.read_text(), re.M), path.name

def test_import_does_not_need_papermill_or_torch_fidelity():
    code = "import sys; sys.modules['papermill'] = sys.modules['torch_fidelity'] = sys.modules['nbdev'] = None\nimport importlib, pkgutil, drift_rae\nfor m in pkgutil.walk_packages(drift_rae.__path__, 'drift_rae.'): importlib.import_module(m.name)"
    done = run([sys.executable, '-c', code], ROOT)
    assert done.returncode == 0, done.stderr

def test_weights_are_small():
    parts = ('encoder', 'decoder', 'stats', 'judge', 'teacher')
    assert sum((ROOT/f'drift_rae/weights/tiny/{p}.safetensors').stat().st_size for p in parts) <= 8e6

def test_the_readme_is_what_the_index_says(tmp_path):
    done = run([sys.executable, str(ROOT/'.ci/readme'), str(tmp_path)], ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'README.md').read_text() == (ROOT/'README.md').read_text()

def test_the_source_distribution_has_every_file(tmp_path):
    "The list of files that setuptools makes of MANIFEST.in; the tests run from an unpacked distribution, too"
    if not (ROOT/'.git').exists(): pytest.skip('not a checkout: there is nothing to compare with')
    done = run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path)], ROOT)
    assert done.returncode == 0, done.stderr
    listed = set((tmp_path/'drift_rae.egg-info/SOURCES.txt').read_text().splitlines())
    tracked = set(run(['git', 'ls-files'], ROOT).stdout.splitlines())
    assert len(tracked) > 200 and not tracked - listed, sorted(tracked - listed)
