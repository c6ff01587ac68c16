"Compiled blocks: how many programs, the same numbers, the same interface of TF32. The slow tests use inductor; CI counts programs without making code"
import copy
from dataclasses import replace
import pytest, torch
from torch._dynamo.testing import CompileCounterWithBackend
from drift_rae.engine import launch
from drift_rae.networks.ditdh import DiTDH, preset
from drift_rae.parts.recipe import config_for
from drift_rae.parts.step import drift_step, make_student
from drift_rae.worlds.latents import sort_by_class
import small_runs

def shallow(name='s', side=4, depth=(2, 1), classes=3):
    "A network of the preset's widths, with fewer blocks and tokens and random weights"
    torch.manual_seed(0)
    model = DiTDH(**{**preset(name), 'input_size': side, 'depth': list(depth), 'num_classes': classes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.02*torch.randn_like(p))
    return model

def store_for(model, n=12):
    shape = model.in_channels, model.input_size, model.input_size
    return sort_by_class(torch.randn(n*model.num_classes, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(n*model.num_classes) % model.num_classes, model.num_classes)

def step_of(model, config, step=0):
    "Loss, figures and gradient of one step"
    loss, figures = drift_step(model, store_for(model), [0, 2], config, step=step)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss, figures, gradient

CONFIG = config_for('xl', n_class=2, n_pos=6, n_neg=7, n_extra_neg=5, at_once=1)

@pytest.fixture(autouse=True)
def fresh():
    "Programs of other tests do not count"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()

@pytest.mark.parametrize('recompute', [False, True])
def test_one_program_for_all_sizes(recompute):
    "Trunk and head, with gradient and without: four programs for every micro-batch and the last partial one"
    counter = CompileCounterWithBackend('eager')
    student = make_student(shallow('tiny', depth=(3, 2)))
    student.checkpointing = recompute
    student.compile_blocks(backend=counter)
    for micro_batch in (3, 5, 2, 0): # of 7: a last one of 1, of 2, of 1; all together
        step_of(student, replace(CONFIG, micro_batch=micro_batch, precision='float32'))
        if micro_batch == 3: first = counter.frame_count
    assert counter.frame_count == first <= 8 # those of a single image are programs of their own
    assert not torch._dynamo.utils.counters['graph_break']

def test_padding_gives_the_same_numbers():
    plain, padded = (make_student(shallow('tiny')) for _ in range(2))
    padded.pad_swiglu(64)
    config = replace(CONFIG, precision='float32')
    for a, b in zip(step_of(plain, config), step_of(padded, config)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@pytest.mark.slow
def test_inductor_is_within_the_noise_of_bfloat16():
    student = make_student(shallow())
    compiled = copy.deepcopy(student).compile_blocks()
    exact, half, made = (step_of(m, replace(CONFIG, micro_batch=3, precision=p)) for m, p in ((student, 'float32'), (student, 'bfloat16'), (compiled, 'bfloat16')))
    distance = lambda a, b: ((a[2] - b[2]).norm()/a[2].norm()).item()
    assert distance(half, made) < 1.5*distance(exact, half) # as far from each other as from float32
    assert made[0] == pytest.approx(half[0], rel=1e-2)
    for k, v in half[1].items(): torch.testing.assert_close(torch.tensor(made[1][k]), torch.tensor(v), rtol=.05, atol=.05)

@pytest.mark.slow
@pytest.mark.parametrize('sharding', ['ddp', 'fsdp'])
def test_two_compiled_processes_agree_with_one(sharding):
    case = [('c', dict(compiled=True, micro_batch=3, recompute=True, sharding=sharding))]
    (figures, weights), = launch.launch(small_runs.several, case, nproc=2)
    (figures_1, weights_1), = small_runs.several([('c', dict(micro_batch=3, recompute=True))])
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(figures_1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights, weights_1, atol=1e-6, rtol=0)
