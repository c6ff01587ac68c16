"ONNX files against PyTorch; what is said when a package is missing"
import sys
from pathlib import Path

import pytest
import torch

from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import stream
from drift_rae.flow import DiTDH, load_teacher, one_step, preset
from drift_rae.networks import sdvae
from drift_rae.sharing import onnx as exporter
from drift_rae.parts.generator import OneStepGenerator


@pytest.fixture(scope='module')
def runtime():
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'drift-rae[onnx]'")
    return pytest.importorskip('onnxruntime', reason="onnxruntime is not installed: pip install 'drift-rae[onnx]'")


@pytest.fixture(scope='module')
def generator(): return OneStepGenerator.from_pretrained('tiny')


def drawn(generator, n):
    shape = generator.autoencoder.latent_shape
    return torch.randn(n, *shape, generator=stream(n, 'onnx')), torch.arange(n)


@torch.no_grad()
def images(generator, noise, label): return generator.autoencoder.decode(one_step(generator.model, noise, label))


def ran(session, **inputs): return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


@pytest.fixture(scope='module')
def session(runtime, generator, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx')/'sub/generator.onnx'
    assert generator.export_onnx(path) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return runtime.InferenceSession(path)


@pytest.mark.parametrize('n', [1, 3, 10])
def test_images_of_the_one_step_generator(session, generator, n):
    noise, label = drawn(generator, n)
    made = ran(session, noise=noise, label=label)
    assert made.dtype == torch.float32 and made.min() >= 0 and made.max() <= 1
    torch.testing.assert_close(made, images(generator, noise, label), atol=1e-5, rtol=0)


def test_names_types_and_opset(session):
    import onnx
    model = onnx.load(session._model_path)
    onnx.checker.check_model(model)
    assert [(v.name, v.type) for v in session.get_inputs()] == [('noise', 'tensor(float)'), ('label', 'tensor(int64)')]
    assert [v.name for v in session.get_outputs()] == ['images']
    assert session.get_inputs()[0].shape == ['batch', 32, 4, 4] and session.get_outputs()[0].shape == ['batch', 3, 16, 16]
    assert [(o.domain, o.version) for o in model.opset_import] == [('', exporter.OPSET)]


@pytest.fixture(scope='module')
def velocity(runtime, tmp_path_factory):
    "The teacher and its file; exported in evaluation mode, and left in training mode"
    teacher = load_teacher('tiny').train()
    path = exporter.export_velocity(teacher, tmp_path_factory.mktemp('velocity')/'teacher.onnx')
    assert all(m.training for m in teacher.modules())
    return runtime.InferenceSession(path), teacher.eval()


@pytest.mark.parametrize('n', [1, 3, 10])
def test_the_teachers_velocity(velocity, n):
    session, teacher = velocity
    x, t = torch.randn(n, 32, 4, 4, generator=stream(n, 'x')), torch.rand(n, generator=stream(n, 't'))
    label = torch.arange(n) + (n < 10) # the null label too
    label[0] = teacher.null_label
    with torch.no_grad(): wanted = teacher(x, t, label)
    torch.testing.assert_close(ran(session, x=x, t=t, label=label), wanted, atol=1e-5, rtol=0)


def test_the_files_of_the_live_page_are_small(session, velocity):
    assert sum(Path(s._model_path).stat().st_size for s in (session, velocity[0])) < 5e6 # the decoder is a part of the generator


def test_a_generator_with_sd_vae(runtime, tmp_path):
    pytest.importorskip('diffusers', reason='diffusers is not installed: pip install drift-rae[sdvae]')
    torch.manual_seed(0)
    halves = {k: sdvae.SD_VAE[k][:2] for k in ('down_block_types', 'up_block_types')}
    small = {**sdvae.SD_VAE, **halves, 'block_out_channels': [8, 16], 'norm_num_groups': 4, 'layers_per_block': 1,
             'sample_size': 16}
    vae = sdvae.PatchedSDVAE(sdvae.sd_network(small), False, .18215, 16).eval()
    c, side, _ = vae.latent_shape
    model = DiTDH(**{**preset('tiny'), 'input_size': side, 'in_channels': c, 'depth': [1, 1]})
    for p in model.parameters(): p.data += .02*torch.randn(p.shape) # the last layer starts at zero
    generator = OneStepGenerator(model, vae)
    session = runtime.InferenceSession(generator.export_onnx(tmp_path/'generator.onnx'))
    noise, label = drawn(generator, 3)
    torch.testing.assert_close(ran(session, noise=noise, label=label), images(generator, noise, label), atol=1e-5, rtol=0)


def test_large_weights_stand_beside_the_file(runtime, generator, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, 'MOST_BYTES', 1000)
    exporter.export_decoder(generator.autoencoder, tmp_path/'decoder.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['decoder.onnx', 'decoder.onnx.data']
    assert (tmp_path/'decoder.onnx').stat().st_size < 2e5
    latents = torch.randn(2, 32, 4, 4)
    made = ran(runtime.InferenceSession(tmp_path/'decoder.onnx'), latents=latents)
    with torch.no_grad(): torch.testing.assert_close(made, generator.autoencoder.decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize('package', ['onnx', 'onnxscript'])
def test_a_missing_package_is_named(generator, tmp_path, monkeypatch, package):
    there = exporter.find_spec
    monkeypatch.setattr(exporter, 'find_spec', lambda name: None if name == package else there(name))
    with pytest.raises(ParameterError, match=rf"the package {package}: pip install 'drift-rae\[onnx\]'"):
        exporter.export_onnx(generator.model, generator.autoencoder, tmp_path/'x.onnx')
    assert not list(tmp_path.iterdir())


def test_the_package_is_imported_without_onnx():
    import subprocess
    code = ("import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime')))\n"
            "import drift_rae.sharing.onnx, drift_rae.sharing.live")
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_other_weights_and_names_are_refused(generator, tmp_path):
    with pytest.raises(ParameterError, match='float32'):
        exporter.export_velocity(load_teacher('tiny').bfloat16(), tmp_path/'x.onnx')
    with pytest.raises(ParameterError, match='ends in .onnx'):
        exporter.export_onnx(generator.model, generator.autoencoder, tmp_path/'x.pt')
