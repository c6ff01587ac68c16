"What the cells of 00_theorem1 and 01_diffusion_gan can't hold: random inputs, several seeds, memory, extreme values, the rendered page"
import base64, io, json, math, re, subprocess, sys
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from drift_rae.engine.streams import stream
from drift_rae.diffusion_gan import _pull, field, log_density, practical_field
from drift_rae.drifting import drift_field
from drift_rae.theorem1 import cube, limit_v_neg, simulate, sphere, sweep

NBS = Path(__file__).parent.parent/'nbs'
EXPONENTS = (.5, 1., 1.5, 2., 3.)
torch.set_num_threads(1)

def normal(seed, *shape): return torch.randn(*shape, generator=stream(seed, *shape), dtype=torch.float64)

# Theorem 1

@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 12), n=st.integers(2, 9), r=st.floats(.1, 10), tau=st.floats(.02, 5), seed=st.integers(0, 99))
def test_simulation_is_the_definition(d, n, r, tau, seed):
    o = simulate(d, r, tau, n, seed, n=n, n_draws=1)
    x, y = cube(r)(n, d, stream(seed, 'negatives', 0)), sphere(n, d, stream(seed, 'positives', 0))
    plus, minus, v = [], [], []
    for j in range(n):
        D = [(y[i]-x[j]).norm().item() for i in range(n)], [(x[k]-x[j]).norm().item() for k in range(n) if k != j]
        w = [[math.exp(-(a-min(side))/tau) for a in side] for side in D]
        p = sum(a*b for a, b in zip(w[0], y))/sum(w[0])
        m = sum(a*b for a, b in zip(w[1], (x[k] for k in range(n) if k != j)))/sum(w[1])
        plus.append(p.square().sum().item()); minus.append(m.norm().item()); v.append((p-m).norm().item())
    mean = lambda a: sum(a)/len(a)
    assert o.v_pos_sq == pytest.approx(mean(plus), rel=1e-7, abs=1e-12)
    assert o.v_neg == pytest.approx(mean(minus), rel=1e-7)
    assert o.v == pytest.approx(mean(v), rel=1e-7)
    assert o.v_rel == pytest.approx(mean(v)/(r*math.sqrt(d)), rel=1e-7)

@pytest.mark.parametrize('seed', [1, 2])
def test_simulation_meets_the_limit_within_two_percent(seed):
    o = simulate(4096, 1., 1., seed=seed)
    assert o.v_neg == pytest.approx(limit_v_neg(1., 1.), rel=.02)
    assert o.v == pytest.approx(limit_v_neg(1., 1.), rel=.02)
    assert abs(o.v_neg-3**-.5) > .05

@pytest.mark.parametrize('r,tau', [(2., 1.), (.5, .2), (3., 30.)])
def test_limit_at_other_radii_and_temperatures(r, tau):
    o = simulate(2048, r, tau, seed=3)
    assert o.v_neg == pytest.approx(limit_v_neg(r, tau), rel=.02+3*o.se['v_neg']/o.v_neg)

@settings(max_examples=50, deadline=None)
@given(r=st.floats(1e-3, 1e3), rho=st.floats(1e-3, 50))
def test_limit_scales_grows_and_contains_the_appendix(r, rho):
    v = limit_v_neg(r, r/rho)
    assert v == pytest.approx(r*limit_v_neg(1., 1/rho), rel=1e-9)
    assert v >= r/math.sqrt(3)*(1-1e-12) and limit_v_neg(r, r/(1.1*rho)) > v
    assert limit_v_neg(r, 1e6*r) == pytest.approx(r/math.sqrt(3), rel=1e-9)

def test_temperatures_of_a_sweep_do_not_disturb_each_other():
    alone, together = simulate(50, 1., .2, seed=4, scaled=True), sweep(50, 1., [.02, .2, 3.], seed=4, scaled=True)[1]
    assert alone == together
    assert alone.scale > 1 and alone != simulate(50, 1., .2, seed=5, scaled=True)

def test_extreme_temperatures_stay_finite():
    for tau in (1e-6, 1e6):
        o = simulate(64, 1., tau)
        assert all(math.isfinite(v) for k, v in o.items() if k != 'se')
    assert o.n_eff_neg == pytest.approx(63) and o.n_eff_pos == pytest.approx(64)
    assert simulate(64, 1., 1e-6).n_eff_neg == pytest.approx(1, abs=.1)

@pytest.mark.parametrize('arguments', [dict(d=0), dict(r=0.), dict(r=math.inf), dict(tau=-1.), dict(tau=math.nan), dict(n=1), dict(n_draws=0), dict(n_query=0)])
def test_simulate_refuses_with_one_sentence(arguments):
    with pytest.raises(ValueError, match='accepted'): simulate(**{**dict(d=8, r=1., tau=1.), **arguments})

def test_eight_thousand_dimensions_fit_into_memory():
    code = ("import resource; from drift_rae.theorem1 import simulate; o = simulate(8192, 1., 1., n_draws=1); "
        "print(o.v_neg, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if __import__('sys').platform != 'darwin' else 2**30))")
    v, gigabytes = map(float, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())
    assert v == pytest.approx(limit_v_neg(1., 1.), rel=.03) and gigabytes < 3

# Proposition 1

@settings(max_examples=40, deadline=None)
@given(d=st.sampled_from([1, 2, 5, 64, 768]), n=st.integers(1, 9), m=st.integers(1, 9), l=st.sampled_from(EXPONENTS), t=st.floats(.02, 5), coincide=st.booleans(), seed=st.integers(0, 999))
def test_field_is_the_gradient(d, n, m, l, t, coincide, seed):
    pos, neg, x = normal(seed, n, d)+.5, normal(seed+1, m, d), normal(seed+2, 3, d)
    if coincide: x[0], x[1] = pos[0], neg[-1]
    tau = t*torch.cdist(x, torch.cat([pos, neg])).pow(l).mean().item()
    u = x.clone().requires_grad_()
    (log_density(u, pos, tau, l)-log_density(u, neg, tau, l)).sum().backward()
    v = l/tau*field(x, pos, neg, tau, l)
    assert u.grad.isfinite().all() and v.isfinite().all()
    parts = l/tau*max(_pull(x, s, tau, l).abs().max().item() for s in (pos, neg)) # the two halves may cancel
    assert (u.grad-v).abs().max() <= 1e-10*max(u.grad.abs().max().item(), parts)

@settings(max_examples=20, deadline=None)
@given(l=st.sampled_from(EXPONENTS), seed=st.integers(0, 99))
def test_field_moves_with_its_samples(l, seed):
    x, pos, neg, shift = normal(seed, 4, 3), normal(seed+1, 6, 3), normal(seed+2, 5, 3), normal(seed+3, 1, 3)
    turn = torch.linalg.qr(normal(seed+4, 3, 3))[0]
    v = field(x, pos, neg, .7, l)
    close = dict(rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(field(x+shift, pos+shift, neg+shift, .7, l), v, **close)
    torch.testing.assert_close(field(x@turn, pos@turn, neg@turn, .7, l), v@turn, **close)
    torch.testing.assert_close(field(x, pos.flip(0), neg.flip(0), .7, l), v, **close)
    torch.testing.assert_close(field(x, neg, pos, .7, l), -v, **close)
    torch.testing.assert_close(field(3*x, 3*pos, 3*neg, 3**l*.7, l), 3**(l-1)*v, **close)

@pytest.mark.parametrize('l', EXPONENTS)
def test_coincident_sample_keeps_its_weight_and_adds_no_displacement(l):
    x, other = torch.zeros(2, dtype=torch.float64), torch.tensor([[3., 4.]], dtype=torch.float64)
    pos, neg, tau = torch.cat([x[None], other]), torch.tensor([[0., 2.]], dtype=torch.float64), 10.
    k = math.exp(-5**l/tau)
    expected = k/(1+k)*5**(l-2)*other[0]-2**(l-2)*neg[0]
    torch.testing.assert_close(field(x, pos, neg, tau, l), expected, rtol=1e-12, atol=1e-14)
    assert log_density(x, pos, tau, l).item() == pytest.approx(math.log((1+k)/2), abs=1e-12)
    assert field(x, x[None], x[None], tau, l).abs().max() == 0

@pytest.mark.parametrize('l', EXPONENTS)
def test_far_and_close_points(l):
    pos, neg = normal(0, 5, 3), normal(1, 5, 3)
    v = field(normal(2, 2, 3)*1e4, pos, neg, 1e-3, l) # every kernel underflows
    assert v.isfinite().all() and log_density(normal(2, 2, 3)*1e4, pos, 1e-3, l).isfinite().all()
    y = torch.zeros(1, 3, dtype=torch.float64); x = torch.tensor([[1e-9, 0., 0.]], dtype=torch.float64)
    expected = torch.tensor([[-1e-9**(l-1), 0., 0.]], dtype=torch.float64)
    torch.testing.assert_close(field(x, y, x, 1., l), expected, rtol=1e-12, atol=0.) # x as its own negative adds nothing

def test_shapes_dtypes_and_refusals():
    x, s = normal(0, 4, 3), normal(1, 5, 3)
    assert field(x[0], s, s, 1., 1.).shape == (3,) and log_density(x[0], s, 1., 1.).shape == ()
    assert field(x.float(), s.float(), s.float(), 1., 1.).dtype == torch.float32
    for bad in (lambda: field(x, s[:, :2], s, 1., 1.), lambda: field(x, s[:0], s, 1., 1.), lambda: field(x, s, s, 0., 1.), lambda: field(x, s, s, 1., 0.),
        lambda: log_density(x, s, math.inf, 1.), lambda: log_density(x[None], s, 1., 1.)):
        with pytest.raises(ValueError, match='accepted'): bad()

@pytest.mark.parametrize('y_softmax', (False, True))
def test_practical_field_is_the_drifting_field(y_softmax):
    "Chapter 01's small version of (11) against chapter 04's, where every switch exists"
    g, y = normal(7, 40, 5), normal(8, 30, 5)
    expected = drift_field(g[None], y[None], tau=.4, y_softmax=y_softmax)[0]
    torch.testing.assert_close(practical_field(g, y, g, .4, y_softmax, own=True), expected, rtol=1e-7, atol=1e-8)

# The pages

@pytest.mark.parametrize('name', ['00_theorem1', '01_diffusion_gan'])
def test_page_carries_its_results(name):
    path = NBS/f'{name}.ipynb'
    assert path.stat().st_size < 1.5e6
    cells = [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    assert not any(o['output_type'] == 'error' for o in outputs)
    assert sum(bool({'image/png', 'image/svg+xml'} & set(o.get('data', {}))) for o in outputs) >= 5

def test_animation_has_frames():
    from PIL import Image
    text = (NBS/'01_diffusion_gan.ipynb').read_text()
    gif = re.search(r'data:image/gif;base64,([A-Za-z0-9+/=]+)', text).group(1)
    image = Image.open(io.BytesIO(base64.b64decode(gif)))
    assert image.n_frames > 20 and image.info.get('loop') == 0

def test_every_step_of_the_appendix_has_a_verdict():
    cells = json.loads((NBS/'00_theorem1.ipynb').read_text())['cells']
    tables = [''.join(o['data'].get('text/markdown', '')) for c in cells if c['cell_type'] == 'code' for o in c['outputs'] if 'data' in o]
    proof, = [t for t in tables if '| verdict |' in t.split('\n')[0]]
    rows = [r for r in proof.split('\n')[2:] if r.startswith('| ')]
    assert all(re.match(r'(holds|fails)', r.split(' | ')[2]) for r in rows)
    numbers = ' '.join(r.split(' | ')[0] for r in rows)
    for k in range(13, 31): # every equation of A.1 is in some row, alone or in a range
        assert f'({k})' in numbers or any(int(a) <= k <= int(b) for a, b in re.findall(r'\((\d+)\) to \((\d+)\)', numbers)), k
