"""The shipped weights of the miniature can be made anew by the notebooks that made them, and come out as good.

On one kind of processor they come out the same to the bit; elsewhere rounding differs, hence the bounds. All trainings take
twelve minutes of a core, so what they gave is stored in fixtures/rebuild.json beside a digest of everything that they depend
on: the code, the cells that run it, the versions of the libraries and the kind of processor. `python tests/test_a_rebuild.py`
runs everything and writes that file. Where the digest is the stored one, a test runs the first updates of each training and
compares their losses with the stored ones; the rest of it would be the stored run again. Where it is another one, as after a
change of the code, the trainings are run whole as well, but for the teacher, of which the first quarter is: the whole of it is
a slow test."""
import ast
import json
import platform
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest import mock
import pytest, torch
from drift_rae import autoencoder
from drift_rae.autoencoder import RAE
from drift_rae.engine.launch import Interrupted
from drift_rae.engine.streams import image_noise
from drift_rae.engine.files import load_weights, sha256_of, write_json
from drift_rae.worlds import judge as judges, vae as vaes
from drift_rae.worlds.data import digits, training_digits
from drift_rae.metrics.frechet import frechet_distance
from drift_rae.flow import FlowConfig, load_teacher, sample
from drift_rae.worlds.judge import load_judge
from drift_rae.worlds.vae import load_vae
from programs import ROOT, papermill
from test_layout import PACKAGE, imports

WEIGHTS = ROOT/'drift_rae/weights/tiny'
NAMES = ('encoder', 'decoder', 'stats', 'vae', 'judge', 'teacher')
SHORT, QUARTER = 60, FlowConfig.preset('tiny').steps//4
RECORD = Path(__file__).parent/'fixtures/rebuild.json'
BEGINNINGS = ('#| hide\nfrom', '#| hide\nimport', 'if rebuild:') # of cells: imports, training
NOTEBOOKS = {'02_rae': autoencoder, 'worlds/02a_vae': vaes, 'worlds/02b_judge': judges}
TEACHER = ('#| hide\nimport json', 'rae = None', 'def first(') # beginnings of cells: imports, latents, training

# --- what the trainings depend on

def own_cells(notebook, beginnings):
    "Cells of a notebook that begin so, after its parameters: what it does without its examples and figures, which `nbdev_test` runs"
    cells = [''.join(c['source']) for c in json.loads((ROOT/f'nbs/{notebook}.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    return [s for s in cells if s.startswith(('model = ', *beginnings))]

def code(module):
    "The source of a module without comments and docstrings"
    tree = ast.parse((PACKAGE/f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant): body[0].value.value = ''
    return ast.unparse(tree)

def needed(modules):
    "These modules and all that they import, also inside functions"
    found, todo = set(), list(modules)
    while todo:
        name = todo.pop()
        if name in found or not (PACKAGE/f"{name.replace('.', '/')}.py").exists(): continue
        found.add(name)
        package = 'drift_rae.' + name.rpartition('.')[0] if '.' in name else 'drift_rae'
        todo += imports((PACKAGE/f"{name.replace('.', '/')}.py").read_text(), package)
    return sorted(found)

@cache
def digest():
    "Of everything that the trainings and their figures depend on"
    modules = needed(['flow', 'metrics.frechet', *(m.__name__.removeprefix('drift_rae.') for m in NOTEBOOKS.values())])
    parts = [code(m) for m in modules] + [s for n in NOTEBOOKS for s in own_cells(n, BEGINNINGS)] + own_cells('05_flow', TEACHER)
    parts += [f'{name} {version(name)}' for name in ('torch', 'numpy', 'scikit-learn', 'timm', 'safetensors')]
    parts += [platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability()]
    parts += [f"{name} {sha256_of(WEIGHTS/f'{name}.safetensors')}" for name in NAMES]
    return sha256('\n'.join(parts).encode()).hexdigest()[:16]

@cache
def record(): return json.loads(RECORD.read_text())

@cache
def is_stored(): return digest() == record()['digest']

# --- the trainings

def losses_of(module, act, updates=0):
    "Losses of the trainings of a module that a call runs; with `updates` it is stopped after so many"
    kept = []
    def callback(step, row):
        kept.append(row['loss'])
        return 'enough' if len(kept) == updates else None
    with mock.patch.object(module, 'fit', partial(module.fit, callback=callback)), suppress(Interrupted): act()
    return kept

def first_losses():
    "Losses of the first updates, each training beginning with the shipped weights of those before it"
    x, y = training_digits()
    encoder = RAE.from_pretrained('tiny').encoder
    return dict(encoder=losses_of(autoencoder, lambda: autoencoder.train_encoder(x, y), SHORT),
                decoder=losses_of(autoencoder, lambda: autoencoder.train_decoder(encoder, x), SHORT),
                vae=losses_of(vaes, lambda: vaes.train_vae(x), SHORT), judge=losses_of(judges, lambda: judges.train_judge(x, y), SHORT))

the_first = cache(first_losses)

def run_cells(notebook, beginnings, module, **parameters):
    "Run `own_cells` with parameters"
    space = dict(vars(import_module(module)))
    for source in own_cells(notebook, beginnings):
        exec(source + ''.join(f'\n{k} = {v!r}' for k, v in parameters.items())*source.startswith('model = '), space)

def rebuild(notebook, folder, **more):
    "A notebook with rebuild=1, as a person runs it"
    done = papermill(notebook, folder, rebuild=1, out=folder, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def rebuild_all(folder):
    "All weights, each made from those before; the teacher's after a few updates"
    for notebook, module in NOTEBOOKS.items(): run_cells(notebook, BEGINNINGS, module.__name__, rebuild=1, out=str(folder))
    return rebuild('05_flow', folder, autoencoder=folder, stop=SHORT)

def train_quarter(folder):
    "What chapter 05 does with rebuild=1 and stop=QUARTER until the teacher is saved"
    run_cells('05_flow', TEACHER, 'drift_rae.flow', rebuild=1, stop=QUARTER, out=str(folder))
    return folder

@pytest.fixture(scope='module')
def all_rebuilt(tmp_path_factory): return rebuild_all(tmp_path_factory.mktemp('rebuilt'))

@pytest.fixture(scope='module')
def rebuilt(request): return None if is_stored() else request.getfixturevalue('all_rebuilt')

@pytest.fixture(scope='module')
def quarter(tmp_path_factory):
    if not is_stored(): return train_quarter(tmp_path_factory.mktemp('quarter'))

# --- what is measured, or was

def psnr(autoencoder, images):
    with torch.no_grad(): return -10*(autoencoder.decode(autoencoder.encode(images)) - images).square().mean((1, 2, 3)).log10().mean().item()

def psnr_of(load, folder):
    torch.manual_seed(0)
    return psnr(load(folder), digits('test')[0])

def accuracy_of(folder):
    images, labels = digits('test')
    return (load_judge(folder).predict(images) == labels).float().mean().item()

def files_of(folder):
    "Names and shapes of the weights of each file, and its description"
    found = {}
    for name in NAMES:
        weights, config = load_weights(folder/f'{name}.safetensors')
        if name == 'teacher':
            weights['losses'] = weights['losses'][:SHORT]
            config['flow'] = {**asdict(FlowConfig()), **config['flow']} # fields that are newer than the file
        if name == 'vae': config = {k: v for k, v in config.items() if k != 'scale'} # which is measured
        found[name] = [{k: list(v.shape) for k, v in weights.items()}, json.loads(json.dumps(config))]
    return found

def losses(folder): return load_weights(folder/'teacher.safetensors')[0]['losses'][:QUARTER]

def drift_of_losses(folder):
    "Largest deviation of one loss of the quarter from the shipped teacher's, and that of their mean ratio from 1"
    ratio = losses(folder)/losses(WEIGHTS)
    return [(ratio - 1).abs().max().item(), (ratio.mean() - 1).abs().item()]

@torch.no_grad()
def frechet(folder, autoencoder):
    "Frechet distance of 500 samples of a teacher by the shipped judge"
    judge, labels = load_judge('tiny'), torch.arange(10).repeat_interleave(50)
    latents = sample(load_teacher(folder/'teacher.safetensors'), image_noise(labels, (32, 4, 4)), labels, steps=50)
    return frechet_distance(judge.features(RAE.from_pretrained(autoencoder).decode(latents)), judge.features(training_digits()[0]))

def figure(name, measure):
    "A stored figure where the stored digest is that of this code, else what is measured"
    return record()[name] if is_stored() else measure()

# --- the tests

@pytest.mark.parametrize('name', ['encoder', 'decoder', 'vae', 'judge'])
def test_the_first_losses(name):
    "The draws of each update are the same, so its loss is, up to rounding"
    made, stored = torch.tensor(the_first()[name]), torch.tensor(record()['first'][name])
    assert len(made) == SHORT and (made/stored - 1).abs().max() < .02

def test_the_teacher_as_a_person_makes_it(tmp_path):
    "Its first updates on latents of the shipped autoencoder, by the notebook"
    rebuild('05_flow', tmp_path, stop=SHORT)
    ratio = load_weights(tmp_path/'teacher.safetensors')[0]['losses'][:SHORT]/losses(WEIGHTS)[:SHORT]
    assert len(ratio) == SHORT and (ratio - 1).abs().max() < .02

def test_same_files(rebuilt):
    made = figure('files', lambda: files_of(rebuilt))
    for name, shipped in files_of(WEIGHTS).items(): assert made[name] == shipped, name

@pytest.mark.parametrize('name, load', [('rae', RAE.from_pretrained), ('vae', load_vae)])
def test_reconstruction_within_one_decibel(rebuilt, name, load):
    assert figure(f'psnr_{name}', lambda: psnr_of(load, rebuilt)) > psnr_of(load, 'tiny') - 1

def test_the_judge_within_one_percent(rebuilt):
    assert figure('accuracy', lambda: accuracy_of(rebuilt)) > accuracy_of('tiny') - .01

def test_the_quarter_of_the_teacher(quarter):
    "The draws of each update are the same, so its loss is, up to what rounding has done to the weights until then"
    largest, mean = figure('quarter_losses', lambda: drift_of_losses(quarter))
    assert largest < .05 and mean < .002
    if quarter: assert frechet(quarter, 'tiny') == pytest.approx(record()['quarter_fd'], rel=.1)

def test_the_stored_finished_teacher_is_within_a_quarter(): assert record()['fd'] < 1.25*record()['fd_shipped']

@pytest.mark.slow
def test_the_finished_teacher_within_a_quarter(all_rebuilt, tmp_path):
    rebuild('05_flow', tmp_path, autoencoder=all_rebuilt)
    assert frechet(tmp_path, all_rebuilt) < 1.25*frechet(WEIGHTS, 'tiny')

def test_another_code_is_another_digest():
    "A change of code counts, one of comments and docstrings does not"
    sources = {'worlds.judge': (PACKAGE/'worlds/judge.py').read_text()}
    def digest_of(old, new):
        with mock.patch.object(Path, 'read_text', lambda self, *a, **k: sources['worlds.judge'].replace(old, new)): return code('worlds.judge')
    assert digest_of('', '') == digest_of('# updates', '# of the optimiser') == digest_of('Train the classifier', 'Fit the classifier')
    assert digest_of('', '') != digest_of('steps:int=600', 'steps:int=601')
    assert {'engine.training', 'networks.vit', 'worlds.data'} <= set(needed(['worlds.judge', 'autoencoder']))

if __name__ == '__main__':
    import tempfile
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        folder, quarter = Path(one), train_quarter(Path(two))
        rebuild('05_flow', rebuild_all(folder), autoencoder=folder)
        write_json(RECORD, dict(
            digest=digest(), files=files_of(folder), psnr_rae=psnr_of(RAE.from_pretrained, folder), psnr_vae=psnr_of(load_vae, folder),
            accuracy=accuracy_of(folder), quarter_losses=drift_of_losses(quarter), quarter_fd=frechet(quarter, 'tiny'),
            fd=frechet(folder, folder), fd_shipped=frechet(WEIGHTS, 'tiny'),
            first={k: [float(f'{x:.6g}') for x in v] for k, v in first_losses().items()}))
    print(f'{RECORD}: {record()["digest"]}')
