"The teacher at its best: choices before what is reported, each measurement once, and the measurements themselves, small"
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import drift_rae.best_teacher as best
from drift_rae.distill import DistillConfig
from drift_rae.flow import load_teacher
from drift_rae.teacher_student import SEEDS, Setup


@pytest.fixture
def kept(monkeypatch):
    "Measurements in a dict in place of files, and the order in which they were made"
    found = SimpleNamespace(files={}, made=[])
    def stored(name, run, files, seed, **about):
        key = name, seed, json.dumps(about, sort_keys=True)
        if key not in found.files and run:
            found.made.append((name, seed))
            found.files[key] = run()
        return found.files.get(key)
    monkeypatch.setattr(best, 'stored_measurement', stored)
    return found


def figures(fd): return dict(first=dict(fd=fd), second=dict(fd=fd), spread=1.)


def test_choices_come_first_and_nothing_is_made_twice(kept, monkeypatch):
    trainings, students = [], []
    def student(setup, teacher, decay, seed):
        students.append((teacher, decay, seed))
        return {'student': figures(1.1 + .01*teacher + .001*seed), **{best.way_name(*w): figures(1.) for w in (best.PLAIN, best.chosen_way())}}
    for name, value in dict(
            trained=lambda seed, decays: trainings.append(seed) or dict.fromkeys(decays), _setup=object, _student=student,
            _by_decay=lambda setup, noises: {f'{d:g}': figures(1 + abs(d - .99)) for d in best.DECAYS},
            _by_way=lambda setup, noises: {best.way_name(*w): figures(2 - w[1]) for w in best.SAMPLING}).items():
        monkeypatch.setattr(best, name, value)
    assert best.best_findings() == [] and best.chosen_way() is None
    best.rebuild_best(1)
    assert trainings == [100, 0, 1, 2]
    assert [n for n, _ in kept.made[:4]] == ['best teacher, decay']*2 + ['best teacher, sampling']*2
    assert (best.chosen_decay(), best.chosen_way()) == (.99, (24, 1.25))
    assert sorted(students) == [(t, d, s) for t in range(3) for d in (.99, .999) for s in range(5)]
    assert [f.word for f in best.best_findings()] == ['reproduced']*2
    best.rebuild_best(1)
    assert len(kept.made) == 4 + 30 and len(trainings) == 4


def test_the_measurements(kept, monkeypatch):
    setup = Setup(per_class=2)
    monkeypatch.setattr(best, 'trained', lambda seed, decays: {d: load_teacher() for d in decays})
    monkeypatch.setattr(best, 'DECAYS', (0., .999))
    monkeypatch.setattr(best, 'SAMPLING', ((2, 1.), (2, 1.5)))
    monkeypatch.setattr(best, 'PLAIN', (2, 1.))
    preset = DistillConfig.preset('tiny', 'c')
    monkeypatch.setattr(best, 'DistillConfig', SimpleNamespace(preset=lambda *a: replace(preset, steps=2, n_pos=16, n_neg=4, n_extra_neg=8)))
    for noises in best.CHOICE['noises']:
        decays = best.decay_figures(noises, setup)
        assert decays['0'] == decays['0.999'] # the same network here
    for noises in best.CHOICE['noises']: assert set(best.way_figures(noises, setup)) == {'2, guidance 1', '2, guidance 1.5'}
    found = best.student_figures(0, best.chosen_decay(), 1, setup)
    assert {'student', '2, guidance 1'} <= set(found) and found['student']['first']['fd'] > 0
    again = best._sampled(setup, load_teacher(), (2, 1.), SEEDS[1])
    assert found['2, guidance 1'] == again # on the student's noises
