"The statistics of appendix B.1 and the curvature against reference outputs, and on input that is ragged, small, large or damaged"
import json, math, subprocess, sys
from pathlib import Path
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from drift_rae.geometry import (
    class_nearest, class_smmd, curvature, deviation, effective_dimensions, nn_distance,
    participation_ratio, spectral_entropy, spherical_mmd, trajectory_frame)

FIXTURES = Path(__file__).parent/'fixtures'
GEOM, CURV = np.load(FIXTURES/'geom.npz'), np.load(FIXTURES/'curv.npz')

def case(name, dtype=torch.float64, seed=None):
    "Tokens [N, T, D] and labels of a reference case, without the padding, optionally in another order"
    latents, counts = GEOM[f'{name}_latents'], GEOM[f'{name}_counts']
    x = torch.tensor(np.concatenate([l[:n] for l, n in zip(latents, counts)]), dtype=dtype)
    y = torch.tensor(np.repeat(np.arange(len(counts)), counts))
    if seed is None: return x, y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]

@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize('name', ['iso', 'ragged'])
def test_reference(name, dtype, tolerance):
    x, y = case(name, dtype, seed=0)
    flat, per_token = x.flatten(1), lambda f: np.mean([f(x[:, t], y) for t in range(x.shape[1])])
    got = dict(PR=participation_ratio(x, y), SE=spectral_entropy(x, y), PR_rank_r=participation_ratio(x, y, 'samples'), SE_rank_r=spectral_entropy(x, y, 'samples'),
               NNd_flat=nn_distance(flat, y), SMMD_flat=spherical_mmd(flat, y), NNd_token=per_token(nn_distance), SMMD_token=per_token(spherical_mmd))
    for key, value in got.items(): assert value == pytest.approx(float(GEOM[f'{name}_{key}']), rel=tolerance), key

@pytest.mark.parametrize('name', ['iso', 'ragged'])
def test_reference_of_each_class_and_token(name):
    x, y = case(name)
    for c in y.unique():
        pr, se = effective_dimensions(x[y == c])
        np.testing.assert_allclose(pr/x.shape[2], GEOM[f'{name}_PR_per'][c], rtol=1e-9)
        np.testing.assert_allclose(se/x.shape[2], GEOM[f'{name}_SE_per'][c], rtol=1e-9)
        assert class_smmd(x[y == c].flatten(1)).item() == pytest.approx(GEOM[f'{name}_SMMD_flat_per'][c], rel=1e-9)

def naive(tokens, labels):
    "Everything as the formulas read, in numpy, with all poles and all pairs"
    pr, se, nn, mmd = [], [], [], []
    for c in np.unique(labels):
        x = tokens[labels == c].astype(np.float64)
        for t in range(x.shape[1]):
            mu = np.linalg.eigvalsh(np.atleast_2d(np.cov(x[:, t].T))).clip(0)
            p = mu/mu.sum()
            pr.append(1/(len(p)*(p**2).sum())); se.append(np.exp(-sum(q*np.log(q) for q in p if q > 0))/len(p))
        x = x.reshape(len(x), -1)
        d = x.shape[1]
        between = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2)/math.sqrt(d)
        nn.extend((between(x, x) + np.diag([np.inf]*len(x))).min(1))
        x = x - x.mean(0)
        poles = np.linalg.norm(x, axis=1).mean()*np.concatenate([np.eye(d), -np.eye(d)])
        mmd.append(np.exp(-between(x, x)).mean() + np.exp(-between(poles, poles)).mean() - 2*np.exp(-between(x, poles)).mean())
    return np.mean(pr), np.mean(se), np.mean(nn), np.mean(mmd)

@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 14), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 12), st.floats(-3, 3), st.integers(0, 10**6))
def test_any_shape_against_the_formulas(counts, tokens, dim, offset, seed):
    "Ragged classes, fewer samples than dimensions, one dimension, labels with gaps, any order"
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(3*np.arange(len(counts)) + 1, counts))
    x = rng.normal(size=(len(y), tokens, dim))*rng.uniform(.1, 3, dim) + offset
    flat = x.reshape(len(x), -1)
    got = participation_ratio(x, y), spectral_entropy(x, y), nn_distance(flat, y), spherical_mmd(flat, y)
    np.testing.assert_allclose(got, naive(x, y), rtol=1e-6, atol=1e-9)
    low = 1/dim - 1e-9
    assert low <= got[0] <= got[1] + 1e-9 <= 1 + 2e-9

def test_float32_far_from_the_origin():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 8, generator=g).double()
    y = torch.arange(60) % 2
    far = (x + 1000).float()
    for f in (participation_ratio, spectral_entropy): assert f(far, y) == pytest.approx(f(x, y), rel=1e-4)
    for f in (nn_distance, spherical_mmd): assert f(far.flatten(1), y) == pytest.approx(f(x.flatten(1), y), rel=1e-4)

def test_rows_in_several_blocks():
    "More samples than one block of rows, and more columns than one block of columns"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2100, 9000, generator=g)[:, :40]
    direct = torch.cdist(x.double(), x.double(), compute_mode='donot_use_mm_for_euclid_dist').fill_diagonal_(math.inf).min(1).values/math.sqrt(40)
    torch.testing.assert_close(class_nearest(x), direct, rtol=1e-9, atol=0)
    wide = torch.randn(3, 2**24//3 + 100, generator=g)
    assert class_nearest(wide).max() == pytest.approx(math.sqrt(2), rel=1e-2)
    assert class_smmd(wide).isfinite()

@pytest.mark.parametrize('statistic, shape', [(participation_ratio, (6, 2, 3)), (spectral_entropy, (6, 2, 3)), (nn_distance, (6, 3)), (spherical_mmd, (6, 3))], ids=lambda x: getattr(x, '__name__', ''))
def test_refusals(statistic, shape):
    x, y = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 1])
    statistic(x, y), statistic(x.numpy(), y.tolist()), statistic(x.half(), y.int())
    nan, infinite, equal = x.clone(), x.clone(), x.clone()
    nan[3, 0], infinite[0, -1], equal[:3] = math.nan, -math.inf, equal[0].clone()
    for bad, labels, sentence in ((x, torch.tensor([0, 0, 0, 1, 1, 2]), 'class 2 has 1 sample'), (nan, y, 'class 1 has a latent that is NaN or infinite'),
            (infinite, y, 'class 0 has a latent that is NaN'), (equal, y, 'class 0: its 3 samples are all equal'), (x, y[:-1], 'one label each'), (x, y[:, None], 'accepted are whole numbers'),
            (x, y.float(), 'whole numbers'), (x[None], y, 'expected|one label each'), (x[:0], y[:0], 'expected'), (x[..., :0], y, 'expected')):
        with pytest.raises(ValueError, match=sentence): statistic(bad, labels)

def test_one_constant_token_is_named():
    x = torch.randn(8, 20, 3, generator=torch.Generator().manual_seed(0))
    x[:, 17] = 2.
    with pytest.raises(ValueError, match='token 17 is constant'): participation_ratio(x, torch.zeros(8, dtype=torch.int64))

@pytest.mark.parametrize('curve', ['circle', 'helix'])
def test_curvature_reference(curve):
    xyz = torch.tensor(CURV[f'{curve}_xyz'])
    kappa, tau = curvature(xyz[None], torsion=True)
    np.testing.assert_allclose(kappa[0], CURV[f'{curve}_kappa_chen'], rtol=1e-9)
    np.testing.assert_allclose(tau[0], CURV[f'{curve}_tau_chen'], rtol=1e-8, atol=1e-12)
    into = torch.linalg.qr(torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    np.testing.assert_allclose(curvature((xyz @ into.T + 7)[None])[0], CURV[f'{curve}_kappa_chen'], rtol=1e-8)
    np.testing.assert_allclose(curvature((xyz @ into.T).float()[None])[0], CURV[f'{curve}_kappa_chen'], rtol=1e-3)

def published_frame(x):
    "The frame as published: a basis of the whole complement of the chord, PCA of the projection, Gram-Schmidt"
    chord = x[-1] - x[0]
    chord = chord/chord.norm()
    basis = torch.linalg.qr(torch.cat([chord[:, None], torch.eye(len(chord), dtype=x.dtype)], 1))[0][:, 1:]
    rest = x @ basis @ basis.T
    v = torch.linalg.svd(rest - rest.mean(0), full_matrices=False)[2][:2]
    return (x - x[0]) @ torch.stack([chord, *v]).T

def test_frame_is_the_published_one():
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, 200).double()[:, None]
    x = t*torch.randn(40, generator=g).double() + sum((3*(k+1)*t).sin()*torch.randn(40, generator=g).double()/(k+1)**2 for k in range(5))
    torch.testing.assert_close(trajectory_frame(x).abs(), published_frame(x).abs(), rtol=1e-8, atol=1e-10)
    from_chord = torch.stack([(p - x[0] - ((p - x[0]) @ (c := (x[-1]-x[0])/(x[-1]-x[0]).norm()))*c).norm() for p in x])
    torch.testing.assert_close(deviation(x[None])[0], from_chord, rtol=1e-9, atol=1e-12)

def test_curvature_of_simple_curves():
    line = torch.linspace(0, 1, 300).double()[None, :, None]*torch.arange(1., 8.).double()
    assert curvature(line).max() < 1e-8
    angle = torch.linspace(0, 3, 400).double()
    plane = torch.stack([2*angle.cos(), 2*angle.sin()], 1)[None]
    assert curvature(plane)[0, 150:250] == pytest.approx(np.full(100, .5), rel=.01)
    assert curvature(plane[..., :1]).shape == (1, 400)
    turned_back = torch.stack([torch.linspace(0, 2*math.pi, 401).cos(), torch.linspace(0, 2*math.pi, 401).sin()], 1)[None]
    assert curvature(turned_back, window=21)[0, 200] == pytest.approx(1, rel=.01) # closed: it has no chord

def test_curvature_of_two_trajectories_is_that_of_each():
    x = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(0))*torch.linspace(0, 1, 150)[None, :, None] + torch.linspace(0, 3, 150)[None, :, None].sin()*torch.linspace(1, 2, 10)**2
    torch.testing.assert_close(curvature(x)[1:], curvature(x[1:]))
    assert curvature(x).dtype == torch.float64 and curvature(x).shape == (2, 150)

@pytest.mark.parametrize('bad, sentence', [(torch.ones(2, 200, 3), 'stands still'), (torch.randn(200, 3), 'n_traj, n_points, D'), (torch.randn(1, 60, 3), '60 points'),
    (torch.full((1, 200, 3), math.nan), 'NaN'), (torch.cat([torch.randn(1, 20, 3), torch.zeros(1, 180, 3)], 1), 'stands still'), (torch.randn(1, 200, 0), 'no side of length 0')])
def test_curvature_refusals(bad, sentence):
    with pytest.raises(ValueError, match=sentence): curvature(bad)

def test_curvature_in_the_dimension_of_imagenet():
    "196,608 numbers per point, in little memory"
    angle = torch.linspace(0, 2, 101).double()
    into = torch.randn(196_608, 3, generator=torch.Generator().manual_seed(0))/math.sqrt(196_608)
    into = torch.linalg.qr(into.double())[0]
    curve = torch.stack([angle.cos(), angle.sin(), .3*angle], 1)
    expected = curvature(curve[None], window=21)
    torch.testing.assert_close(curvature((curve @ into.T).float()[None], window=21), expected, rtol=2e-3, atol=0)

# the streaming pass and the run

from drift_rae.engine.streams import stream
from drift_rae.worlds.curvature import middle_trajectories
from drift_rae.worlds.measure import STATISTICS, geometry_table, measure_store
from drift_rae.worlds.latents import save_latents, sort_by_class
from programs import ROOT, papermill

def small_store(folder, scale=1., counts=(7, 5, 9), shape=(8, 4, 4)):
    "A latent store on disk and what it holds"
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    x = (scale*torch.randn(len(y), *shape, generator=stream(0, 'store'))).half()
    save_latents(sort_by_class(x, y, len(counts)), folder, made_by=dict(test=True))
    return x.float(), y

@pytest.mark.parametrize('processes', [1, 2])
def test_streaming_equals_direct(tmp_path, processes):
    x, y = small_store(tmp_path/'store')
    table = geometry_table(measure_store(tmp_path/'store', tmp_path/'classes', processes), 8)
    tokens, flat = x.flatten(2).mT, x.flatten(1)
    each = lambda f: np.mean([f(tokens[:, t], y) for t in range(16)])
    expected = (participation_ratio(tokens, y), spectral_entropy(tokens, y), participation_ratio(tokens, y, 'samples'), spectral_entropy(tokens, y, 'samples'),
                nn_distance(flat, y), each(nn_distance), spherical_mmd(flat, y), each(spherical_mmd))
    for name, value in zip(STATISTICS, expected): assert table[name][0] == pytest.approx(value, rel=1e-9), name

def test_a_stopped_pass_goes_on(tmp_path, monkeypatch):
    small_store(tmp_path/'store')
    whole = measure_store(tmp_path/'store', tmp_path/'classes')
    files = sorted((tmp_path/'classes').glob('class-*.json'))
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert measure_store(tmp_path/'store', tmp_path/'classes') == whole
    assert files[0].stat().st_mtime_ns == kept

def test_streaming_refusals(tmp_path):
    small_store(tmp_path/'store')
    measure_store(tmp_path/'store', tmp_path/'classes')
    small_store(tmp_path/'other', scale=2.)
    with pytest.raises(ValueError, match='other latents'): measure_store(tmp_path/'other', tmp_path/'classes')
    small_store(tmp_path/'single', counts=(3, 1))
    with pytest.raises(ValueError, match='class 1 of the latent store has one sample'): measure_store(tmp_path/'single', tmp_path/'c')
    with pytest.raises(ValueError, match='several processes'): measure_store(sort_by_class(torch.randn(4, 2, 1, 1), torch.tensor([0, 0, 1, 1]), 2), tmp_path/'d', processes=2)
    with pytest.raises(ValueError, match='expected a folder'): measure_store(tmp_path/'nowhere', tmp_path/'e')

def test_memory_is_bounded_by_one_class(tmp_path):
    "Ten classes need no more than one"
    code = '''
import sys
from pathlib import Path
from drift_rae.worlds.measure import _measure_rank, measure_store
def kilobytes(name): return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1])
at = Path(sys.argv[1])
measure_store(at/'first', at/'warm') # whatever is loaded or allocated once is there now
for classes in (1, 10):
    open('/proc/self/clear_refs', 'w').write('5') # forget the peak so far, which is that of the imports or of what came before
    before = kilobytes('VmRSS')
    _measure_rank(0, store=at/f'store{classes}', folder=at/f'classes{classes}', todo=list(range(classes)), world=1, device='cpu') # without the records that measure_store returns
    print('held', kilobytes('VmHWM') - before)
'''
    from programs import environment
    # what is freed goes back to the system at once, so that the peak is what was held and not how the allocator keeps it
    plain = {**environment(), 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
    for name, classes in (('first', 1), ('store1', 1), ('store10', 10)):
        small_store(tmp_path/name, counts=(60,)*classes, shape=(64, 16, 16))
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, ten = (int(line.split()[1])/1024 for line in done.stdout.splitlines() if line.startswith('held'))
    assert ten - one < 30, (one, ten) # nine more classes are 35 MB in float32, and as much again centred

def test_the_middle_of_the_trajectories():
    frames = torch.zeros(10, 3, 3)
    frames[:, 1, 1] = torch.tensor([5., 1, 9, 3, 7, 0, 8, 2, 6, 4])
    assert sorted(middle_trajectories(frames).tolist()) == [0, 1, 3, 4, 6, 7, 8, 9] # without 0 and 9

def test_the_notebooks_on_a_store_of_imagenet_layout(tmp_path):
    "papermill with model=xl on a tiny store writes the tables; the shapes of the store decide, not the preset"
    small_store(tmp_path/'store', counts=(12, 20, 15), shape=(32, 4, 4))
    given = dict(model='xl', latents=tmp_path/'store', out=tmp_path/'made')
    done = papermill('worlds/03a_measure', tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads((tmp_path/'made/statistics.json').read_text())
    assert {r['statistic'] for r in made['rows']} == set(STATISTICS) and made['model'] == 'xl' and made['counts'] == [12, 20, 15]
    assert len((tmp_path/'made/statistics.csv').read_text().splitlines()) == 1 + len(STATISTICS)
    teacher = ROOT/'drift_rae/weights/tiny/teacher.safetensors'
    done = papermill('worlds/05e_curvature', tmp_path, **given, teacher=teacher, trajectories=2, points=101)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = json.loads((tmp_path/'made/curvature.json').read_text())
    assert len(curves['rows']) == 12 and all(math.isfinite(r['value']) for r in curves['rows'])

@pytest.mark.parametrize('notebook', ['worlds/03a_measure', 'worlds/05e_curvature'])
@pytest.mark.parametrize('wrong, sentence', [(dict(model='xl'), 'give -p latents FOLDER'), (dict(model='huge'), "model='huge'"), (dict(latents='nowhere'), 'nowhere')], ids=str)
def test_a_wrong_parameter_ends_the_notebook(tmp_path, notebook, wrong, sentence):
    done = papermill(notebook, tmp_path, **wrong)
    assert done.returncode == 1 and sentence in done.stderr
