"What the cells of 07_evaluate can't hold: reference outputs of other libraries, properties, size and memory"
import math, os, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from drift_rae.engine.streams import stream
from drift_rae.evaluate import *

HERE = Path(__file__).parent
fixture = lambda name: np.load(HERE/'fixtures'/f'{name}.npz')


@pytest.mark.parametrize('case', ['full', 'rankdef'])
def test_frechet_distance_equals_reference(case):
    "clean-fid, torch-fidelity, scipy and a float64 SVD of the data; fewer samples than dimensions in `rankdef`"
    z = fixture('fd')
    x, y = z[f'{case}_x'], z[f'{case}_y']
    assert frechet_distance(x, y) == pytest.approx(float(z[f'{case}_fd_svd_data']), rel=1e-10)
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(float(z[f'{case}_fd_svd_data']), rel=1e-6)
    assert frechet_distance(torch.tensor(x), y) == pytest.approx(float(z[f'{case}_fd_clean_fid']), rel=1e-6)


@pytest.mark.parametrize('case', ['sym', 'dups'])
@pytest.mark.parametrize('k', [3, 5])
def test_precision_recall_equals_reference(case, k):
    z = fixture('pr')
    gen, real = z[f'{case}_gen'], z[f'{case}_real']
    expected = float(z[f'{case}_k{k}_precision']), float(z[f'{case}_k{k}_recall'])
    assert precision_recall(gen, real, k) == expected
    assert precision_recall(gen, real, k, memory=.002) == expected
    order = np.random.RandomState(0).permutation(len(gen))
    assert precision_recall(gen[order], real[order[::-1]], k) == expected


def test_kernel_distance_equals_torch_fidelity():
    z = fixture('kid')
    mean, std = kernel_distance(z['x'], z['y'])
    assert mean == pytest.approx(float(z['tf_mean']), rel=1e-4)
    assert std == pytest.approx(float(z['tf_std']), rel=1e-4)


def test_inception_score_equals_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric
    logits = torch.randn(503, 20, generator=stream(0, 'logits'))*3
    theirs = isc_features_to_metric(logits)
    assert inception_score(logits) == pytest.approx((theirs['inception_score_mean'], theirs['inception_score_std']), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 30), st.integers(5, 30), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0., 1e3]))
def test_precision_recall_is_exact_with_many_ties(seed, n, m, d, k, offset):
    "Integer features in few dimensions: most distances occur many times, and a far-off origin makes products inexact"
    g = stream(seed, 'ties')
    a, b = (torch.randint(0, 3, (size, d), generator=g).double() + offset for size in (n, m))
    radius = lambda x: (x[:, None] - x).square().sum(-1).sort(1).values[:, k]
    dist = (a[:, None] - b).square().sum(-1)
    expected = (dist <= radius(b)).any(1).double().mean().item(), (dist.T <= radius(a)).any(1).double().mean().item()
    assert precision_recall(a, b, k) == expected
    assert precision_recall(a, b, k, memory=1e-6) == expected


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(2, 40), st.integers(1, 20))
def test_frechet_distance_by_data_and_by_statistics(seed, n, m, d):
    "Any number of samples against any number of dimensions; symmetric; the order of the samples does not count"
    g = stream(seed, 'shapes')
    a, b = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)*2 + 1
    value = frechet_distance(a, b)
    assert value == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert value == pytest.approx(frechet_distance(a[torch.randperm(n, generator=g)], b), rel=1e-9)
    assert value == pytest.approx(frechet_distance(statistics(a), statistics(b)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize('f, message', [
    (lambda x: frechet_distance(x, x*math.nan), 'NaN'),
    (lambda x: frechet_distance(x, x[:, :3]), 'different extractors'),
    (lambda x: frechet_distance(x[:1], x), 'too few'),
    (lambda x: precision_recall(x, x, 0), 'k=0'),
    (lambda x: precision_recall(x[None], x), 'shape'),
    (lambda x: kernel_distance(x, x), 'at least 1000'),
    (lambda x: inception_score(x[:9]), 'at least 10'),
    (lambda x: evaluate_features(x*math.inf, x), 'generated features'),
])
def test_one_sentence(f, message):
    with pytest.raises(ValueError, match=message) as e: f(torch.randn(50, 4))
    assert '\n' not in str(e.value)


def test_frechet_distance_is_fast_at_2048_dimensions():
    "At most 5 s of computing on each of two cores"
    g = stream(0, 'fast')
    a, b = statistics(torch.randn(2100, 2048, generator=g)), statistics(torch.randn(2100, 2048, generator=g)*1.1)
    start = time.process_time()
    frechet_distance(a, b)
    assert time.process_time() - start < 10


def test_frechet_distance_with_directions_without_variance():
    "A singular covariance goes through eigenvectors; the distance is that of the other directions plus what the second set has in these"
    g = stream(0, 'singular')
    x, y = torch.randn(500, 60, generator=g), torch.randn(500, 60, generator=g)*1.1
    x[:, 50:] = 0
    b = statistics(y)
    b = FeatureStatistics(b.mu, torch.block_diag(b.sigma[:50, :50], b.sigma[50:, 50:]), b.n)
    rest = float(b.sigma[50:, 50:].trace() + b.mu[50:].square().sum())
    assert frechet_distance(statistics(x), b) == pytest.approx(frechet_distance(x[:, :50], y[:, :50]) + rest, rel=1e-6)


MEMORY = """
import resource, torch
from drift_rae.metrics.neighbours import precision_recall
torch.set_num_threads(1)
gen, real = torch.randn(8000, 128), torch.randn(4000, 128)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20   # GB
precision_recall(gen[:100], real[:100])
before = peak()
precision_recall(gen, real, memory=.03)
print(peak() - before)
"""


def test_precision_recall_memory():
    "Whole distance matrices would take 0.51 + 0.26 + 0.13 GB; with blocks of 0.03 GB the process grows by less than 0.12 GB"
    out = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert float(out.stdout) < .12


def test_bias_counts_the_reference():
    "A perfect generator, 20,000 samples against 400 in 64 dimensions: nearly all of the distance is bias of the reference"
    scale, g = torch.linspace(1.25, .65, 64, dtype=torch.float64), stream(0, 'perfect')
    gen, ref = (torch.randn(n, 64, generator=g, dtype=torch.float64)*scale for n in (20_000, 400))
    row = evaluate_features(gen, statistics(ref), bootstrap=10)
    assert .85*row['fd'] < row['fd_bias'] < row['fd'] and 2.2 < row['fd_bias'] < 2.6
    assert row['fd_bias'] == pytest.approx(frechet_bias(statistics(ref), 20_000, 400), rel=1e-12)
    assert row['fd_interval'][1] < .15*row['fd']
    unknown = evaluate_features(gen, FeatureStatistics(*[getattr(statistics(ref), k) for k in ('mu', 'sigma')]))
    assert unknown['fd_bias'] == pytest.approx(frechet_bias(statistics(ref), 20_000), rel=1e-12) # the size is not known
