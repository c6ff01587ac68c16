"Training of both stages: equality with the official code and with torch-fidelity, class folders, several processes, several kinds of stop"
import copy, zlib
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest, stage_runs, torch
from PIL import Image
from torch import nn
from drift_rae.imagenet import critics
from drift_rae.engine import launch
from drift_rae.imagenet import stage1
from drift_rae.imagenet import stage2 as train_flow
from drift_rae.autoencoder import RAE
from drift_rae.networks.vit import Encoder, RAEDecoder, _decoder
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.files import load_weights
from drift_rae.engine.streams import stream
from drift_rae.worlds.data import digits
from drift_rae.flow import FlowConfig, hold_linear, load_teacher
from drift_rae.worlds.latents import latent_store, save_latents
from drift_rae.imagenet.critics import (
    LPIPS, Discriminator, augment, hinge, load_discriminator, load_lpips)
from drift_rae.imagenet.stage1 import Stage1, Stage1Config, warmup_cosine
from drift_rae.imagenet.stage1_data import CropImages, Crops
from drift_rae.engine.training import train
pytestmark = pytest.mark.usefixtures('forked_workers')


@pytest.fixture(scope='module')
def official(): # what the official code (bytetriper/RAE at a4d18c4, src/disc and src/utils/optim_utils.py) computed
    return torch.load(Path(__file__).parent/'fixtures/stage1.pt', weights_only=True)

def numbers(name, shape): # weights that depend on their name only
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype('float32')
    return torch.from_numpy(x*(.3 if len(shape) > 1 else .5))

def test_discriminator_is_the_official_one(official):
    eyes = Encoder('vit_small_patch8_224.dino', 224, patch_size=56, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2., act_layer='gelu_tanh')
    eyes.vit.load_state_dict({k: numbers(k, s) for k, s in official['dino_keys'].items() if not k.startswith('norm.')})
    d = Discriminator(eyes, (0, 2), 9)
    heads = {k.replace('.fn.', '.inner.').replace('weight_orig', 'parametrizations.weight.original'): numbers(k, s)
             for k, s in official['head_keys'].items() if not k.endswith(('_u', '_v'))}
    found = d.load_state_dict(heads, strict=False)
    assert not found.unexpected_keys and all(k.startswith('eyes') or k.endswith(('_u', '_v')) for k in found.missing_keys)
    x = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (2, 3, 64, 64)).astype('float32')).requires_grad_()
    d.train()
    with torch.no_grad():
        for _ in range(60): d(x) # until the spectral norms stand still
    d.eval()
    out = d(x)
    torch.testing.assert_close(out, official['logits'], atol=1e-5, rtol=0)
    g, = torch.autograd.grad(out.square().mean(), x)
    torch.testing.assert_close(g[:, :, ::8, ::8], official['grad'], atol=1e-5*official['grad'].abs().max().item(), rtol=0)

def test_only_training_moves_the_spectral_norms_and_nothing_moves_the_eyes():
    tiny = RAE.from_pretrained('tiny').encoder
    d = Discriminator(copy.deepcopy(tiny), (0, 1, 2), 3).train()
    assert not d.eyes.training and {p.requires_grad for p in d.eyes.parameters()} == {False}
    state = lambda: torch.cat([b.flatten() for n, b in d.named_buffers() if n.endswith('_u')])
    before = state(); d.eval()(torch.rand(2, 3, 16, 16)); assert torch.equal(state(), before)
    with torch.no_grad():
        for p in d.heads.parameters(): p.add_(torch.randn(p.shape, generator=stream(0)))
    d.train()(torch.rand(2, 3, 16, 16)); assert not torch.equal(state(), before)

def test_augmentation_is_the_official_one(official):
    x = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (4, 3, 16, 16)).astype('float32'))
    torch.testing.assert_close(augment(x, torch.Generator().manual_seed(3)), official['augment']['out'], atol=1e-6, rtol=0)
    kinds = set()
    for s in range(6):
        out = augment(x, torch.Generator().manual_seed(s), .5)
        torch.testing.assert_close(out, official['augment'][f'half{s}'], atol=1e-6, rtol=0)
        kinds.add(tuple((torch.rand(3, generator=torch.Generator().manual_seed(s)) <= .5)[:2].tolist()))
    assert len(kinds) >= 3 # of: moved, coloured, both, neither

def test_losses_and_schedules_are_the_official_ones(official):
    real, made = torch.from_numpy(np.random.RandomState(2).standard_normal((2, 5, 7)).astype('float32')*2)
    assert hinge(real, made) == official['hinge'] and -made.mean() == official['generator']
    for step, value in enumerate(official['cosine']): assert abs(warmup_cosine(step, 160, 10, 2e-4, 2e-5) - value) < 1e-12
    for step, value in enumerate(official['linear']): assert abs(hold_linear(step, 800, 400, 2e-4, 2e-5) - value) < 1e-12

def lpips_files(folder):
    "Random weights in the files that `load_lpips` reads"
    lpips = LPIPS()
    with torch.no_grad():
        for k, p in lpips.named_parameters(): p.copy_(numbers(k, p.shape)*.3 if p.ndim > 1 else numbers(k, p.shape).abs())
    vgg = {f"features.{k.split('.', 2)[2]}": v for k, v in lpips.state_dict().items() if k.startswith('parts.')}
    torch.save({**vgg, 'classifier.0.weight': torch.zeros(1)}, folder/'vgg16-397923af.pth')
    torch.save({f'lin{i}.model.1.weight': w.view(1, -1, 1, 1) for i, w in enumerate(lpips.weights)}, folder/'vgg.pth')
    return lpips

def test_lpips_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    torch.manual_seed(0)
    lpips_files(tmp_path)
    monkeypatch.setattr(critics, 'NETWORKS', {k: (*v[:3], None) for k, v in critics.NETWORKS.items()}) # our weights are not the published ones
    ours = load_lpips(tmp_path)
    theirs = pytest.importorskip('torch_fidelity.sample_similarity_lpips')
    vgg = nn.Module(); vgg.features = nn.Sequential(*[m for part in copy.deepcopy(ours.parts) for m in part])
    monkeypatch.setattr(theirs, 'load_state_dict_from_url', lambda *a, **k: torch.load(tmp_path/'vgg.pth', weights_only=True))
    monkeypatch.setattr(theirs, 'torchvision_load_pretrained_vgg16', lambda: vgg)
    a, b = torch.rand(2, 3, 3, 48, 48, generator=stream(0, 'pictures'))
    wanted = theirs.SampleSimilarityLPIPS('lpips')(a*255, b*255).mean()
    assert wanted > .01
    torch.testing.assert_close(ours(a, b), wanted, atol=0, rtol=1e-5)

def test_files_of_the_wrong_kind_are_one_sentence(tmp_path, monkeypatch):
    lpips_files(tmp_path)
    with pytest.raises(ParameterError, match='vgg16-397923af.pth is not the file of https://download.pytorch.org'): load_lpips(tmp_path)
    monkeypatch.setattr(critics, 'NETWORKS', {k: (*v[:3], None) for k, v in critics.NETWORKS.items()})
    torch.save({'lin0.model.1.weight': torch.zeros(1, 3, 1, 1)}, tmp_path/'vgg.pth')
    with pytest.raises(ParameterError, match='another architecture'): load_lpips(tmp_path)
    with pytest.raises(ParameterError, match='no file .*dino_vit_small_patch8_224.pth: it holds .* get it from https://huggingface.co'): load_discriminator(tmp_path)
    torch.save({'patch_embed.proj.weight': torch.zeros(3)}, tmp_path/'dino_vit_small_patch8_224.pth')
    with pytest.raises(ParameterError, match='another architecture'): load_discriminator(tmp_path)

def class_folder(folder, n=40):
    for i in range(n):
        (folder/f'class{i%4}').mkdir(parents=True, exist_ok=True)
        x, y = np.mgrid[:40+i, :56+i%7]
        Image.fromarray(np.stack([x*4+i, y*3, (x+y)*2], -1).astype('uint8')).save(folder/f'class{i%4}'/f'{i}.jpg')
    return folder

def photographs(folder, steps=16, workers=0):
    "The ImageNet path in small: JPEGs, random crops, LPIPS, a discriminator that resizes; random frozen networks"
    torch.manual_seed(0)
    small = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2)
    encoder = Encoder('vit_tiny_patch16_224', 32, **small).eval().requires_grad_(False)
    eyes = Encoder('vit_small_patch8_224.dino', 40, act_layer='gelu_tanh', **small)
    decoder = RAEDecoder(_decoder(24, 32, 1, 2, 64, 8, 4))
    return decoder, Stage1(encoder, decoder, CropImages(Crops(folder, 32), 8, workers=workers), LPIPS(), Discriminator(eyes, (0, 1), 9), Stage1Config(steps=steps, lr=(2e-3, 2e-4)))

def test_a_class_folder_of_photographs(tmp_path):
    decoder, stage = photographs(class_folder(tmp_path), 16, workers=1)
    rows = train(decoder, stage, steps=16, lr=stage.lr, clip=None, state=stage.state)
    assert rows[-1]['l1'] < .8*rows[0]['l1']
    assert rows[-1]['d_loss'] is not None and 0 < rows[-1]['weight'] < 1e4

def test_discriminator_alone_learns_to_tell(tmp_path):
    decoder, stage = photographs(class_folder(tmp_path), 1600)
    stage.config = replace(stage.config, discriminator_lr=(1e-2, 1e-3), warmup=0)
    figures = [stage.teach(step) for step in range(600, 640)] # the decoder stays as it is
    assert figures[-1]['d_loss'] < .85*figures[0]['d_loss'] and figures[-1]['d_correct'] > .7

def test_crops_are_the_same_in_any_process_and_order(tmp_path):
    crops = Crops(class_folder(tmp_path, 8), 32)
    a = CropImages(crops, 4, workers=0); b = CropImages(crops, 4, workers=2)
    for step in range(3): assert torch.equal(a(step), b(step))
    assert not torch.equal(a(0), a(2)) # another epoch, other crops
    assert a(0).min() >= 0 and a(0).max() <= 1

def test_both_stages_train_on_two_processes_and_continue_on_one(tmp_path):
    save_latents(latent_store('tiny'), tmp_path/'latents', dict(encoder='tiny'))
    rows, losses = launch.launch(stage_runs.both, str(tmp_path), nproc=2)
    assert len(rows) == 16 and rows[-1]['d_loss'] is not None and rows[-1]['l1'] < rows[0]['l1'] and len(losses) == 6
    for last in ('decoder/checkpoints/step_0000016', 'teacher/checkpoints/step_0000006'): # as if killed before the end
        for kind in ('.pt', '.json'): (tmp_path/(last + kind)).unlink()
    for name in ('decoder', 'teacher'): (tmp_path/name/'done.json').unlink()
    rows2, losses2 = launch.launch(stage_runs.both, str(tmp_path), resume='must', nproc=1)
    assert len(rows2) == 16 and rows2[:12] == rows[:12] and rows2[12:] != rows[12:]
    assert len(losses2) == 6 and losses2[:4] == losses[:4] and losses2[4:] != losses[4:]
    rae, x = RAE.from_pretrained(tmp_path/'decoder'), digits('test')[0][:8]
    assert rae.decode(rae.encode(x)).shape == x.shape
    assert (tmp_path/'teacher/sheets/step_0000006.png').is_file() and len((tmp_path/'teacher/log.csv').read_text().splitlines()) == 7
    assert load_teacher(str(tmp_path/'teacher')).shift == stage_runs.TEACHER.shift
    assert load_weights(tmp_path/'teacher/teacher.safetensors')[1]['flow']['at_once'] == 2
    with pytest.raises(ParameterError, match='config.gan was 0.75 and is 0'): stage1.run_stage1('tiny', replace(stage_runs.DECODER, gan=0.), str(tmp_path/'decoder'))

def test_half_precision_is_close(tmp_path):
    losses = [train_flow.run_flow('tiny', FlowConfig(steps=3, batch=16, precision=p), str(tmp_path/p), monitor_every=9) for p in ('float32', 'bfloat16')]
    assert losses[0] != losses[1]
    assert max(abs(a - b) for a, b in zip(*losses)) < .02*losses[0][0]
