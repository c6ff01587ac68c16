"The distillation on several processes, killed, continued, on a full disk and with wrong input"
import errno, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from drift_rae.engine import checkpoints, launch
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.files import write_json
from drift_rae.distill import distill, load_generator, main, start
from drift_rae.drifting import DriftConfig
import small_runs
from programs import run

pytestmark = pytest.mark.usefixtures('forked_workers')

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != 'IN_TEST'}, 'PYTHONPATH': f'{ROOT}:{HERE}', 'OMP_NUM_THREADS': '1'}

# preset and changes; those with n_class=2 let several processes share a class
CASES = [('c', {}), ('a', {}), ('b', dict(n_class=5)), ('a', dict(n_class=5)), ('c', dict(micro_batch=3, recompute=True)), ('c', dict(n_class=2)), ('a', dict(n_class=2)), ('c', dict(drift=DriftConfig.preset('c'))),
    ('c', dict(decode_encode=True, micro_batch=3)), ('a', dict(decode_encode=True)), ('c', dict(decode_encode=True, n_class=2, recompute=True))]

@pytest.fixture(scope='module')
def alone(): return small_runs.several(CASES)

@pytest.mark.parametrize('nproc', [2, 4])
def test_the_result_does_not_depend_on_the_number_of_processes(nproc, alone):
    together = launch.launch(small_runs.several, CASES, nproc=nproc)
    for case, (figures, weights), (figures_1, weights_1) in zip(CASES, together, alone):
        torch.testing.assert_close(torch.tensor(figures), torch.tensor(figures_1), atol=1e-6, rtol=1e-6, msg=lambda m: f'{case}: {m}')
        torch.testing.assert_close(weights, weights_1, atol=1e-6, rtol=0, msg=lambda m: f'{case}: {m}')

def test_a_run_of_four_processes_continues_on_two(tmp_path):
    "Saved by FSDP on four, continued by DDP on two"
    with pytest.raises(launch.Interrupted, match='step 4 of 8: enough'): launch.launch(small_runs.stopped_after, str(tmp_path), 3, sharding='fsdp', nproc=4)
    figures, weights = launch.launch(small_runs.stopped_after, str(tmp_path), -1, 'must', nproc=2)
    figures_1, weights_1 = small_runs.result(*distill(small_runs.teacher(), small_runs.store(), small_runs.config(steps=8)))
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(figures_1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights, weights_1, atol=1e-6, rtol=0)

def test_five_processes_cannot_share_four_classes():
    with pytest.raises(ParameterError, match='5 processes for n_class=4'): start(nproc=5, dry_run=1)

@pytest.mark.parametrize('world, kills', [(1, 20), (2, 20), pytest.param(1, 100, marks=pytest.mark.slow), pytest.param(2, 100, marks=pytest.mark.slow)])
def test_killed_runs_end_where_an_undisturbed_one_ends(world, kills, tmp_path):
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    for folder, n in ((whole, 0), (cut, kills)):
        folder.mkdir()
        done = run([HERE/'small_runs.py', folder, world, n, 7], env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-2000:]
    hits = int(done.stdout.split()[-1])
    print(f'{hits} of {kills} kills hit a running process')
    assert hits >= kills//2
    a, b = (torch.load(f/'result.pt', weights_only=True) for f in (whole, cut))
    assert a['figures'] == b['figures'] and torch.equal(a['weights'], b['weights']) # to the bit

def test_sigterm_saves_and_ends(tmp_path):
    code = f"import small_runs; small_runs.forever({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, '-c', code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('step 3'): break
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 1 and 'stopped by SIGTERM' in said
    assert checkpoints.Checkpoints(tmp_path, {}).folder.is_dir() and list((tmp_path/'checkpoints').glob('step_*.json'))

def test_a_full_disk(tmp_path, monkeypatch):
    small_runs_config = small_runs.config(steps=6)
    def full(self, data): raise OSError(errno.ENOSPC, 'No space left on device')
    def fill(step, row, average):
        if step == 3: monkeypatch.setattr(checkpoints._Hashed, 'write', full)
    with pytest.raises(OSError, match='No space left.*newest whole one is of step 2'): distill(small_runs.teacher(), small_runs.store(), small_runs_config, folder=tmp_path, callback=fill)
    monkeypatch.undo()
    assert not list((tmp_path/'checkpoints').glob('.*.tmp'))
    again = small_runs.result(*distill(small_runs.teacher(), small_runs.store(), small_runs_config, folder=tmp_path, resume='must'))
    whole = small_runs.result(*distill(small_runs.teacher(), small_runs.store(), small_runs_config))
    assert again[0] == whole[0] and torch.equal(again[1], whole[1])

def test_a_loss_that_is_no_number(tmp_path):
    store = small_runs.store()
    draw, calls = store.draw, []
    def spoil(label, n, generator): calls.append(label); return draw(label, n, generator)*(float('nan') if len(calls) > 14 else 1)
    store.draw = spoil
    with pytest.raises(FloatingPointError, match='step 4: the loss is nan.*last checkpoint is of step 2'): distill(small_runs.teacher(), store, small_runs.config(steps=6), folder=tmp_path)
    distill(small_runs.teacher(), small_runs.store(), small_runs.config(steps=6), folder=tmp_path, resume='must')

def test_latents_that_go_missing(tmp_path):
    store = small_runs.store()
    draw, calls = store.draw, []
    def lose(label, n, generator):
        calls.append(label)
        if len(calls) > 14: raise ParameterError('shard 3 is gone')
        return draw(label, n, generator)
    store.draw = lose
    with pytest.raises(ParameterError, match='shard 3 is gone'): distill(small_runs.teacher(), store, small_runs.config(steps=6), folder=tmp_path)
    distill(small_runs.teacher(), small_runs.store(), small_runs.config(steps=6), folder=tmp_path, resume='must')

def test_another_teacher_or_other_latents_are_refused(tmp_path):
    run = lambda teacher, store, **changes: distill(teacher, store, small_runs.config(**changes), folder=tmp_path)
    run(small_runs.teacher(), small_runs.store())
    other = small_runs.teacher()
    with torch.no_grad(): next(p for p in other.parameters() if p.requires_grad).add_(1)
    with pytest.raises(ParameterError, match='holds another run: teacher was'): run(other, small_runs.store())
    fewer = small_runs.store(); fewer.counts[0] -= 1
    with pytest.raises(ParameterError, match='holds another run: latents was'): run(small_runs.teacher(), fewer)
    with pytest.raises(ParameterError, match='holds another run: config.clip was 1.0 and is 2.0'): run(small_runs.teacher(), small_runs.store(), clip=2.)
    run(small_runs.teacher(), small_runs.store(), at_once=4, keep=1, micro_batch=2) # how it is computed may change

# --- wrong input: what is typed, and what is answered
WRONG = [
    ('--model huge', "model='huge': accepted is one of tiny, nano, mini, s, b, l, xl"),
    ('--preset d', "preset='d': accepted is one of a, b, c"),
    ('--seed -1', 'seed=-1: accepted is a whole number from 0'),
    ('--steps -5', 'steps=-5: accepted is a whole number from 0'),
    ('--steps many', "argument --steps: invalid int value: 'many'"),
    ('--stpes 5', 'unrecognized arguments: --stpes 5'),
    ('--resume maybe', "resume='maybe': accepted is one of auto, never, must"),
    ('--resume must', 'resume=must: there is no checkpoint in'),
    ('--nproc -1', 'nproc=-1: accepted is a whole number from 0'),
    ('--nproc 3', '3 processes for --n_class=2'),
    ('--nnodes 0', 'nnodes=0: accepted is a whole number from 1'),
    ('--nnodes 2', 'meet at host:port'),
    ('--model xl', '--model=xl: give --latents PATH;'),
    ('--model l', '--model=l: give --teacher PATH, --latents PATH;'),
    ('--model b --latents {d}/latents --autoencoder {d}', '--model=b: give --teacher PATH;'),
    ('--teacher {d}/nothing.pt', "--teacher='{d}/nothing.pt': there is no such file or folder"),
    ('--teacher {d}/text.pt', 'text.pt is not a whole PyTorch checkpoint'),
    ('--teacher {d}/other.safetensors', 'the teacher works on (8, 2, 2)'),
    ('--latents {d}/nothing', "nothing': expected a folder with"),
    ('--latents {d}/latents', 'latents: the shape is (8, 2, 2), the teacher works on (32, 4, 4)'),
    ('--autoencoder {d}/nothing', 'nothing'),
    ('--n_pos 100000', 'n_pos=100000: the smallest class has'),
    ('--n_pos -1', 'n_pos=-1: accepted is a whole number from 0'),
    ('--n_class 11', 'n_class=11: there are 10 classes'),
    ('--n_neg 1 --n_extra_neg 0', 'needs another one to be repelled by'),
    ('--n_extra_neg -2', 'n_extra_neg=-2: accepted is a whole number from -1'),
    ('--changes n_ngeg=3', "'n_ngeg=3' is not understood"),
    ('--changes drift.tau=1', "'drift.tau=1' is not understood"),
    ('--changes drift.temperatures=(0,)', 'temperatures=0: accepted is a number above 0'),
    ('--changes drift.normalisation=l2', "normalisation='l2': accepted is one of unit, rms, none"),
    ('--changes drift.scale=raw', "scope='class' with scale='raw'"),
    ('--changes lr=fast', "lr='fast': accepted are two numbers from 0"),
    ('--changes clip=0', 'clip=0: accepted is a number above 0'),
    ('--changes ema=(1.5,10)', 'a decay must be below 1'),
    ('--changes precision=float16', "precision='float16': accepted is one of float32, bfloat16"),
    ('--changes sharding=zero', "sharding='zero': accepted is one of ddp, fsdp"),
    ('--changes micro_batch=-1', 'micro_batch=-1: accepted is a whole number from 0'),
    ('--changes at_once=0', 'at_once=0: accepted is a whole number from 1'),
    ('--monitor_every -2', 'monitor_every=-2: accepted is a whole number from -1'),
    ('--stop_above -1', 'stop_above=-1.0: accepted is a number from 0'),
    ('--dry_run=2', '--dry_run=2: accepted is one of 0, 1'),
    ('--dry_run 2', 'unrecognized arguments: 2'),
    ('--out /proc/nowhere', "out='/proc/nowhere': nothing can be written there"),
    ('--out {d}/text.pt', 'nothing can be written there'),
]

@pytest.fixture(scope='module')
def wrong_files(tmp_path_factory):
    from drift_rae.flow import save_teacher
    from drift_rae.worlds.latents import save_latents
    folder = tmp_path_factory.mktemp('wrong')
    (folder/'text.pt').write_text('not a checkpoint')
    save_teacher(folder/'other.safetensors', small_runs.teacher(torch.float32))
    save_latents(small_runs.store(), folder/'latents', {})
    return folder

@pytest.mark.parametrize('typed, answer', WRONG, ids=lambda x: x[:30].replace('/', '_'))
def test_wrong_input_is_one_sentence_and_exit_code_1(typed, answer, wrong_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = typed.format(d=wrong_files).split()
    if '--nproc' in words and '3' in words: words += ['--n_class', '2']
    with pytest.raises(SystemExit) as e: main(words)
    said = capsys.readouterr().err
    usage = answer.startswith(('argument', 'unrecognized')) # of the parser, after a list of the options
    assert e.value.code == (2 if usage else 1) and answer.format(d=wrong_files) in said, said
    assert usage or len(said.strip().splitlines()) == 1
    assert not list(tmp_path.rglob('*.pt')) # no work was done

def test_the_program_runs(tmp_path, capsys):
    main(f'--out {tmp_path} --changes n_class=2 --n_pos 8 --n_neg 4 --n_extra_neg 4 --steps 4 --monitor_every 2'.split())
    assert {'generator.safetensors', 'generator.json', 'log.csv', 'monitor.json', 'sheets', 'checkpoints'} <= {p.name for p in tmp_path.iterdir()}
    assert load_generator(tmp_path).sample([3]).shape == (1, 3, 16, 16)
    assert [r['step'] for r in json.loads((tmp_path/'monitor.json').read_text())] == [1, 3]

def test_two_runs_cannot_share_a_folder(tmp_path):
    def second(step, row, average): distill(small_runs.teacher(), small_runs.store(), small_runs.config(), folder=tmp_path)
    with pytest.raises(ParameterError, match='another run is writing there'): distill(small_runs.teacher(), small_runs.store(), small_runs.config(), folder=tmp_path, callback=second)

def test_torchrun_runs_it_on_two_processes(tmp_path):
    words = f'-m torch.distributed.run --standalone --nproc-per-node 2 -m drift_rae.distill --out {tmp_path} --n_class 2 --n_pos 8 --n_neg 4 --n_extra_neg 4 --steps 3'.split()
    done = subprocess.run([sys.executable, *words], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path/'alone'
    start(out=str(alone), n_class=2, n_pos=8, n_neg=4, n_extra_neg=4, steps=3)
    a, b = (load_generator(f).model.state_dict() for f in (tmp_path, alone))
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0)
