"A finished run stays finished: nothing is made again, nothing is lost, more steps go on where that is possible"
import hashlib, shutil
from pathlib import Path
import pytest
from drift_rae.distill import main, start
from drift_rae.engine.files import RunFolder
from drift_rae.engine.parameters import ParameterError
from drift_rae.imagenet.stage1 import start_stage1
from drift_rae.imagenet.stage2 import start_flow
from programs import run

SMALL = dict(n_class=2, n_pos=8, n_neg=4, n_extra_neg=4, steps=4, nproc=1)
CONSTANT = dict(SMALL, changes='lr=(1e-5,1e-5)')

def content(folder):
    "Name -> digest of every file"
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob('*')) if p.is_file()}

@pytest.fixture(scope='module', autouse=True)
def on_few_latents(few_latents):
    for options in (SMALL, CONSTANT): options['latents'] = few_latents

@pytest.fixture(scope='module')
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished')
    start(out=str(folder), monitor_every=2, **SMALL)
    return folder

@pytest.fixture
def finished(once, tmp_path): return shutil.copytree(once, tmp_path, dirs_exist_ok=True)

@pytest.fixture(scope='module')
def teacher_once(tmp_path_factory, few_latents):
    "A finished training of a teacher: its options, its losses"
    options = dict(out=str(tmp_path_factory.mktemp('teacher')), steps=4, batch=8, samples=20, monitor_every=2, latents=few_latents)
    return options, start_flow(**options)

@pytest.fixture
def teacher(teacher_once, tmp_path):
    options, losses = teacher_once
    return dict(options, out=str(shutil.copytree(options['out'], tmp_path, dirs_exist_ok=True))), losses

def test_the_same_command_changes_nothing(finished, capsys):
    before = content(finished)
    rows = start(out=str(finished), monitor_every=2, **SMALL)
    assert content(finished) == before and len(rows) == 4
    said = capsys.readouterr().out
    assert 'finished' in said and 'generator.safetensors' in said and 'step' not in said.split('finished')[1].split('(')[0]

def test_a_lost_table_of_a_finished_run(finished):
    whole = start(out=str(finished), monitor_every=2, **SMALL)
    (finished/'log.csv').unlink()
    assert start(out=str(finished), monitor_every=2, **SMALL) == whole

def test_another_run_is_refused_and_never_moves_the_old_one_aside(finished):
    with pytest.raises(ParameterError, match='holds another run, finished: seed was 0 and is 1'): start(out=str(finished), seed=1, **SMALL)
    start(out=str(finished), seed=1, resume='never', monitor_every=0, **SMALL)
    former, = (finished/'former').iterdir()
    assert {'done.json', 'generator.safetensors', 'log.csv', 'monitor.json', 'sheets'} <= {p.name for p in former.iterdir()}
    assert not (finished/'monitor.json').exists() and not (finished/'sheets').exists()

@pytest.mark.parametrize('lost', ['done.json', 'generator.safetensors', 'both'])
def test_what_is_missing_at_the_end_is_made_without_training(lost, finished, monkeypatch):
    before = content(finished)
    for name in ('done.json', 'generator.safetensors') if lost == 'both' else (lost,): (finished/name).unlink()
    monkeypatch.setattr('drift_rae.distill.drift_step', None) # no step can be made
    start(out=str(finished), monitor_every=2, **SMALL)
    after = content(finished)
    for name in ('generator.safetensors', 'log.csv', 'monitor.json', 'done.json'): assert after[name] == before[name], name

def test_more_steps_need_a_constant_rate(tmp_path):
    start(out=str(tmp_path/'falls'), monitor_every=0, **SMALL)
    with pytest.raises(ParameterError, match='steps was 4 and is 6 .the learning rate falls.*resume=never'): start(out=str(tmp_path/'falls'), monitor_every=0, **{**SMALL, 'steps': 6})
    start(out=str(tmp_path/'long'), monitor_every=0, **{**CONSTANT, 'steps': 6})
    start(out=str(tmp_path/'both'), monitor_every=0, **CONSTANT)
    rows = start(out=str(tmp_path/'both'), monitor_every=0, **{**CONSTANT, 'steps': 6})
    assert len(rows) == 6
    a, b = (content(tmp_path/f)['generator.safetensors'] for f in ('long', 'both'))
    assert a == b
    with pytest.raises(ParameterError, match='steps was 6 and is 4'): start(out=str(tmp_path/'both'), monitor_every=0, **CONSTANT)

def test_a_killed_runs_temporary_files_are_removed(tmp_path):
    (tmp_path/'checkpoints').mkdir()
    for name in ('.generator.safetensors.12.tmp', 'checkpoints/.step_0000002.pt.34.tmp', 'monitor.json'): (tmp_path/name).write_text('[]')
    start(out=str(tmp_path), monitor_every=0, **SMALL)
    assert not list(tmp_path.rglob('.*.tmp')) and not (tmp_path/'monitor.json').exists()

def test_a_teachers_training_stays_finished(teacher, tmp_path):
    (options, losses), before = teacher, content(tmp_path)
    assert start_flow(**options) == losses and content(tmp_path) == before

def test_a_decoders_training_stays_finished(tmp_path, capsys):
    options = dict(out=str(tmp_path), steps=16, batch=8)
    rows, before = start_stage1(**options), content(tmp_path)
    capsys.readouterr()
    again = start_stage1(**options)
    assert [r['l1'] for r in again] == [r['l1'] for r in rows] and content(tmp_path) == before
    assert 'nothing is made again' in capsys.readouterr().out
    with pytest.raises(ParameterError, match='steps was 16 and is 17'): start_stage1(**{**options, 'steps': 17})

@pytest.mark.parametrize('lost', ['done.json', 'teacher.safetensors'])
def test_the_end_of_a_teachers_training_is_made_again(lost, teacher, tmp_path):
    (options, losses), before = teacher, content(tmp_path)
    (tmp_path/lost).unlink()
    assert start_flow(**options) == losses
    after = content(tmp_path)
    for name in ('teacher.safetensors', 'log.csv', 'done.json'): assert after[name] == before[name], name

def test_torchrun_on_a_finished_run(finished):
    "As a requeued job: exit 0, nothing changes, a message"
    before = content(finished)
    given = [w for k, v in dict(SMALL, nproc=0, monitor_every=2, out=finished).items() for w in (f'--{k}', str(v)) if k != 'nproc']
    done = run(['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'drift_rae.distill', *given])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('nothing is made again') == 1 and content(finished) == before
