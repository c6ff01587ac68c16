"""The shipped weights of the miniature can be made anew by the notebooks that made them, and come out as good.

On one machine they come out the same to the bit; elsewhere rounding differs, hence the bounds.
"""
import json
from dataclasses import asdict
import pytest, torch
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

@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rebuilt')
    for notebook in ('02_rae', 'worlds/02a_vae', 'worlds/02b_judge', '05_flow'):
        more = dict(autoencoder=folder) if notebook == '05_flow' else {}
        done = papermill(notebook, folder, rebuild=1, out=folder, **more)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder

def test_same_files(rebuilt):
    for name in ('encoder', 'decoder', 'stats', 'vae', 'judge', 'teacher'):
        (a, config_a), (b, config_b) = (load_weights(f/f'{name}.safetensors') for f in (rebuilt, WEIGHTS))
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}, name
        if name == 'teacher': config_b['flow'] = {**json.loads(json.dumps(asdict(FlowConfig()))), **config_b['flow']} # fields that are newer than the file
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

@torch.no_grad()
def frechet(folder):
    "Frechet distance of 500 teacher samples by the shipped judge"
    judge, labels = load_judge('tiny'), torch.arange(10).repeat_interleave(50)
    latents = sample(load_teacher(folder if folder == 'tiny' else folder/'teacher.safetensors'), image_noise(labels, (32, 4, 4)), labels, steps=50)
    return frechet_distance(judge.features(RAE.from_pretrained(folder).decode(latents)), judge.features(training_digits()[0]))

def test_the_teacher_within_a_quarter(rebuilt):
    assert frechet(rebuilt) < 1.25*frechet('tiny')
