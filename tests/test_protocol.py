"What the cells of metrics/03_images, 04_extractors and 04a_features can't hold: several processes, killed runs, torch-fidelity's own interface, real network shapes"
import json, os, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch.nn import functional as F
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import stream
from drift_rae.evaluate import evaluate_images, load_reference
from drift_rae.metrics.frechet import frechet_distance
from drift_rae.metrics.neighbours import precision_recall
from drift_rae.metrics.images import *
from drift_rae.metrics.extractors import *
from drift_rae.metrics.features import *


def toy(noise, labels):
    "Coloured noise, brighter for higher classes, 16 pixels"
    return torch.sigmoid(F.interpolate(noise, scale_factor=4, mode='nearest') + labels[:, None, None, None]/4)

def make_images(rank=0, seed=0): return GeneratedImages(toy, (3, 4, 4), classes=4, per_class=10, seed=seed, block=6)

def make_quadrants(rank=0): return Extractor('quadrants', quadrants, 12, 'none', 'none')

def quadrants(x): return dict(features=F.adaptive_avg_pool2d(x.float(), 2).flatten(1))

def make_dinov2(rank=0): return load_extractor('dinov2', 'random')


class Shuffled(Images):
    "The same images in another order"
    def __init__(self, images, seed=0): self.images, self.n, self.size, self.order = images, len(images), images.size, np.random.RandomState(seed).permutation(len(images))
    def _one(self, i): return self.images[int(self.order[i])]


def test_processes_give_the_same_set(tmp_path):
    whole = sample_images(make_images, tmp_path/'two', processes=2)
    assert torch.equal(whole.read(range(40)), make_images().read(range(40)))
    one, two = (extract(whole, make_quadrants, batch=7, processes=p) for p in (1, 2))
    assert one.hashes == two.hashes and torch.equal(one.features, two.features)


def test_failing_process_is_an_error(tmp_path):
    "A process that fails must not look like a finished run"
    with pytest.raises(ParameterError, match='begun with another seed'):
        sample_images(partial(make_images, seed=1), sample_images(make_images, tmp_path).path, processes=2)


def test_killed_sampling_goes_on(tmp_path):
    "Killed in the middle: no half-written block; the second run makes only what is missing"
    code = f"import sys, time; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_protocol as t; slow = t.make_images(); f = slow.generate\n" \
           f"slow.generate = lambda z, y: (time.sleep(.3), f(z, y))[1]; t.sample_blocks(slow, {str(tmp_path/'b')!r})"
    p = subprocess.Popen([sys.executable, '-c', code])
    deadline = time.time() + 60
    while len(list((tmp_path/'b').glob('*.npy'))) < 2 and time.time() < deadline: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    done = list((tmp_path/'b').glob('[0-9]*.npy'))
    assert 2 <= len(done) < 7
    with pytest.raises(ParameterError, match='still missing'): BlockImages(tmp_path/'b')
    assert sample_blocks(make_images(), tmp_path/'b') == 7 - len(done)
    assert torch.equal(BlockImages(tmp_path/'b').read(range(40)), make_images().read(range(40)))


def test_one_image_alone():
    "Image i does not depend on which others are asked for, nor on how many there are"
    few, many = make_images(), GeneratedImages(toy, (3, 4, 4), classes=4, per_class=1000, block=6)
    assert torch.equal(few[17], many[17]) and torch.equal(few[39], many[39])


def test_npz_streams(tmp_path):
    "numpy reads the file, and only the images asked for are read from it"
    write_npz(make_images(), tmp_path/'a.npz', range(40))
    with np.load(tmp_path/'a.npz') as z: assert z['arr_0'].shape == (40, 16, 16, 3) and z['arr_1'].tolist() == list(range(40))
    from hypothesis import given, settings, strategies as st
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 39), min_size=1, max_size=5))
    def same(which): assert torch.equal(open_images(tmp_path/'a.npz').read(which), make_images().read(which))
    same()


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "A generated and a real set of 12 images of 16 pixels: as generator, npz and PNG folder"
    at = tmp_path_factory.mktemp('sets')
    gen, real = (GeneratedImages(toy, (3, 4, 4), classes=4, per_class=3, seed=s) for s in (0, 1))
    for name, images in (('gen', gen), ('real', real)):
        write_npz(images, at/f'{name}.npz'); write_png(images, at/name)
    return at, gen, real


@pytest.fixture(scope='module')
def dinov2(): return make_dinov2()


def test_same_number_from_every_source(sets, dinov2):
    "Generator, npz, PNG folder, another order, another batch size: the same numbers to 1e-6, with a real network's rounding"
    at, gen, real = sets
    reference = load_reference(at/'real.npz', dinov2, batch=6)
    run = lambda images, **more: evaluate_images(images, reference, dinov2, kernel=10, bootstrap=3, **dict(dict(batch=6), **more))[0]
    base = run(gen)
    for other in (run(open_images(at/'gen.npz')), run(open_images(at/'gen')), run(Shuffled(gen)), run(gen, batch=5), run(gen, cache=at/'cache'), run(open_images(at/'gen'), cache=at/'cache')):
        for key, value in base.items(): assert other[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    shuffled = load_reference(at/'real', dinov2, batch=6)
    assert shuffled.record['images']['hash'] == reference.record['images']['hash']
    assert frechet_distance(shuffled.statistics, reference.statistics) < 1e-9


def test_torch_fidelity_gives_our_numbers(sets, dinov2):
    "The registered extractor inside torch_fidelity.calculate_metrics; its precision and recall take the generated set first"
    import torch_fidelity
    register_extractors(); register_extractors()
    at, gen, real = sets
    theirs = torch_fidelity.calculate_metrics(input1=gen, input2=str(at/'real'), feature_extractor='fd-dinov2', feature_extractor_weights_path='random',
        fid=True, prc=True, cuda=False, cache=False, save_cpu_ram=True, verbose=False)
    ours, _ = evaluate_images(gen, load_reference(at/'real', dinov2, batch=6), dinov2, batch=6)
    assert ours['fd'] == pytest.approx(theirs['frechet_inception_distance'], rel=1e-4)    # theirs has float32 means
    assert (ours['precision'], ours['recall']) == pytest.approx((theirs['precision'], theirs['recall']), abs=1e-6)


def test_inception_end_to_end(sets, tmp_path):
    "The 2015 Inception with random weights: torch-fidelity's class and ours, the ADM layout with statistics and images in one file"
    import torch_fidelity
    register_extractors()
    at, gen, real = sets
    inception = load_extractor('inception', 'random')
    few = GeneratedImages(toy, (3, 4, 4), classes=5, per_class=2, seed=0)
    f = extract(few, inception, batch=5)
    theirs = torch_fidelity.calculate_metrics(input1=few, input2=few, feature_extractor='fid-inception', feature_extractor_weights_path='random',
        isc=True, isc_splits=1, cuda=False, cache=False, save_cpu_ram=True, verbose=False)
    from drift_rae.metrics.neighbours import inception_score
    from drift_rae.metrics.frechet import statistics
    assert f.features.shape == (10, 2048) and f.values['logits'].shape == (10, 1008)
    assert inception_score(f.values['logits'], splits=1)[0] == pytest.approx(theirs['inception_score_mean'], rel=1e-5)
    s = statistics(f.features)
    pixels = few.read(range(10)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path/'adm.npz', arr_0=pixels, mu=s.mu.numpy().astype('float32'), sigma=s.sigma.numpy())
    reference = load_reference(tmp_path/'adm.npz', inception, batch=5)
    assert reference.record['n_balls'] == 10 and reference.statistics.n == 0
    metrics, record = evaluate_images(few, reference, inception, batch=5)
    assert metrics['fd'] < 1e-3 and metrics['precision'] == metrics['recall'] == 1    # float32 means in the file
    json.dumps(record)


def test_adm_file_for_another_extractor(sets, tmp_path, dinov2):
    "Its statistics are Inception's: with DINOv2 the images are used instead, without images the file is refused"
    at, gen, real = sets
    pixels = real.read(range(12)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path/'adm.npz', arr_0=pixels, mu=np.zeros(2048), sigma=np.eye(2048))
    assert load_reference(tmp_path/'adm.npz', dinov2, batch=6).statistics.n == 12
    np.savez(tmp_path/'statistics.npz', mu=np.zeros(1024), sigma=np.eye(1024))
    with pytest.raises(ParameterError, match='accepted for inception only'): load_reference(tmp_path/'statistics.npz', dinov2)


def test_float64_inside_is_refused():
    "torch-fidelity accepts the name and silently computes in float32"
    import torch_fidelity
    register_extractors()
    with pytest.raises(ValueError, match='defined in float32'):
        torch_fidelity.calculate_metrics(input1=make_images(), input2=make_images(), feature_extractor='fd-dinov2', feature_extractor_weights_path='random',
            feature_extractor_internal_dtype='float64', fid=True, cuda=False, cache=False, verbose=False)


def test_weights_files(tmp_path, dinov2):
    "One hash for one set of numbers in either kind of file; registers, other networks and pickles are refused"
    from safetensors.torch import save_file
    state = {k: torch.from_numpy(v).float() for k, v in np.load(Path(__file__).parent/'fixtures/dinov2.npz').items() if k.startswith('weights/')}
    state = {k[8:]: v for k, v in state.items()}
    torch.save(state, tmp_path/'a.pth'); save_file({k: v for k, v in state.items() if k != 'mask_token'}, tmp_path/'a.safetensors')
    a, b = (Dinov2(read_weights('dinov2', tmp_path/f'a.{kind}'), heads=2) for kind in ('pth', 'safetensors'))
    assert a.hash == b.hash != dinov2.weights
    with pytest.raises(ParameterError, match='have registers'): Dinov2(dict(state, register_tokens=torch.zeros(1, 4, 16)))
    with pytest.raises(ParameterError, match='not the weights of the 2015 Inception'): load_extractor('inception', str(tmp_path/'a.pth'))
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'evil'),))
    torch.save(Evil(), tmp_path/'evil.pth')
    with pytest.raises(ParameterError, match='not a state dict'): load_extractor('inception', str(tmp_path/'evil.pth'))
    assert not (tmp_path/'evil').exists()


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for name in ('inception', 'dinov2'):
        with pytest.raises(ParameterError, match=f'no {name} weights at {tmp_path}/hub/checkpoints/.*put the file from https'): load_extractor(name)


def test_damaged_png(tmp_path):
    for i in range(3): Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path/f'{i}.png')
    (tmp_path/'1.png').write_bytes((tmp_path/'1.png').read_bytes()[:40])
    with pytest.raises(ParameterError, match='1.png is not a whole image'): extract(open_images(tmp_path), make_quadrants())
