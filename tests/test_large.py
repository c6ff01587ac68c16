"A run of another model than the miniature by papermill: no examples, few lines, an evaluation shared by the processes; small networks in place of large ones"
import json
import pytest, torch
from drift_rae.engine import launch
from drift_rae.parts.ingredients import load_parts
from drift_rae.worlds.evaluation import evaluate_run
from drift_rae.worlds.latents import save_latents
from programs import papermill
pytestmark = pytest.mark.usefixtures('forked_workers')


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    "The output of `-p model s` with the miniature's latents, teacher and autoencoder"
    folder = tmp_path_factory.mktemp('large')
    save_latents(load_parts()[0], folder/'latents', dict(made='here'), 'int8')
    given = dict(model='s', latents=folder/'latents', teacher='tiny', autoencoder='tiny', out=folder/'run', steps=120, n_class=2, n_pos=8, n_neg=2,
                 n_extra_neg=2, monitor_every=60, samples=6, nproc=1, changes='monitor_samples=40 at_once=1 readers=3 precision=float32')
    done = papermill('06_distill', folder, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def outputs(path):
    "What the notebook printed and showed, as text"
    cells = json.loads(path.read_text())['cells']
    found = [o.get('text') or o.get('data', {}).get('text/markdown', '') for c in cells for o in c.get('outputs', [])]
    return ''.join(''.join(f) + '\n' for f in found)

def test_no_examples_and_at_most_a_hundred_lines(large):
    said = outputs(large/'out.ipynb')
    assert said.count('dry run') == 0 and 'Gradient norms' not in said and 'Mean ± standard deviation' not in said
    lines = [l for l in said.splitlines() if l.startswith('step ')]
    assert lines[-1].startswith('step 120/120') and len(lines) <= 100
    assert all(len(l) <= 100 for l in lines) and 'waiting' in lines[0]
    assert 'micro-batch' in said # the plan of memory
    assert 'seconds_waiting' in (large/'run/log.csv').read_text().splitlines()[0]

def test_the_sheets_have_full_size(large):
    from PIL import Image
    assert Image.open(large/'run/sheets/step_0000060.png').size == (10*64, 4*64) # 16 pixels, enlarged
    assert Image.open(large/'run/samples.png').size == (20*64, 4*64)
    shown = [o for c in json.loads((large/'out.ipynb').read_text())['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert max(len(o['data']['image/png']) for o in shown) < 400_000

def test_two_processes_measure_what_one_did(large):
    results = json.loads((large/'run/results.json').read_text())
    options = dict(model='s', latents=str(large/'latents'), teacher='tiny', autoencoder='tiny')
    both = launch.launch(evaluate_run, str(large/'run'), 6, precision='float32', nproc=2, **options)
    for k, m in both['measured'].items(): assert results['fd'][k] == pytest.approx(m['fd'], rel=1e-4)
    assert both['images']['student'].shape == (20, 3, 16, 16)

def test_guidance_and_precision_reach_the_teacher(large):
    options = dict(model='s', latents=str(large/'latents'), teacher='tiny', autoencoder='tiny', real=400)
    plain, guided, half = (evaluate_run(str(large/'run'), 2, **options, **more) for more in ({}, dict(sampler=dict(guidance=2.)), dict(precision='bfloat16')))
    same = lambda a, b, k: torch.equal(a['images'][k], b['images'][k])
    assert same(plain, guided, 'student') and not same(plain, guided, 'teacher_50')
    assert not same(plain, half, 'student')
    for k in ('student', 'teacher_1'): assert (plain['images'][k].float() - half['images'][k].float()).abs().mean() < 4

def test_a_machine_without_the_first_process_is_known(monkeypatch):
    monkeypatch.setattr(launch, '_first', False)
    assert not launch.first_machine()
