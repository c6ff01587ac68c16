"What a cell of nbs/04_drifting.ipynb can't hold: properties over random inputs, several processes, a training loop's settings, memory"
import json, math, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import example, given, settings, strategies as st
from drift_rae.engine.streams import stream
from drift_rae.drifting import (
    DriftConfig, distances, drift_field, drift_loss, laplace_noise, plain_field)
from drift_rae.parts.weights import Y_READINGS, NoiseRows

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent/'fixtures'
ORIGINAL = DriftConfig.preset('deng2026')
VARIANTS = dict(official=ORIGINAL, nofloor=replace(ORIGINAL, floor=0.), rowonly=replace(ORIGINAL, y_softmax=False, floor=0.),
                rowonly_floor=replace(ORIGINAL, y_softmax=False, without_y='square'))
CLEAN = replace(DriftConfig.preset('c'), perturbation='off')

def samples(seed, *shapes, dtype=torch.float64):
    g = stream(seed, 'test_drifting')
    return tuple(torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)

def close(a, b, tolerance=1e-9):
    "Largest difference against the largest entry of b"
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance*max(b.abs().max().item(), 1e-30), ((a - b).abs().max(), b.abs().max())

# the reference outputs

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('case', ('single', 'fixedneg', 'peaky'))
def test_original(case, variant, dtype):
    z, config = np.load(FIXTURES/'drift_loss.npz'), VARIANTS[variant]
    get = lambda k: torch.tensor(z[f'{case}/in/{k}']).to(dtype) if f'{case}/in/{k}' in z.files else None
    ref = lambda k: z[f'{case}/{variant}/{k}']
    gen = get('gen').requires_grad_()
    loss, info = drift_loss(gen, get('fixed_pos'), get('fixed_neg'), config=config)
    loss.backward()
    close(info['loss'], ref('loss'), 1e-4); close(loss, ref('loss_mean'), 1e-4); close(gen.grad, ref('grad_gen'), 1e-4)
    close(info['scale'], ref('info/scale'), 1e-4); close(info['V'], ref('V_sum'), 1e-4)
    for t in config.temperatures:
        close(info[f'loss_{t}'], ref(f'info/loss_{t}'), 1e-4)
        close(drift_loss(gen, get('fixed_pos'), get('fixed_neg'), config=replace(config, temperatures=(t,)))[1]['V'], ref(f'V_tau{t}'), 1e-4)

@pytest.mark.parametrize('tau', (.02, .05, .2))
def test_equation_11(tau):
    z, f = np.load(FIXTURES/'drift_loss.npz'), np.load(FIXTURES/'drift_field_eq11.npz')
    data = [torch.tensor(z[f'fixedneg/in/{k}'], dtype=torch.float64) for k in ('gen', 'fixed_pos', 'fixed_neg')]
    close(drift_field(*data, tau=tau), f[f'fixedneg/V_raw_tau{tau}'], 1e-10)
    close(drift_field(*data, tau=tau*float(z['fixedneg/official/info/scale'])), f[f'fixedneg/V_scaled_tau{tau}'], 1e-10)
    close(drift_field(*data, tau=tau, scale='mean'), f[f'fixedneg/V_scaled_tau{tau}'], 1e-5) # the original's scale is rounded

def published(gen, pos, neg, w_gen, w_pos, w_neg, temperatures):
    "lambertae/drifting's drift_loss, line by line; returns the loss of each of B and the scale of the coordinates. Squared distances come from differences: x^2 + y^2 - 2xy cancels far from the origin"
    B, N, D = gen.shape
    y, w = torch.cat([gen, neg, pos], 1).detach(), torch.cat([w_gen, w_neg, w_pos], 1)
    x, K = gen.detach(), N + neg.shape[1]
    dist_ = (x[:, :, None] - y[:, None]).square().sum(-1).clamp(min=1e-8).sqrt()
    scale = (dist_*w[:, None]).mean()/w.mean()
    s = (scale/D**.5).clamp(min=1e-3)
    normed = dist_/scale.clamp(min=1e-3) + torch.nn.functional.pad(100*torch.eye(N), (0, y.shape[1]-N))
    V = 0.
    for R in temperatures:
        A = ((-normed/R).softmax(-1)*(-normed/R).softmax(-2)).clamp(min=1e-6).sqrt()*w[:, None]
        A_neg, A_pos = A[..., :K], A[..., K:]
        A = torch.cat([-A_neg*A_pos.sum(-1, keepdim=True), A_pos*A_neg.sum(-1, keepdim=True)], -1)
        F = A @ (y/s) - A.sum(-1, keepdim=True)*x/s
        V = V + F/(F**2).mean().clamp(min=1e-8).sqrt()
    return ((gen/s - (x/s + V))**2).mean((1, 2)), s

@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.integers(0, 4), st.integers(1, 40)),
       st.sampled_from([1e-5, 1e-3, 1., 1e3]), st.sampled_from([0., 1., 30.]), st.booleans(), st.booleans(), st.sampled_from([(.02, .05, .2), (.1,), (.5, 1.)]))
@example(1, (1, 1, 5, 1, 1), 1e-3, 0., False, False, (.5, 1.)) # all forces cancel
@example(1, (2, 1, 1, 1, 5), 1e3, 30., True, False, (.02, .05, .2)) # coinciding samples far from the origin
def test_original_on_other_inputs(seed, shape, size, offset, copied, weighted, temperatures):
    "Single samples, no further negatives, coordinates so small that the original's floors act, copies of generated samples among the positives"
    gen, pos, neg = (size*(x + offset) for x in data(seed, shape))
    if copied: pos[:, 0] = gen[:, 0]
    w = [torch.rand(x.shape[:2], generator=stream(seed, i), dtype=x.dtype) if weighted else x.new_ones(x.shape[:2]) for i, x in enumerate((gen, pos, neg))]
    a, b = gen.clone().requires_grad_(), gen.clone().requires_grad_()
    theirs, s = published(a, pos, neg, *w, temperatures)
    theirs.mean().backward()
    loss, info = drift_loss(b, pos, neg, weight_gen=w[0], weight_pos=w[1], weight_neg=w[2], config=replace(ORIGINAL, temperatures=temperatures))
    loss.backward()
    assert (info['loss'] - theirs).abs().max() < 1e-6*theirs.abs().max() + 1e-12
    # where forces cancel, the rounding of F (1e-16) is left, times 1e4 by the floor of its norm and 1/s by the coordinates
    assert (b.grad - a.grad).abs().max() < 1e-6*a.grad.abs().max() + 1e-12/s

@pytest.mark.parametrize('dim', (2, 64, 768))
@pytest.mark.parametrize('tau', (.02, .2, 1.))
def test_float32_against_float64_differences(dim, tau):
    gen, pos, neg = samples(dim, (3, 20, dim), (3, 30, dim), (3, 10, dim), dtype=torch.float32)
    g, p, n = (x.double() for x in (gen, pos, torch.cat([gen, neg], 1)))
    to_pos, to_neg = ((y[:, None] - g[:, :, None]).norm(dim=-1) for y in (p, n))
    to_neg.diagonal(dim1=1, dim2=2).fill_(math.inf)
    close(drift_field(gen, pos, neg, tau=tau), (-to_pos/tau).softmax(-1)@p - (-to_neg/tau).softmax(-1)@n, 3e-4)

# properties

shapes = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(1, 7), st.integers(0, 4), st.integers(1, 9)) # B, N, M, P, D
seeds = st.integers(0, 2**20)
configs = st.builds(DriftConfig, temperatures=st.sampled_from([(.3,), (.05, .2), (.02, .05, .2)]), y_softmax=st.booleans(), without_y=st.sampled_from(Y_READINGS), floor=st.sampled_from([0., 1e-6]),
    softmax=st.sampled_from(['separate', 'joint']), scope=st.sampled_from(['call', 'token']), normalisation=st.sampled_from(['unit', 'rms', 'none']),
    self_term=st.sampled_from(['masked', 'kept']), reduction=st.sampled_from(['paper', 'original']), guards=st.sampled_from(['none', 'original']))

def data(seed, shape):
    B, N, M, P, D = shape
    return samples(seed, (B, N, D), (B, M, D), (B, P, D))

def field(config, *x, tau=.2): return drift_field(*x, tau=tau, config=replace(config, normalisation='none'))

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs, st.floats(-1e3, 1e3))
def test_translation(seed, shape, config, by):
    gen, pos, neg = data(seed, shape)
    close(field(config, gen + by, pos + by, neg + by), field(config, gen, pos, neg), 1e-6)

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs)
def test_rotation(seed, shape, config):
    gen, pos, neg = data(seed, shape)
    Q = torch.linalg.qr(samples(seed+1, (shape[-1],)*2)[0])[0]
    close(field(config, gen@Q, pos@Q, neg@Q), field(config, gen, pos, neg)@Q, 1e-6)

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs)
def test_permutation(seed, shape, config):
    "Positives and further negatives in any order; generated samples take their fields with them"
    gen, pos, neg = data(seed, shape)
    g = stream(seed, 'order')
    i, j, k = (torch.randperm(n, generator=g) for n in shape[1:4])
    close(field(config, gen[:, i], pos[:, j], neg[:, k]), field(config, gen, pos, neg)[:, i], 1e-7)

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs)
def test_antisymmetry(seed, shape, config):
    "One query, itself left out: swapping positives and negatives turns the field round"
    B, _, M, P, D = shape
    gen, pos, neg = data(seed, (B, 1, M, P+1, D))
    config = replace(config, self_term='masked', scope='call', guards='none', floor=0.)
    close(field(config, gen, neg, pos), -field(config, gen, pos, neg), 1e-7)

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs)
def test_zero_when_both_sets_coincide(seed, shape, config):
    gen, pos, neg = data(seed, shape)
    config = replace(config, self_term='kept', guards='none')
    assert field(config, gen, torch.cat([gen, neg], 1), neg).abs().max() < 1e-9

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs, st.integers(1, 5), st.sampled_from(['off', 'all', 'query']), st.sampled_from(['shared', 'independent']))
def test_chunks(seed, shape, config, chunk, perturbation, draw):
    gen, pos, neg = data(seed, (shape[0]+20, *shape[1:]))
    config = replace(config, perturbation=perturbation, perturbation_draw=draw)
    a, b = (drift_loss(gen, pos, neg, config=config, generator=stream(seed, 'noise'), chunk=c)[1] for c in (len(gen), chunk))
    for k in a: close(a[k], b[k], 1e-7)

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs)
def test_weight_two_is_a_copy_and_weight_zero_is_absence(seed, shape, config):
    gen, pos, neg = data(seed, shape)
    config = replace(config, floor=0.) # a floor is under the weight: a copy has its own
    w = torch.ones(pos.shape[:2], dtype=pos.dtype); w[:, 0] = 2
    if not config.softmax == 'joint' and not config.y_softmax:
        close(drift_field(gen, pos, neg, tau=.2, config=replace(config, normalisation='none'), weight_pos=w), field(config, gen, torch.cat([pos, pos[:, :1]], 1), neg), 1e-7)
    extra = torch.cat([neg, neg.new_zeros(len(neg), 1, shape[-1])], 1)
    w = torch.ones(extra.shape[:2], dtype=pos.dtype); w[:, -1] = 0
    config = replace(config, softmax='separate')
    close(drift_field(gen, pos, extra, tau=.2, config=replace(config, normalisation='none'), weight_neg=w), field(config, gen, pos, neg), 1e-7)

@settings(deadline=None, max_examples=80)
@given(seeds, shapes, st.fixed_dictionaries(dict(scale=st.sampled_from(['raw', 'mean']), self_term=st.sampled_from(['masked', 'kept']),
    y_softmax=st.booleans(), without_y=st.sampled_from(Y_READINGS), floor=st.sampled_from([0., 1e-6]), softmax=st.sampled_from(['separate', 'joint']),
    normalisation=st.sampled_from(['none', 'unit', 'rms']))), st.booleans(), st.sampled_from([.2, 1.]))
def test_plain_field_is_the_fast_one(seed, shape, switches, noisy, tau):
    "Every switch that both have, with and without noise"
    gen, pos, neg = data(seed, shape)
    B, N, _, P, D = shape
    more = dict(perturbation='all', perturbation_unit='raw' if switches['scale'] == 'raw' else 'mean', generator=stream(seed, 'n')) if noisy else {}
    noise = NoiseRows(gen.new_ones(B), (1, N + P, D), [stream(seed, 'n')]).take(B)[:, 0] if noisy else None
    close(plain_field(gen, pos, neg, tau=tau, noise=noise, **switches), drift_field(gen, pos, neg, tau=tau, **more, **switches), 1e-6)

# perturbation

@pytest.mark.parametrize('self_term', ('masked', 'kept'))
@pytest.mark.parametrize('unit', ('mean', 'coordinate', 'raw'))
@pytest.mark.parametrize('which', ('all', 'query'))
def test_perturbation_is_equation_12(which, unit, self_term):
    (gen, pos, neg), tau = data(3, (2, 4, 5, 3, 6)), .3
    V = drift_field(gen, pos, neg, tau=tau, scale='mean', perturbation=which, perturbation_unit=unit, self_term=self_term, generator=stream(0, 'n'))
    n = NoiseRows(torch.ones(2, dtype=gen.dtype), (1, 4 if which == 'query' else 7, 6), [stream(0, 'n')]).take(2)[:, 0]
    clean = torch.cat([gen, neg], 1)
    scale = torch.cat([torch.cdist(gen, clean), torch.cdist(gen, pos)], -1).mean()
    n = n*tau*{'mean': scale, 'coordinate': scale/6**.5, 'raw': 1.}[unit]
    x, atoms = gen + n[:, :4], clean + n if which == 'all' else clean
    d = torch.cdist(x, atoms)
    if self_term == 'masked': d.diagonal(dim1=1, dim2=2).fill_(math.inf)
    close(V, (-torch.cdist(x, pos)/(tau*scale)).softmax(-1)@pos - (-d/(tau*scale)).softmax(-1)@atoms, 1e-6)

def test_perturbation_follows_the_generator():
    (gen, pos, neg), c = data(0, (3, 4, 5, 2, 6)), DriftConfig.preset('c')
    V = lambda g: drift_loss(gen, pos, neg, config=c, generator=g)[1]['V']
    assert torch.equal(V(stream(0, 'a')), V(stream(0, 'a'))) and not torch.equal(V(stream(0, 'a')), V(stream(0, 'b')))
    torch.manual_seed(0); a = V(None)
    torch.manual_seed(0); assert torch.equal(a, V(None))

def test_noise_is_drawn_in_blocks_of_eight():
    "The numbers that published runs were made with: any change of how they are drawn shows here"
    take, g = NoiseRows(torch.ones(20), (1, 4, 6), [stream(0, 'n')]).take, stream(0, 'n')
    assert torch.equal(torch.cat([take(3).clone(), take(17)]), torch.cat([laplace_noise(k, 1, 4, 6, generator=g) for k in (8, 8, 4)]))

@pytest.mark.parametrize('draw', ('shared', 'independent'))
def test_order_of_temperatures(draw):
    "Samples are moved from one temperature to the next; in which order the temperatures are written does not matter"
    (gen, pos, neg), c = data(0, (9, 4, 5, 2, 6)), replace(DriftConfig.preset('c'), perturbation_draw=draw, temperatures=(.02, .05, .2))
    alone = [drift_loss(gen, pos, neg, config=replace(c, temperatures=(t,)), generator=stream(0, 'n'))[1]['V'] for t in c.temperatures]
    for order in ((0, 1, 2), (2, 0, 1)):
        V = drift_loss(gen, pos, neg, config=replace(c, temperatures=tuple(c.temperatures[i] for i in order)), generator=stream(0, 'n'))[1]['V']
        if draw == 'shared': close(V, sum(alone), 1e-6)
        else: assert (V - sum(alone)).abs().max() > 1e-3

@pytest.mark.parametrize('given', (True, False))
@pytest.mark.parametrize('which', ('off', 'all', 'query'))
def test_rms_is_each_field_over_its_root_mean_square(which, given):
    "It needs two passes over the rows: the second has to see the first one's noise"
    (gen, pos, neg), c = data(1, (11, 4, 5, 2, 6)), replace(DriftConfig.preset('c'), perturbation=which, normalisation='rms')
    g = stream(0, 'n')
    torch.manual_seed(0)
    V = drift_loss(gen, pos, neg, config=c, generator=g if given else None, chunk=3)[1]['V']
    if given:
        parts = [drift_field(gen, pos, neg, tau=t, config=replace(c, normalisation='none'), generator=stream(0, 'n')) for t in c.temperatures]
        close(V, sum(F/F.square().mean().sqrt() for F in parts), 1e-6)
        after = stream(0, 'n')
        if which != 'off': drift_loss(gen, pos, neg, config=replace(c, normalisation='unit'), generator=after)
        assert torch.equal(g.get_state(), after.get_state()) # and leaves the generator where one pass does
    torch.manual_seed(0)
    assert given or torch.equal(V, drift_loss(gen, pos, neg, config=c, chunk=3)[1]['V'])

def test_noise_direction_is_uniform():
    n = laplace_noise(40_000, 3, generator=stream(0, 'direction'), dtype=torch.float64)
    u = n/n.norm(dim=-1, keepdim=True)
    error = 5/40_000**.5
    assert u.mean(0).abs().max() < error*(1/3)**.5 and (u.T@u/len(u) - torch.eye(3)/3).abs().max() < error*.3
    assert abs(n.norm(dim=-1).square().mean() - 2) < error*20**.5 # the second moment of Exp(1) is 2, its variance 24 - 4

# precision

def test_large_offset_in_float32():
    "Far from the origin one product would lose the distances; what is left is the input's own rounding"
    gen, pos, neg = samples(0, (2, 8, 64), (2, 9, 64), (2, 4, 64), dtype=torch.float32)
    far = [x + 1024. for x in (gen, pos, neg)]
    near = [(x.double() - 1024.) for x in far] # exactly the same rounded numbers
    for t in (.05, .2): close(drift_field(*far, tau=t, scale='mean'), drift_field(*near, tau=t, scale='mean'), 1e-4)

def test_near_duplicates_in_float32():
    "Positives a hundredth of a temperature apart, beside a sample far from the mean: their weights are right"
    gen, = samples(0, (1, 6, 768), dtype=torch.float32)
    pos = gen[:, :1] + torch.linspace(.01, .05, 5)[:, None]*torch.nn.functional.normalize(samples(1, (1, 5, 768), dtype=torch.float32)[0], dim=-1)
    a, b = drift_field(gen, pos, tau=.02)[:, 0], drift_field(gen.double(), pos.double(), tau=.02)[:, 0]
    to_pos = pos[0].double() - gen[0, 0].double()
    exact = (-to_pos.norm(dim=-1)/.02).softmax(0) @ to_pos
    attraction = b + (gen[0, 1:].double() - gen[0, 0].double())[(gen[0, 1:] - gen[0, 0]).norm(dim=-1).argmin()] # one negative has all the weight
    close(attraction[0], exact, 1e-3); assert (a - b).norm() < 1e-4*exact.norm() + 1e-5*b.norm()

def test_distances_of_clusters_far_apart():
    "A collapsed generator with two modes: no common mean brings its pairs together"
    at = torch.tensor([-50., 50.]).repeat(8)[:, None]
    x = (at + 1e-3*samples(0, (2, 16, 32), dtype=torch.float32)[0])
    close(distances(x, x, same=True), torch.cdist(x.double(), x.double()), 1e-6)
    d, exact = distances(x, x, same=True)[:, ::2, ::2], torch.cdist(x.double(), x.double(), compute_mode='donot_use_mm_for_euclid_dist')[:, ::2, ::2]
    close(d, exact, 1e-5)

def test_training_loop_settings_do_not_reach_the_field():
    gen, pos, neg = samples(0, (2, 8, 64), (2, 9, 64), (2, 4, 64), dtype=torch.float32)
    V = lambda: drift_field(gen, pos, neg, tau=.05, scale='mean')
    expected, before = V(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        assert torch.equal(V(), expected) and torch.get_float32_matmul_precision() == 'medium'
        with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(V(), expected)
    finally: torch.set_float32_matmul_precision(before)

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_low_precision_inputs(dtype):
    gen, pos, neg = (x.to(dtype) for x in data(0, (2, 5, 6, 3, 8)))
    x = gen.clone().requires_grad_()
    loss, info = drift_loss(x, pos, neg, config=ORIGINAL)
    loss.backward()
    close(info['V'], drift_loss(gen.double(), pos.double(), neg.double(), config=ORIGINAL)[1]['V'], 1e-4)
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype

# the loss

@settings(deadline=None, max_examples=40)
@given(seeds, shapes, configs)
def test_gradient_is_the_field(seed, shape, config):
    "The gradient of sum |G - sg(G+V)|^2, by autograd through its literal form"
    gen, pos, neg = data(seed, shape)
    x, y = gen.clone().requires_grad_(), gen.clone().requires_grad_()
    loss, info = drift_loss(x, pos, neg, config=config)
    loss.backward()
    scale = info['scale'].reshape(-1, 1, 1)
    s = scale.clamp(min=1e-3)/shape[-1]**.5 if config.reduction == 'original' else torch.ones_like(scale)
    single = [drift_loss(gen, pos, neg, config=replace(config, temperatures=(t,)))[1]['V'] for t in config.temperatures]
    step = lambda V: (y/s - (y/s + V).detach()).square()
    if config.reduction == 'original': literal = step(sum(single)).mean()
    else: literal = sum(step(V).sum() for V in single)/len(single)
    literal.backward()
    close(loss, literal, 1e-6); close(x.grad, y.grad, 1e-6)

def test_no_gradient_but_the_generator_s():
    gen, pos, neg = (x.requires_grad_() for x in data(0, (2, 4, 5, 3, 6)))
    V = drift_field(gen, pos, neg, tau=.2)
    loss, info = drift_loss(gen, pos, neg, config=CLEAN)
    loss.backward()
    assert not V.requires_grad and pos.grad is None and neg.grad is None and gen.grad is not None
    assert not any(v.requires_grad for v in info.values())

def test_scopes_and_classes():
    "A scope of class or token is what separate calls give; the paper's loss is the mean over classes of their sums"
    gen, pos, neg = data(0, (6, 4, 5, 3, 6)) # 2 classes of 3 tokens
    gen[3:] *= 3
    for scope, size in (('class', 3), ('token', 1)):
        config = replace(CLEAN, scope=scope)
        loss, info = drift_loss(gen, pos, neg, config=config, classes=2)
        apart = [drift_loss(gen[i:i+size], pos[i:i+size], neg[i:i+size], config=CLEAN) for i in range(0, 6, size)]
        close(info['V'], torch.cat([a[1]['V'] for a in apart])); close(info['scale'], torch.stack([a[1]['scale'] for a in apart]))
        close(loss, sum(a[0] for a in apart)/2)

def test_effective_numbers():
    gen, pos, neg = data(0, (2, 4, 5, 3, 6))
    cold = drift_loss(gen, pos, neg, config=replace(CLEAN, temperatures=(1e-4, 1e4)))[1]
    close(cold['n_eff_pos'], [1., 5.], 1e-5); close(cold['n_eff_neg'], [1., 6.], 1e-5) # all but the sample itself

def test_info_goes_into_a_log():
    info = drift_loss(*data(0, (2, 4, 5, 3, 6)), config=CLEAN)[1]
    json.dumps({k: v.tolist() for k, v in info.items() if k != 'V'}, allow_nan=False)

@pytest.mark.parametrize('name', ('deng2026', 'a', 'b', 'c'))
def test_presets_travel_as_json(name):
    config = DriftConfig.preset(name)
    assert DriftConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

@pytest.mark.parametrize('switches, sentence', (
    (dict(temperatures=()), 'temperatures'), (dict(temperatures=(.1, .1)), 'different'), (dict(temperatures=(-1,)), 'a number above 0'),
    (dict(temperatures=(math.nan,)), 'a number above 0'), (dict(floor=2), 'floor=2'), (dict(floor='a'), 'floor'), (dict(y_softmax=1), 'y_softmax=1'),
    (dict(scope='batch'), 'call, class, token'), (dict(scale='raw', scope='token'), 'no scope'), (dict(scale='raw', guards='original'), 'mean distance'),
    (dict(scale='raw', perturbation='all'), "use 'raw'")))
def test_impossible_configurations(switches, sentence):
    with pytest.raises(ValueError, match=sentence): DriftConfig(**switches)

@pytest.mark.parametrize('change, sentence', (
    (dict(gen=torch.zeros(4, 6)), 'gen: the type is float32 and the shape'), (dict(pos=torch.zeros(2, 0, 6)), 'at least one'), (dict(pos=torch.zeros(3, 5, 6)), 'B and D must agree'),
    (dict(neg=torch.zeros(2, 3, 5)), 'B and D must agree'), (dict(gen=torch.zeros(2, 0, 6)), 'at least one'), (dict(gen=torch.zeros(2, 4, 6).long()), 'floating'),
    (dict(weight_pos=torch.ones(2, 4)), 'weight_pos: the type is'), (dict(weight_gen=-torch.ones(2, 4)), 'negative'), (dict(weight_neg=torch.full((2, 3), math.nan)), 'infinite'),
    (dict(classes=3), 'must divide'), (dict(chunk=0), 'chunk=0')))
def test_impossible_inputs(change, sentence):
    call = dict(gen=torch.zeros(2, 4, 6), pos=torch.zeros(2, 5, 6), neg=torch.zeros(2, 3, 6)) | change
    with pytest.raises(ValueError, match=sentence): drift_loss(call.pop('gen'), call.pop('pos'), call.pop('neg'), config=CLEAN, **call)

# memory

def test_chunks_bound_the_memory():
    "16 tokens of the paper's shape, one at a time: at most three distance matrices beyond the field itself, and with noise its block of eight rows"
    sys.path.append(str(Path(__file__).parent))
    from bench_drifting import inputs, peak_bytes
    gen, pos, neg = inputs(16)
    matrices, V = 4*16*64*512, 4*16*64*768
    for config in (CLEAN, DriftConfig.preset('c'), replace(CLEAN, normalisation='rms'), ORIGINAL):
        small = peak_bytes(lambda: drift_loss(gen, pos, neg, config=config, chunk=1), 'cpu') - V
        large = peak_bytes(lambda: drift_loss(gen, pos, neg, config=config, chunk=16), 'cpu') - V
        block = 4*8*256*768 if config.perturbation == 'all' else 0
        assert small < 3*matrices + block and small < large, (small/matrices, large/matrices)

# several processes

CASES = {'original': ORIGINAL, 'rms': replace(CLEAN, normalisation='rms'), 'unit': CLEAN, 'token': replace(CLEAN, scope='token')}

def _shard(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous{world}', rank=rank, world_size=world)
    gen, pos, neg = data(0, (7, 4, 5, 3, 6))
    cut = [i*7//world for i in range(world+1)]
    mine = slice(cut[rank], cut[rank+1])
    out = {}
    for name, config in CASES.items():
        x = gen[mine].clone().requires_grad_()
        loss, info = drift_loss(x, pos[mine], neg[mine], config=config, group=dist.group.WORLD)
        loss.backward()
        alone = drift_loss(x, pos[mine], neg[mine], config=config)[1]
        share = 1 if config.reduction == 'paper' else len(x)/7 # the original's loss is a mean over this process' rows
        out[name] = dict(V=info['V'], loss=info['loss'], grad=x.grad*share, scale=info['scale'], alone=alone['V'])
    torch.save(out, f'{folder}/{world}_{rank}.pt')
    dist.destroy_process_group()

@pytest.mark.parametrize('world', (2, 3))
def test_sharded_equals_single_process(world, tmp_path):
    "B is split unevenly; mean distance and RMS are taken over all processes. Without the group the result would differ"
    mp.spawn(_shard, (world, str(tmp_path)), nprocs=world)
    shards = [torch.load(tmp_path/f'{world}_{r}.pt', weights_only=True) for r in range(world)]
    gen, pos, neg = data(0, (7, 4, 5, 3, 6))
    for name, config in CASES.items():
        x = gen.clone().requires_grad_()
        loss, info = drift_loss(x, pos, neg, config=config)
        loss.backward()
        joined = {k: torch.cat([s[name][k] for s in shards]) for k in ('V', 'loss', 'grad', 'alone')}
        close(joined['V'], info['V'], 1e-10); close(joined['loss'], info['loss'], 1e-10)
        close(joined['grad'], x.grad, 1e-10)
        if config.scope == 'call':
            for s in shards: close(s[name]['scale'], info['scale'], 1e-12)
            assert (joined['alone'] - info['V']).abs().max() > 1e-3

# the readings of "without the y-softmax"

def by_hand(gen, pos, neg, tau, reading, floor):
    "The joint field of the original without the y-softmax, every reading as a formula of p"
    x = torch.cat([gen, neg], 1)
    d = torch.cdist(gen, torch.cat([x, pos], 1))/tau
    d.diagonal(dim1=1, dim2=2).fill_(math.inf)
    p = (-d).softmax(-1)
    floor = torch.tensor(floor, dtype=p.dtype)
    w = dict(factor=torch.maximum(p, floor).sqrt(), floor=torch.maximum(p, floor), plain=p, square=torch.maximum(p*p, floor).sqrt())[reading]
    q, p = w.split((x.shape[1], pos.shape[1]), -1)
    return (p*q.sum(-1, keepdim=True))@pos - (q*p.sum(-1, keepdim=True))@x

@pytest.mark.parametrize('field_of', (plain_field, drift_field))
@pytest.mark.parametrize('reading', Y_READINGS[1:])
def test_readings_of_a_removed_y_softmax(field_of, reading):
    gen, pos, neg = data(5, (2, 4, 9, 3, 6))
    expected = by_hand(gen, pos, neg, .2, reading, 1e-3)
    close(field_of(gen, pos, neg, tau=.2, softmax='joint', floor=1e-3, without_y=reading), expected, 1e-9)
    auto = field_of(gen, pos, neg, tau=.2, softmax='joint', floor=1e-3)
    assert torch.equal(auto, field_of(gen, pos, neg, tau=.2, softmax='joint', floor=1e-3, without_y='factor'))

def test_without_a_floor_removing_the_y_softmax_gives_equation_11():
    x = data(6, (2, 4, 9, 3, 6))
    eleven = drift_field(*x, tau=.2)
    for reading in ('auto', 'floor', 'plain', 'square'): assert torch.equal(drift_field(*x, tau=.2, without_y=reading), eleven)
    close(drift_field(*x, tau=.2, without_y='factor'), drift_field(*x, tau=.4), 1e-9) # the root of a softmax: twice the temperature

def test_with_the_y_softmax_the_reading_says_nothing():
    x = data(7, (2, 4, 9, 3, 6))
    for reading in Y_READINGS: assert torch.equal(drift_field(*x, tau=.2, config=replace(ORIGINAL, without_y=reading)), drift_field(*x, tau=.2, config=ORIGINAL))

def test_recipes_of_stored_results_are_the_same_as_before_the_reading():
    "The reading is part of a recipe only where it is a new one: hashes of stored results still hold"
    from drift_rae.parts.recipe import changed, config_for
    for words, expected in (('', None), ('drift.y_softmax=False', 'factor'), ('drift.y_softmax=False drift.without_y=square', None), ('drift.y_softmax=False drift.without_y=plain', 'plain'),
                            ('drift.y_softmax=False drift.floor=0', None)):
        assert changed(config_for('tiny', 'a'), words).recipe()['drift'].get('without_y') == expected
    assert 'without_y' not in config_for('tiny', 'c').recipe()['drift']
