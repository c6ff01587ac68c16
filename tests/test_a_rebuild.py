"""The shipped weights of the miniature can be made anew by the notebooks that made them, and come out as good.

On one machine they come out the same to the bit; elsewhere rounding differs, hence the bounds. The teacher takes by far
the longest. Its first quarter is made here and compared update by update, and its averaged weights after that quarter by
their images; the whole training, on latents that are made anew too, is one of the slow tests.
"""
import json
from dataclasses import asdict
from pathlib import Path
import pytest, torch
from drift_rae import flow
from drift_rae.autoencoder import RAE
from drift_rae.engine.streams import image_noise
from drift_rae.engine.files import load_weights
from drift_rae.worlds.data import digits, training_digits
from drift_rae.metrics.frechet import frechet_distance
from drift_rae.flow import FlowConfig, load_teacher, sample
from drift_rae.worlds.judge import load_judge
from drift_rae.worlds.vae import load_vae
from programs import ROOT, papermill

WEIGHTS = ROOT/'drift_rae/weights/tiny'
SHORT, QUARTER = 60, FlowConfig.preset('tiny').steps//4
RECORD = Path(__file__).parent/'fixtures/teacher_quarter.json' # made by `python tests/test_a_rebuild.py`

def rebuild(notebook, folder, **more):
    done = papermill(notebook, folder, rebuild=1, out=folder, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
    "All weights, each made from those before; the teacher's after a few updates"
    folder = tmp_path_factory.mktemp('rebuilt')
    for notebook in ('02_rae', 'worlds/02a_vae', 'worlds/02b_judge'): rebuild(notebook, folder)
    return rebuild('05_flow', folder, autoencoder=folder, stop=SHORT)

MADE_BY = ('model = ', '#| hide\nimport json', 'rae = None', 'def first(') # beginnings of cells: parameters, imports, latents, training

def train_quarter(folder):
    "What chapter 05 does with rebuild=1 and stop=QUARTER until the teacher is saved: its own cells, without examples and figures"
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs/05_flow.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    parameters, *others = [next(s for s in cells if s.startswith(words)) for words in MADE_BY]
    space = dict(vars(flow))
    for source in (parameters, f'rebuild, stop, out = 1, {QUARTER}, {str(folder)!r}', *others): exec(source, space)
    return folder

@pytest.fixture(scope='module')
def quarter(tmp_path_factory): return train_quarter(tmp_path_factory.mktemp('quarter'))

def test_same_files(rebuilt):
    for name in ('encoder', 'decoder', 'stats', 'vae', 'judge', 'teacher'):
        (a, config_a), (b, config_b) = (load_weights(f/f'{name}.safetensors') for f in (rebuilt, WEIGHTS))
        if name == 'teacher':
            b['losses'] = b['losses'][:SHORT]
            config_b['flow'] = {**json.loads(json.dumps(asdict(FlowConfig()))), **config_b['flow']} # fields that are newer than the file
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}, name
        if name not in ('vae',): assert config_a == config_b, name # the VAE's configuration holds its measured scale

def psnr(autoencoder, images):
    with torch.no_grad(): return -10*(autoencoder.decode(autoencoder.encode(images)) - images).square().mean((1, 2, 3)).log10().mean().item()

@pytest.mark.parametrize('load', [RAE.from_pretrained, load_vae])
def test_reconstruction_within_one_decibel(rebuilt, load):
    torch.manual_seed(0)
    assert psnr(load(rebuilt), digits('test')[0]) > psnr(load('tiny'), digits('test')[0]) - 1

def test_the_judge_within_one_percent(rebuilt):
    images, labels = digits('test')
    assert (load_judge(rebuilt).predict(images) == labels).float().mean() > (load_judge('tiny').predict(images) == labels).float().mean() - .01

def losses(folder): return load_weights(folder/'teacher.safetensors')[0]['losses'][:QUARTER]

def test_the_losses_of_the_teacher(quarter):
    "The draws of each update are the same, so its loss is, up to what rounding has done to the weights until then"
    ratio = losses(quarter)/losses(WEIGHTS)
    assert (ratio - 1).abs().max() < .05 and (ratio.mean() - 1).abs() < .002

@torch.no_grad()
def frechet(folder, autoencoder):
    "Frechet distance of 500 samples of a teacher by the shipped judge"
    judge, labels = load_judge('tiny'), torch.arange(10).repeat_interleave(50)
    latents = sample(load_teacher(folder/'teacher.safetensors'), image_noise(labels, (32, 4, 4)), labels, steps=50)
    return frechet_distance(judge.features(RAE.from_pretrained(autoencoder).decode(latents)), judge.features(training_digits()[0]))

def test_the_averaged_weights_after_a_quarter(quarter):
    assert frechet(quarter, 'tiny') == pytest.approx(json.loads(RECORD.read_text())['fd'], rel=.1)

@pytest.mark.slow
def test_the_finished_teacher_within_a_quarter(rebuilt, tmp_path):
    rebuild('05_flow', tmp_path, autoencoder=rebuilt)
    assert frechet(tmp_path, rebuilt) < 1.25*frechet(WEIGHTS, 'tiny')

if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        made = train_quarter(Path(d))
        RECORD.write_text(json.dumps(dict(updates=QUARTER, fd=frechet(made, 'tiny'))) + '\n')
