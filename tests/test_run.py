"The main job as a person starts it: papermill, wrong parameters, results, determinism; and the generator in a script"
import ast, json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from papermill import inspect_notebook
from drift_rae.distill import DistillConfig, OneStepGenerator
from drift_rae.parts.workers import processes_for

ROOT = Path(__file__).parents[1]
KEYS = {'fd', 'accuracy', 'precision', 'recall', 'seconds', 'config', 'seed', 'versions'}
SMOKE = dict(monitor_every=0, steps=6, samples=8, n_pos=32, n_neg=8, n_extra_neg=24, nproc=1)
CHAPTERS = ['02_rae', 'worlds/02a_vae', 'worlds/02b_judge', 'worlds/03a_measure', 'worlds/05e_curvature',
            '05_flow', '06_distill', '07_evaluate']

def environment(): return {**{k: v for k, v in os.environ.items() if k != 'IN_TEST'}, 'PYTHONPATH': str(ROOT)}

def papermill(notebook, folder, **parameters):
    "Run a notebook from an empty folder, as a stranger would; returns the finished process"
    given = [x for k, v in parameters.items() for x in ('-p', k, str(v))]
    command = [sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT/'nbs'/f'{notebook}.ipynb'), str(folder/'out.ipynb'), *given]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp('smoke')
    done = papermill('06_distill', folder, **SMOKE)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def test_a_few_steps_write_everything(smoke):
    made = smoke/'runs/tiny'
    assert {'generator.safetensors', 'generator.json', 'log.csv', 'samples.png', 'results.json'} == {p.name for p in made.iterdir() if p.name != 'tensorboard'}
    results = json.loads((made/'results.json').read_text())
    assert set(results) == KEYS
    assert set(results['fd']) == {'teacher_50', 'teacher_1', 'student', 'real'}
    assert set(results['accuracy']) == {'teacher_50', 'student'}
    assert set(results['seconds']) == {'distill', 'total'}
    assert len((made/'log.csv').read_text().splitlines()) == 1 + SMOKE['steps']

def test_two_processes_make_the_same_generator(smoke, tmp_path):
    done = papermill('06_distill', tmp_path, **{**SMOKE, 'nproc': 2})
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (OneStepGenerator.from_pretrained(f/'runs/tiny').model.state_dict() for f in (smoke, tmp_path))
    assert [json.loads((f/'runs/tiny/results.json').read_text())['config']['processes'] for f in (smoke, tmp_path)] == [1, 2]
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0)
    said = (tmp_path/'out.ipynb').read_text()
    assert 'step 6/6' in said # what the first process prints is in the notebook

def test_a_dry_run_ends_before_the_first_step(tmp_path):
    assert papermill('06_distill', tmp_path, **SMOKE, dry_run=1).returncode == 0
    assert 'dry run: 6 steps of 4 classes x (8 + 24) generated' in (tmp_path/'out.ipynb').read_text()
    assert not list((tmp_path/'runs/tiny').glob('*.*'))

def tagged(notebook): return next(''.join(c['source']) for c in json.loads((ROOT/'nbs'/f'{notebook}.ipynb').read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))

@pytest.mark.parametrize('notebook', CHAPTERS)
def test_papermill_understands_every_parameter(notebook):
    "papermill warns of lines that it cannot parse (quotes in a comment) and then calls the parameter unknown"
    assert set(inspect_notebook(str(ROOT/'nbs'/f'{notebook}.ipynb'))) == {n.targets[0].id for n in ast.parse(tagged(notebook)).body}

def test_the_same_command_twice_gives_the_same_numbers(smoke, tmp_path):
    assert papermill('06_distill', tmp_path, **SMOKE).returncode == 0
    first, second = (json.loads((f/'runs/tiny/results.json').read_text()) for f in (smoke, tmp_path))
    for key in KEYS - {'seconds'}: assert first[key] == second[key], key
    assert (smoke/'runs/tiny/generator.safetensors').read_bytes() == (tmp_path/'runs/tiny/generator.safetensors').read_bytes()

def test_by_default_the_cores_share_the_work(smoke, tmp_path):
    "nproc=0 is as many processes as cores and classes allow; the same command twice gives the same numbers"
    runs = [tmp_path/'first', tmp_path/'second']
    for folder in runs:
        folder.mkdir()
        done = papermill('06_distill', folder, **{**SMOKE, 'nproc': 0})
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((f/'runs/tiny/results.json').read_text()) for f in runs)
    assert first['config']['processes'] == processes_for(4) # the classes of the miniature's step
    for key in KEYS - {'seconds'}: assert first[key] == second[key], key
    assert (runs[0]/'runs/tiny/generator.safetensors').read_bytes() == (runs[1]/'runs/tiny/generator.safetensors').read_bytes()

def test_another_seed_gives_other_weights(smoke, tmp_path):
    assert papermill('06_distill', tmp_path, **{**SMOKE, 'seed': 1}).returncode == 0
    assert (smoke/'runs/tiny/generator.safetensors').read_bytes() != (tmp_path/'runs/tiny/generator.safetensors').read_bytes()

@pytest.mark.parametrize('wrong, sentence', [
    (dict(model='huge'), "model='huge': accepted is one of tiny, s, b, l, xl"),
    (dict(modle='xl'), 'unknown parameter modle'),
    (dict(model='xl'), 'model=xl: give -p latents PATH'),
    (dict(n_pos=100_000), 'n_pos=100000: the smallest class has'),
], ids=lambda x: '-'.join(x) if isinstance(x, dict) else '')
def test_a_wrong_parameter_ends_the_program(wrong, sentence, tmp_path):
    done = papermill('06_distill', tmp_path, **wrong)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not (tmp_path/'runs/tiny/results.json').exists()

def cells_until_the_check(notebook):
    cells = [c for c in json.loads((ROOT/'nbs'/f'{notebook}.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    code = [''.join(l for l in c['source'] if not l.startswith('#|')) for c in cells] # without directives
    last = next(i for i, s in enumerate(code) if s.startswith('check_parameters('))
    return [''.join(c['source']) for c in cells[:last+1]]

@pytest.mark.parametrize('notebook, wrong', [(n, w) for n in CHAPTERS
    for w in ("model = 'huge'", 'model = 1', "seed = 'one'", 'seed = -1', 'seed = 1.5', 'sede = 1')] +
    [('06_distill', w) for w in ("preset = 'd'", 'steps = -1', "steps = 'many'", 'steps = True', "resume = 'perhaps'", 'nproc = -1', 'n_class = 0.5', 'n_neg = -2', 'n_extra_neg = -2', 'samples = -1', 'out = 3', 'teacher = 0')])
def test_wrong_parameters_are_refused_before_any_work(notebook, wrong):
    *before, check = cells_until_the_check(notebook)
    space = {}
    for source in [*before, wrong]: exec(source, space)
    with pytest.raises(ValueError, match=wrong.split(' =')[0]): exec(check, space)

def test_too_few_negatives():
    with pytest.raises(ValueError, match='repelled'): DistillConfig.preset('tiny', n_neg=1, n_extra_neg=0)

def test_the_generator_in_a_script(tmp_path):
    code = '''
import time, torch
from drift_rae.distill import OneStepGenerator
start = time.perf_counter()
images = OneStepGenerator.from_pretrained('tiny').sample([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], seed=0)
print(time.perf_counter() - start)
torch.save(images, 'images.pt')
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = torch.load(tmp_path/'images.pt', weights_only=True)
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, OneStepGenerator.from_pretrained('tiny').sample(range(10), seed=0), atol=1e-5, rtol=0)

def test_an_image_does_not_depend_on_its_neighbours():
    g = OneStepGenerator.from_pretrained('tiny')
    images = g.sample([4, 2, 4, 7], seed=3)
    torch.testing.assert_close(images[3:], g.sample([7], seed=3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images, g.sample([4, 2, 4, 7], seed=3, batch=1), atol=1e-5, rtol=0)
    assert (images[0] - images[2]).abs().max() > .1 # two different fours
    assert (images[3] - g.sample([7], seed=4)[0]).abs().max() > .1

@pytest.mark.parametrize('labels', [[10], [-1], [0, 99]])
def test_unknown_labels(labels):
    with pytest.raises(ValueError, match='knows the classes 0 to 9'): OneStepGenerator.from_pretrained('tiny').sample(labels)

def test_no_labels_no_images(): assert OneStepGenerator.from_pretrained('tiny').sample([]).shape == (0, 3, 16, 16)
