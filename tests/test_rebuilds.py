"What `rebuild=1` of 08_ablations to 13_steps runs: all that is missing, in several processes, choices first"
import json
from pathlib import Path
import pytest
import programs
from drift_rae import ablations, from_scratch, guided, steps, trajectories

@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
    "The folder of rebuilt.py, and what it said of two processes, of nothing that is missing, and of one process"
    folder = tmp_path_factory.mktemp('rebuilt')
    done = programs.run([Path(__file__).with_name('rebuilt.py'), folder], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, *(part.splitlines() for part in done.stdout.split('---\n'))

def names(said): return [line.strip() for line in said if line.startswith('    ')]

CLIPPED = ('default', 'reduction_original') # of 08_ablations

@pytest.mark.parametrize('module, rebuild, given', [
    (trajectories, 'rebuild_trajectories', ()), (guided, 'rebuild_guided', ()), (steps, 'rebuild_steps', ()),
    (from_scratch, 'rebuild_scratch', ()), (from_scratch, 'rebuild_from_teacher', ()), (ablations, 'rebuild_clipped', (CLIPPED,))])
def test_nothing_is_missing_in_this_checkout(module, rebuild, given, monkeypatch):
    asked = []
    monkeypatch.setattr(module, 'run_jobs', lambda function, jobs, processes: asked.append(jobs))
    getattr(module, rebuild)(*given)
    assert asked and not any(asked)

def test_what_is_missing_is_named(monkeypatch):
    "The runs of an empty folder of results"
    asked = {}
    for module in (from_scratch, ablations):
        monkeypatch.setattr(module, 'cached', lambda *_: None)
        monkeypatch.setattr(module, 'run_jobs', lambda function, jobs, processes: asked.update(jobs))
    from_scratch.rebuild_from_teacher(2)
    ablations.rebuild_clipped(CLIPPED)
    assert list(asked.values()) == ['from the teacher, seed 0', 'from the teacher, positives too, seed 0', 'from the teacher, seed 1',
                                    'from the teacher, positives too, seed 1', *CLIPPED]

def test_every_run_has_a_line_and_is_made_once(rebuilt):
    _, two, again, _ = rebuilt
    assert len(set(names(two))) == len(names(two)) == 2 + (2 + 4) + (1 + 3) + (2 + 1)
    assert {'matching, VAE, seed 99, rate 0.001', 'choice, all weak sides, seed 12', 'reported, dropout, seed 1', 'student, 4 evaluations, seed 0'} <= set(names(two))
    assert again == []

def test_the_runs_that_choose_end_before_those_that_depend_on_them(rebuilt):
    kinds = [name.split(',')[0] for name in names(rebuilt[1]) if name.startswith(('choice', 'reported'))]
    assert kinds == ['choice']*6 + ['reported']*4

def test_runs_at_the_same_time_have_the_numbers_of_runs_alone(rebuilt):
    def results(folder): return {p.relative_to(folder): json.loads(p.read_text()) for p in folder.glob('results/*/*.json')}
    two, one = (results(rebuilt[0]/name) for name in ('two', 'one'))
    assert len(one) == 2 + 3 and {p.parent.name for p in two} == {'trajectories', 'guided', 'several-steps'}
    for path, result in one.items(): assert result['figures'] == two[path]['figures'], path
