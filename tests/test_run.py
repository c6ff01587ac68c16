"The main job as a person starts it: papermill, wrong parameters, results, determinism; and the generator in a script"
import ast, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from papermill import inspect_notebook
from drift_rae.distill import DistillConfig, OneStepGenerator
from drift_rae.parts.workers import processes_for
from programs import environment, papermill, run
from test_done import content

ROOT = Path(__file__).parents[1]
KEYS = {'fd', 'accuracy', 'precision', 'recall', 'seconds', 'config', 'seed', 'versions'}
SMOKE = dict(monitor_every=3, steps=6, samples=8, n_pos=32, n_neg=8, n_extra_neg=24, nproc=1)
CHAPTERS = ['02_rae', 'worlds/02a_vae', 'worlds/02b_judge', 'worlds/03a_measure', 'worlds/05e_curvature',
            '05_flow', '06_distill', '07_evaluate']

def distilled(folder, **parameters):
    "The same run without a notebook and its evaluation: `python -m drift_rae.distill`"
    given = [x for k, v in {**parameters, 'out': 'runs/tiny'}.items() if k != 'samples' for x in (f'--{k}', str(v))]
    done = run(['-m', 'drift_rae.distill', *given], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp('smoke')
    done = papermill('06_distill', folder, **SMOKE)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def test_a_few_steps_write_everything(smoke):
    made = smoke/'runs/tiny'
    wanted = {'generator.safetensors', 'generator.json', 'log.csv', 'samples.png', 'results.json', 'done.json', 'checkpoints', 'monitor.json', 'sheets'}
    assert wanted == {p.name for p in made.glob('[!.]*') if p.name != 'tensorboard'}
    results = json.loads((made/'results.json').read_text())
    assert set(results) == KEYS
    assert set(results['fd']) == {'teacher_50', 'teacher_1', 'student', 'real'}
    assert set(results['accuracy']) == {'teacher_50', 'student'}
    assert set(results['seconds']) == {'distill', 'total'}
    assert len((made/'log.csv').read_text().splitlines()) == 1 + SMOKE['steps']

@pytest.fixture(scope='module')
def by_default(tmp_path_factory):
    "The main job with nproc=0, as many processes as the cores and the classes allow"
    folder = tmp_path_factory.mktemp('default')
    done = papermill('06_distill', folder, **{**SMOKE, 'nproc': 0, 'monitor_every': 0})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    done = papermill('06_distill', folder, **{**SMOKE, 'nproc': 2, 'monitor_every': 0})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def weights_of(folder): return (folder/'runs/tiny/generator.safetensors').read_bytes()

def results_of(folder): return json.loads((folder/'runs/tiny/results.json').read_text())

def test_two_processes_make_the_same_generator(smoke, two):
    a, b = (OneStepGenerator.from_pretrained(f/'runs/tiny').model.state_dict() for f in (smoke, two))
    assert [results_of(f)['config']['processes'] for f in (smoke, two)] == [1, 2]
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0)
    assert 'step 6/6' in (two/'out.ipynb').read_text() # what the first process prints is in the notebook

def test_a_dry_run_ends_before_the_first_step(tmp_path):
    assert papermill('06_distill', tmp_path, **SMOKE, dry_run=1).returncode == 0
    assert 'dry run: 6 steps of 4 classes x (8 + 24) generated' in (tmp_path/'out.ipynb').read_text()
    assert not list((tmp_path/'runs/tiny').glob('*.*'))

def tagged(notebook): return next(''.join(c['source']) for c in json.loads((ROOT/'nbs'/f'{notebook}.ipynb').read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))

@pytest.mark.parametrize('notebook', CHAPTERS)
def test_papermill_understands_every_parameter(notebook):
    "papermill warns of lines that it cannot parse (quotes in a comment) and then calls the parameter unknown"
    assert set(inspect_notebook(str(ROOT/'nbs'/f'{notebook}.ipynb'))) == {n.targets[0].id for n in ast.parse(tagged(notebook)).body}

@pytest.fixture(scope='module')
def again(smoke, tmp_path_factory):
    "The same command on a copy of the finished run; what was there before it"
    folder = shutil.copytree(smoke, tmp_path_factory.mktemp('again'), dirs_exist_ok=True)
    before = content(folder/'runs/tiny')
    done = papermill('06_distill', folder, 'again.ipynb', **SMOKE)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, before

def test_papermill_shows_a_finished_run_again(smoke, again):
    folder, before = again
    text = (folder/'again.ipynb').read_text()
    assert content(folder/'runs/tiny') == before == content(smoke/'runs/tiny')
    assert 'nothing is made again' in text and 'student, 1' in text and text.count('image/png') >= 3
    done = json.loads((folder/'runs/tiny/done.json').read_text())
    assert done['metrics']['fd'] and set(done['files']) == {'generator.json', 'generator.safetensors', 'results.json', 'samples.png'}

def test_the_same_command_twice_gives_the_same_numbers(smoke, again, tmp_path):
    "The training by the program without its notebook; the evaluation by the notebook, on the finished run, as after a kill before the end of it"
    assert weights_of(smoke) == weights_of(distilled(tmp_path, **SMOKE))
    folder, _ = again
    (folder/'runs/tiny/samples.png').unlink()
    written = (folder/'runs/tiny/results.json').stat().st_mtime_ns
    done = papermill('06_distill', folder, 'third.ipynb', **SMOKE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder/'runs/tiny/samples.png').exists()
    assert written < (folder/'runs/tiny/results.json').stat().st_mtime_ns # it was made again
    for key in KEYS - {'seconds'}: assert results_of(smoke)[key] == results_of(folder)[key], key
    assert weights_of(smoke) == weights_of(folder)

def test_by_default_the_cores_share_the_work(smoke, by_default, two, tmp_path):
    "nproc=0 is as many processes as cores and classes allow; the same number of processes gives the same numbers"
    number = processes_for(4) # the classes of the miniature's step
    assert results_of(by_default)['config']['processes'] == number
    again = two
    if number != 2: # on a computer with another number of cores
        again = tmp_path
        assert papermill('06_distill', again, **{**SMOKE, 'nproc': number, 'monitor_every': 0}).returncode == 0
    for key in KEYS - {'seconds'}: assert results_of(by_default)[key] == results_of(again)[key], key
    assert weights_of(by_default) == weights_of(again)
    one, several = (results_of(f) for f in (smoke, by_default)) # the processes share the evaluation, too
    for k in one['fd']: assert several['fd'][k] == pytest.approx(one['fd'][k], rel=1e-3)
    assert several['fd']['real'] == pytest.approx(one['fd']['real'], rel=1e-6)

def test_another_seed_gives_other_weights(smoke, tmp_path):
    "The seed of the command reaches the run; the evaluation is that of the tests before"
    distilled(tmp_path, **SMOKE, seed=1)
    a, b = (OneStepGenerator.from_pretrained(f/'runs/tiny').model.state_dict() for f in (smoke, tmp_path))
    assert not torch.equal(a['x_embedder.proj.weight'], b['x_embedder.proj.weight'])

@pytest.mark.parametrize('wrong, sentence', [
    (dict(model='huge'), "model='huge': accepted is one of tiny, nano, mini, s, b, l, xl"),
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
    with pytest.raises(ValueError, match='the classes 0 to 9'): OneStepGenerator.from_pretrained('tiny').sample(labels)

def test_no_labels_no_images(): assert OneStepGenerator.from_pretrained('tiny').sample([]).shape == (0, 3, 16, 16)
