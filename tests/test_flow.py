"DiT^DH and flow matching: what a notebook cell can't hold (every option, damaged files, properties)"
import itertools, json
from dataclasses import asdict
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from drift_rae import flow
from drift_rae.autoencoder import RAE
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import image_noise, stream
from drift_rae.engine.files import load_weights, save_weights, weights_path
from drift_rae.flow import (
    DiTDH, FlowConfig, guided_velocity, load_teacher, one_step, preset, sample, save_teacher,
    train_teacher)
from drift_rae.parts.paths import default_shift, flow_loss, sample_time, time_grid, time_shift
from drift_rae.worlds.judge import load_judge

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent/'fixtures'
SMALL = dict(input_size=4, in_channels=8, hidden_size=[16, 24], depth=[2, 1], num_heads=[2, 2], num_classes=5)
QUICK = FlowConfig(steps=5, batch=16, ema=(.9, 2))

@pytest.fixture(scope='module')
def official(): return torch.load(FIXTURES/'ditdh.pt', weights_only=True)['main']

@pytest.fixture(scope='module')
def net(official):
    net = DiTDH(**official['config']).eval()
    net.load_state_dict(official['state_dict'], strict=True)
    return net

def shaken(seed=0, **config):
    "A network whose zero-initialised layers are not zero, so that every part shows in the output"
    net, g = DiTDH(**config), stream(seed, 'shaken')
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad: p.add_(.1*torch.randn(p.shape, generator=g))
    return net.eval()

def batch(n=3, c=8, size=4, classes=5, seed=0):
    g = stream(seed, 'batch')
    return torch.randn(n, c, size, size, generator=g), torch.rand(n, generator=g), torch.randint(0, classes+1, (n,), generator=g)

# ---- against the official code ----

@torch.no_grad()
def test_forward_is_official(net, official):
    x, y = official['x'], official['y']
    torch.testing.assert_close(net(x, official['t'], y), official['out'], atol=1e-5, rtol=0)
    torch.testing.assert_close(net(x, torch.ones(len(x)), y), official['v_at_1'], atol=1e-5, rtol=0)
    torch.testing.assert_close(one_step(net, x, y), official['G'], atol=1e-5, rtol=0)

@torch.no_grad()
def test_a_changed_weight_is_noticed(official):
    "The comparison can fail: each tensor, changed by itself, moves the output"
    for name in ('pos_embed', 't_embedder.W', 's_projector.bias', 'enc_feat_rope.freqs_cos', 'dec_feat_rope.freqs_sin', 'blocks.3.mlp.w12.weight'):
        net = DiTDH(**official['config']).eval()
        net.load_state_dict({k: v*1.1 if k == name else v for k, v in official['state_dict'].items()})
        assert (net(official['x'], official['t'], official['y']) - official['out']).abs().max() > 1e-4, name

@torch.no_grad()
def test_fixed_tensors_are_official(official):
    "Positions are not only loaded: a fresh network makes the same"
    fresh = DiTDH(**official['config']).state_dict()
    for name in ('pos_embed', 'enc_feat_rope.freqs_cos', 'enc_feat_rope.freqs_sin', 'dec_feat_rope.freqs_cos', 'dec_feat_rope.freqs_sin'):
        torch.testing.assert_close(fresh[name], official['state_dict'][name], atol=1e-6, rtol=0)

@torch.no_grad()
def test_guidance_is_official(net, official):
    c = official['cfg']; n = len(c['x'])//2
    v = guided_velocity(net, c['x'][:n], c['t'][:n], c['y'][:n], c['cfg_scale'], c['cfg_interval'])
    torch.testing.assert_close(v, c['out'][:n], atol=1e-5, rtol=0)

@pytest.mark.parametrize('name,count', [('xl', 838_675_796), ('l', 621.7e6), ('b', 294.3e6), ('s', 196.5e6)])
def test_parameter_counts(name, count):
    with torch.device('meta'): net = DiTDH(**preset(name))
    n = sum(p.numel() for p in net.parameters())
    assert n == count if name == 'xl' else abs(n - count) < .05e6

def test_xl_keys():
    with torch.device('meta'): net = DiTDH(**preset('xl'))
    official = dict(json.loads((FIXTURES/'ditdh_xl_keys.json').read_text()))
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == official and len(official) == 382

def test_l_on_meta_runs():
    with torch.device('meta'): v = DiTDH(**preset('l')).eval()(torch.empty(2, 768, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.int64))
    assert v.shape == (2, 768, 16, 16)

# ---- every option ----

SWITCHES = ('use_qknorm', 'use_swiglu', 'use_rope', 'use_rmsnorm', 'wo_shift', 'use_pos_embed')

@pytest.mark.parametrize('values', list(itertools.product((False, True), repeat=6)))
def test_every_combination_of_switches(values):
    switches = dict(zip(SWITCHES, values))
    net = shaken(**SMALL, **switches)
    x, t, y = batch()
    v = net(x, t, y)
    assert v.shape == x.shape and v.isfinite().all()
    v.square().sum().backward()
    unused = [k for k, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert unused == [] # every weight has a say
    keys = ' '.join(net.state_dict())
    assert ('q_norm' in keys) == switches['use_qknorm'] and ('mlp.w12' in keys) == switches['use_swiglu'] and ('mlp.fc1' in keys) != switches['use_swiglu']
    assert ('feat_rope' in keys) == switches['use_rope'] and ('norm1.weight' in keys) == switches['use_rmsnorm'] and ('pos_embed' in keys) == switches['use_pos_embed']
    assert net.blocks[0].adaLN_modulation[1].out_features == (4 if switches['wo_shift'] else 6)*16

@pytest.mark.parametrize('switch', SWITCHES)
def test_a_switch_changes_the_output(switch):
    default = dict(use_qknorm=False, use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=False, use_pos_embed=True)
    a, b = shaken(**SMALL), shaken(**SMALL, **{switch: not default[switch]})
    shared = {k: v for k, v in a.state_dict().items() if k in b.state_dict() and v.shape == b.state_dict()[k].shape}
    b.load_state_dict(shared, strict=False)
    with torch.no_grad(): assert (a(*batch()) - b(*batch())).abs().max() > 1e-4

@pytest.mark.parametrize('shape', [dict(hidden_size=[16, 16]), dict(depth=[1, 3]), dict(num_heads=2), dict(num_heads=[2, 3]), dict(patch_size=[1, 1]), dict(mlp_ratio=2.5),
                                   dict(input_size=1), dict(class_dropout_prob=0.)])
def test_shapes(shape):
    config = {**SMALL, **shape}
    net = shaken(**config)
    x, t, y = batch(size=config['input_size'])
    y = y.clamp(max=4)
    assert net(x, t, y).shape == x.shape
    assert ('s_projector.weight' in net.state_dict()) == (config['hidden_size'][0] != config['hidden_size'][1])
    again = DiTDH(**net.config).eval() # the stored keywords rebuild it
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, t, y), net(x, t, y))

def test_nothing_position_dependent_is_left_without_positions():
    net = shaken(**SMALL, use_rope=False, use_pos_embed=False)
    x, t, y = batch()
    order = torch.randperm(16, generator=stream(0))
    with torch.no_grad(): moved = net(x.flatten(2)[:, :, order].unflatten(-1, (4, 4)), t, y)
    torch.testing.assert_close(moved.flatten(2), net(x, t, y).flatten(2)[:, :, order], atol=1e-5, rtol=0)

def test_samples_do_not_see_each_other():
    net, (x, t, y) = shaken(**SMALL), batch(4)
    with torch.no_grad(): torch.testing.assert_close(net(x, t, y)[:1], net(x[:1], t[:1], y[:1]), atol=1e-6, rtol=0)

def test_label_dropout_in_training_only():
    net, (x, t, y) = shaken(**{**SMALL, 'class_dropout_prob': 1.}), batch()
    y = torch.zeros_like(y)
    with torch.no_grad():
        labelled, null = net(x, t, y), net(x, t, y+5)
        assert (labelled - null).abs().max() > 1e-3
        net.train()
        assert torch.equal(net(x, t, y), null) # probability 1: every label is dropped
        assert torch.equal(one_step(net, x, y), one_step(net.eval(), x, y)) and torch.equal(sample(net.train(), x, y, 5), sample(net.eval(), x, y, 5))

def test_every_module_keeps_its_mode():
    "A network in evaluation mode inside a wrapper in training mode, as DistributedDataParallel is made"
    class Wrapper(torch.nn.Module):
        def __init__(self, module): super().__init__(); self.module, self.null_label, self.shift = module, 5, 1.
        def forward(self, *args): assert not any(m.training for m in self.modules()); return self.module(*args)
    net, (x, _, y) = shaken(**{**SMALL, 'class_dropout_prob': 1.}), batch()
    net.blocks[1].train() # a part may be in another mode than the rest
    wrapper, guide = Wrapper(net), shaken(**SMALL).train()
    before = [[m.training for m in network.modules()] for network in (wrapper, guide)]
    assert wrapper.training and not net.training
    for call in (lambda: one_step(wrapper, x, y), lambda: sample(wrapper, x, y, 3), lambda: sample(wrapper, x, y, 3, guidance=2., guide=guide)):
        call()
        assert [[m.training for m in network.modules()] for network in (wrapper, guide)] == before
    with pytest.raises(ValueError): one_step(wrapper, x, y[:1]) # also after an error
    with pytest.raises(AssertionError): one_step(Fails(wrapper), x, y)
    assert [[m.training for m in network.modules()] for network in (wrapper, guide)] == before

class Fails(torch.nn.Module):
    def __init__(self, module): super().__init__(); self.module = module
    def forward(self, *args): raise AssertionError('on purpose')

def test_checkpointing_keeps_numbers_and_gradients():
    net, args, grads = shaken(**SMALL), batch(), []
    for net.checkpointing in (False, True):
        net.zero_grad(); net(*args).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    for a, b in zip(*grads): assert torch.equal(a, b)

@pytest.mark.parametrize('multiple', [8, 64])
def test_padded_swiglu_is_exact(multiple):
    "In float64 output and gradients are the same to rounding; parameters and checkpoints keep their shapes"
    from drift_rae.networks.layers import SwiGLU
    a = SwiGLU(24, 61).double(); b = SwiGLU(24, 61).double(); b.load_state_dict(a.state_dict()); b.multiple = multiple
    x = torch.randn(5, 7, 24, dtype=torch.float64, generator=stream(0, 'x'))
    out = [m(x) for m in (a, b)]
    torch.testing.assert_close(*out, atol=1e-14, rtol=1e-13)
    for o in out: o.square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-12, rtol=1e-12)
    net, inputs = shaken(**SMALL).eval(), batch()
    plain, shapes = net(*inputs), {k: v.shape for k, v in net.state_dict().items()}
    assert any(m.w3.in_features % multiple for m in net.modules() if isinstance(m, SwiGLU))
    torch.testing.assert_close(net.pad_swiglu(multiple)(*inputs), plain, atol=1e-5, rtol=0)
    assert shapes == {k: v.shape for k, v in net.state_dict().items()}
    assert torch.equal(net.pad_swiglu(1)(*inputs), plain)

def test_bfloat16():
    net, (x, t, y) = shaken(**SMALL), batch()
    with torch.no_grad():
        exact = net(x, t, y)
        with torch.autocast('cpu', torch.bfloat16): cast = net(x, t, y)
        whole = net.bfloat16()(x.bfloat16(), t, y)
    for v in (cast, whole): assert v.dtype == torch.bfloat16 and ((v.float() - exact).norm()/exact.norm()) < .03

@pytest.mark.parametrize('change,says', [(dict(x=torch.zeros(3, 7, 4, 4)), 'takes [N, 8, 4, 4]'), (dict(x=torch.zeros(3, 8, 5, 4)), 'takes [N, 8, 4, 4]'), (dict(x=torch.zeros(8, 4, 4)), 'takes [N, 8, 4, 4]'),
                                         (dict(y=torch.tensor([0, 1, 6])), 'label 6: this model knows 0 to 5'), (dict(y=torch.tensor([0, 1, -1])), 'label -1'), (dict(y=torch.zeros(3)), 'int64'),
                                         (dict(y=torch.zeros(2, dtype=torch.int64)), 'need one of each'), (dict(t=torch.zeros(1)), 'need one of each')])
def test_wrong_input(change, says):
    net, (x, t, y) = shaken(**SMALL), batch()
    with pytest.raises(ValueError) as e: net(**{**dict(x=x, t=t, y=y), **change})
    assert says in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('config,says', [(dict(depht=[1, 1]), 'no option depht'), (dict(patch_size=2), 'patch_size=2'), (dict(depth=3), 'depth=3'), (dict(hidden_size=[16, 16, 16]), 'a list of 2 values'),
                                         (dict(num_heads=3), 'width 16 with 3 heads'), (dict(num_heads=8), 'with RoPE'), (dict(hidden_size=[18, 24], use_rope=False), 'multiple of 4')])
def test_wrong_options(config, says):
    with pytest.raises(ParameterError) as e: DiTDH(**{**SMALL, **config})
    assert says in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('f', [preset, FlowConfig.preset])
def test_unknown_preset(f):
    with pytest.raises(ParameterError, match="'huge'.*tiny, nano, mini, s, b, l, xl"): f('huge')

def test_presets_are_copies():
    preset('xl')['hidden_size'][0] = 1
    assert preset('xl')['hidden_size'] == [1152, 2048]

# ---- times ----

@settings(max_examples=50, deadline=None)
@given(st.floats(.3, 20), st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_shift_keeps_order_and_ends(shift, times):
    t = torch.tensor(sorted(times), dtype=torch.float64)
    s = time_shift(t, shift)
    assert (s.diff() >= -1e-12).all() and s.min() >= 0 and s.max() <= 1+1e-12
    torch.testing.assert_close(time_shift(s, 1/shift), t, atol=1e-9, rtol=0)

def test_official_grid():
    grid = time_grid(50, default_shift((768, 16, 16)))
    assert len(grid) == 50 and grid[0] == 1 and abs(grid[-1] - .006887) < 1e-6 and (grid.diff() < 0).all()

@pytest.mark.parametrize('time', ['logit-normal', 'uniform'])
def test_training_times_have_their_distribution(time):
    t = sample_time(200_000, time, generator=stream(0, time)).double()
    edges = torch.tensor([.1, .3, .5, .8, .99], dtype=torch.float64)
    whole = torch.special.ndtr(edges.new_tensor(.999).logit())
    expected = torch.special.ndtr(edges.logit())/whole if time == 'logit-normal' else edges/.999
    assert ((t[:, None] <= edges).double().mean(0) - expected).abs().max() < .005 and t.max() <= .999

@pytest.mark.parametrize('steps,method,evaluations', [(1, 'euler', 1), (2, 'euler', 1), (50, 'euler', 49), (50, 'heun', 98)])
def test_number_of_evaluations(steps, method, evaluations):
    calls = []
    def model(x, t, y): calls.append(t); return torch.zeros_like(x)
    model.shift = 2.
    sample(model, torch.zeros(2, 1, 1, 1), [0, 1], steps, method=method)
    assert len(calls) == evaluations and all(t.shape == (2,) for t in calls)

# ---- guidance ----

class Constant(torch.nn.Module):
    "Velocity = the label, so that guidance can be computed by hand"
    def __init__(self, add=0., null=9): super().__init__(); self.add, self.null_label, self.shift, self.seen = add, null, 1., 0
    def forward(self, x, t, y): self.seen += len(x); return torch.zeros_like(x) + (y + self.add).view(-1, 1, 1, 1)

def test_guidance_by_hand():
    x, y, t = torch.zeros(2, 1, 1, 1), torch.tensor([1, 2]), torch.tensor([.5, .9])
    assert guided_velocity(Constant(), x, t, y, 3.).flatten().tolist() == [9+3*(1-9), 9+3*(2-9)]
    assert guided_velocity(Constant(), x, t, y, 3., (.2, .6)).flatten().tolist() == [9+3*(1-9), 2]
    assert guided_velocity(Constant(), x, t, y, 3., guide=Constant(.5)).flatten().tolist() == [1.5-1.5, 2.5-1.5]
    for y_, interval in ((1., (0., 1.)), (3., (.95, .96))): # nothing to do: no second evaluation
        model = Constant(); guided_velocity(model, x, t, y, y_, interval); assert model.seen == 2
    with pytest.raises(ParameterError, match='null label'): guided_velocity(Constant(null=None), x, t, y, 2.)
    with pytest.raises(ParameterError, match='interval'): guided_velocity(Constant(), x, t, y, 2., (.6, .2))

def test_one_step_has_gradients():
    net, (x, _, y) = shaken(**SMALL), batch()
    one_step(net, x, y).sum().backward()
    assert net.final_layer.linear.weight.grad.abs().sum() > 0

def test_wrong_sampling():
    model, z = Constant(), torch.zeros(2, 1, 1, 1)
    for arguments, says in ((dict(steps=0), 'steps=0'), (dict(steps=2.5), 'steps=2.5'), (dict(method='rk'), "method='rk'"), (dict(labels=[1]), 'one label each')):
        with pytest.raises(ValueError, match=says): sample(model, z, **{**dict(labels=[0, 1]), **arguments})

# ---- the teacher ----

def data(n=40):
    y = torch.arange(n) % 5
    return torch.randn(n, 8, 4, 4, generator=stream(0, 'data')), y

def test_training_is_reproducible_and_leaves_the_global_stream_alone():
    torch.manual_seed(3); a, la = train_teacher(*data(), SMALL, flow=QUICK, seed=1)
    state = torch.get_rng_state(); torch.manual_seed(3); assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8); b, lb = train_teacher(*data(), SMALL, flow=QUICK, seed=1)
    c, lc = train_teacher(*data(), SMALL, flow=QUICK, seed=2)
    assert la == lb and la != lc and len(la) == 5 and not a.training and a.shift == 2.
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def test_a_store_is_as_good_as_tensors():
    class Store:
        def batch(self, n, generator):
            i = torch.randint(40, (n,), generator=generator)
            return data()[0][i], data()[1][i]
    a, b = train_teacher(Store(), None, SMALL, flow=QUICK, steps=2)[0], train_teacher(*data(), SMALL, flow=QUICK, steps=2)[0]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))

def test_shift_by_dimension_when_none():
    assert train_teacher(*data(), SMALL, flow=FlowConfig(batch=4, shift=None), steps=1)[0].shift == default_shift((8, 4, 4))

def test_save_and_load(tmp_path):
    net = shaken(**SMALL); net.shift = 1.5
    save_teacher(tmp_path/'teacher.safetensors', net, [2., 1.5], seed=4)
    for where in (tmp_path, tmp_path/'teacher.safetensors', str(tmp_path)):
        again = load_teacher(where)
        assert again.config == net.config and again.shift == 1.5 and not again.training
        assert {k for k, p in again.named_parameters() if p.requires_grad} == {k for k, p in net.named_parameters() if p.requires_grad}
        assert torch.equal(again(*batch()), net(*batch()))

def test_official_checkpoints(tmp_path, monkeypatch, official):
    monkeypatch.setattr('drift_rae.flow.preset', lambda name: official['config'])
    state = official['state_dict']
    torch.save(state, tmp_path/'raw.pt'); torch.save(dict(ema=state, model={k: 0*v for k, v in state.items()}, step=3), tmp_path/'full.pt')
    for name in ('raw.pt', 'full.pt'):
        net = load_teacher(tmp_path/name)
        with torch.no_grad(): torch.testing.assert_close(one_step(net, official['x'], official['y']), official['G'], atol=1e-5, rtol=0)

def test_damaged_files(tmp_path, official):
    whole = tmp_path/'whole.pt'; torch.save(official['state_dict'], whole)
    raw = whole.read_bytes()
    cases = {'half.pt': raw[:len(raw)//2], 'empty.pt': b'', 'text.pt': b'no weights here\n', 'half.safetensors': b'\x10\0\0'}
    for name, content in cases.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ParameterError) as e: load_teacher(tmp_path/name)
        assert name in str(e.value) and 'not a whole' in str(e.value) and '\n' not in str(e.value), name

def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return (exec, (f"open({str(tmp_path/'ran')!r}, 'w')",))
    torch.save(dict(ema=Evil()), tmp_path/'evil.pt')
    with pytest.raises(ParameterError, match='not a whole PyTorch checkpoint'): load_teacher(tmp_path/'evil.pt')
    assert not (tmp_path/'ran').exists()

def test_wrong_files(tmp_path, official):
    torch.save(official['state_dict'], tmp_path/'small.pt'); torch.save([1, 2], tmp_path/'list.pt'); save_weights(tmp_path/'other.safetensors', dict(a=torch.ones(1)), {})
    for what, says in (((tmp_path/'small.pt', 'xl'), 'another architecture'), ((tmp_path/'list.pt',), 'holds no weights'), ((tmp_path/'other.safetensors',), 'has no configuration'),
                       ((tmp_path/'none.pt',), 'no file'), ((tmp_path,), 'teacher.safetensors'), (('xl',), 'does not ship'), ((tmp_path/'small.pt', 'huge'), "model='huge': accepted is one of tiny")):
        with pytest.raises(ParameterError) as e: load_teacher(*what)
        assert says in str(e.value) and '\n' not in str(e.value)

# ---- the teacher that ships ----

def test_shipped_teacher():
    "Its file names its training, and its samples are digits of the class asked for"
    (tensors, about), teacher = load_weights(weights_path('tiny/teacher')), load_teacher('tiny')
    assert about['model'] == DiTDH(**preset('tiny')).config and teacher.shift == about['shift'] == FlowConfig.preset('tiny').shift
    today = json.loads(json.dumps(asdict(FlowConfig.preset('tiny')))) # it may have fields that are newer than the file, at their defaults
    assert {**json.loads(json.dumps(asdict(FlowConfig()))), **about['flow']} == today and len(tensors['losses']) == about['flow']['steps']
    rae, judge, y = RAE.from_pretrained('tiny'), load_judge(), torch.arange(10).repeat(20)
    with torch.no_grad(): right = judge.predict(rae.decode(sample(teacher, image_noise(y, (32, 4, 4), 5), y))) == y
    assert right.float().mean() > .9

def test_contract():
    assert {'DiTDH', 'preset', 'sample', 'one_step', 'flow_loss', 'load_teacher', 'train_teacher'} <= set(flow.__all__)
