"The tables: cached results and their recipes, what counts as missing, the statistics, and the commands for ImageNet"
import json, math, shlex
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from drift_rae.parts.bench import CHECK, recipe, recipe_hash, result_path, short_digest
from drift_rae.ablations import ROWS, main, missing, stored
from drift_rae.metrics.verdicts import Claim, decide, detectable, holm, verdicts
from drift_rae.imagenet.commands import GUIDED, command, commands, evaluations, meant, parse
import programs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/'nbs'/'results'/'ablations'

def a_result(row, seed, fd):
    return dict(table=row.table, row=row.name, hash=recipe_hash(row.config(), row.teacher), seed=seed, recipe=recipe(row.config(), row.teacher), figures=dict(fd=fd))

def put(folder, row, seed, **changes):
    path = result_path(row, seed, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**a_result(row, seed, 1.), **changes}))
    return path

B = next(r for r in ROWS if (r.table, r.name) == ('3 short', 'B'))

def numbers(value):
    "All numbers in nested dictionaries and lists"
    if isinstance(value, (dict, list)): return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []

def test_stored_results_are_what_their_names_say():
    files = sorted(RESULTS.glob('*/*.json'))
    assert files
    for path in files:
        d = json.loads(path.read_text())
        assert path.stem.endswith(f"_{d['hash']}_{d['seed']}") and d['versions']['torch']
        assert path.stat().st_size < 20_000
        if path.parent.name == 'claims': continue # measurements without a training run: tests/test_claims.py
        assert short_digest(d['recipe'])[:8] == d['hash']
        if path.parent.name in ('guided', 'several-steps'): # several measurements of one run, which has its own record of seconds
            assert d['figures'] and all(map(math.isfinite, numbers(d['figures']))), path.name
            continue
        assert d.get('noise_seed', 0) in (0, d['recipe']['evaluation']['noise_seed'] + d['seed'])
        assert d['seconds']['cpu'] >= 0 and math.isfinite(d['figures']['fd'])

def test_a_result_is_used_by_all_tables_that_have_its_row(tmp_path):
    put(tmp_path, B, 0)
    todo = {(r.table, r.name) for r, seed in missing(('3 short', '5 short', '7'), 1, tmp_path)}
    assert not todo & {('3 short', 'B'), ('5', 'both'), ('7', '64, 64+0')} and ('3 short', 'C') in todo
    assert len(missing(('3 short',), 2, tmp_path)) == 5

def test_each_recipe_is_missing_once_and_with_its_curve(tmp_path):
    todo = missing((), 1, tmp_path)
    names = [recipe_hash(r.config(), r.teacher) for r, _ in todo]
    assert len(names) == len(set(names)) == len({recipe_hash(r.config(), r.teacher) for r in ROWS})
    assert all(r.curve for r, _ in todo if not r.teacher and r.config() == B.config())

def test_another_recipe_and_damaged_files_are_left_out(tmp_path):
    good, other = put(tmp_path, B, 0), put(tmp_path, B, 1, recipe=dict(recipe(B.config()), steps=1))
    moved, broken = good.with_name('b_00000000_0.json'), good.with_name('b_half_2.json')
    moved.write_text(good.read_text()); broken.write_text(good.read_text()[:50])
    use, left = stored(tmp_path)
    assert list(use) == [(recipe_hash(B.config()), 0)] and set(left) == {other, moved, broken}

def test_unknown_tables_are_refused(capsys):
    with pytest.raises(SystemExit): main(['--tables', '33'])
    assert "tables='33': accepted are 3, 5" in capsys.readouterr().err

def test_the_command_line_has_nothing_to_do_where_everything_is_there(tmp_path, capsys):
    for name in ('A', 'B', 'C'): put(tmp_path, next(r for r in ROWS if (r.table, r.name) == ('3', name)), 0)
    main(['--tables', '3', '--seeds', '1', '--folder', str(tmp_path)])
    assert capsys.readouterr().out == ''

def test_another_teacher_is_trained_once(tmp_path, monkeypatch):
    from drift_rae.parts import bench
    from drift_rae.flow import load_teacher
    calls = []
    monkeypatch.setattr(bench, 'train_teacher', lambda store, seed: calls.append(seed) or (load_teacher(), [1., .5]))
    a, b = (bench.flow_teacher(3, tmp_path, store='latents') for _ in range(2))
    assert calls == [3] and a.shift == b.shift == load_teacher().shift
    assert all((p == q).all() for p, q in zip(a.parameters(), b.parameters()))

def test_the_check_is_stored(): assert result_path(CHECK[0], 0, RESULTS, CHECK[1]).is_file()

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)

@given(p_values)
def test_holm(p):
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, len(p)*np.array(p))).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    for level in (.01, .05): # the step-down procedure as it is defined
        order, rejected = np.argsort(p), set()
        for k, i in enumerate(order):
            if p[i] > level/(len(p) - k): break
            rejected.add(i)
        assert rejected >= {i for i in range(len(p)) if adjusted[i] < level}

@settings(max_examples=50)
@given(st.floats(-.3, .3), st.integers(0, 1000), st.sampled_from(['better', 'worse', 'equal']))
def test_a_verdict_has_the_sign_of_what_was_measured(shift, seed, says):
    d = shift + .005*np.random.default_rng(seed).standard_normal(5)
    verdict, = verdicts([Claim('x', says, 'y')], [d])
    if says == 'equal': assert verdict != 'reproduced' or abs(d.mean()) < math.log(1.02)
    else: assert verdict != 'reproduced' or (d.mean() if says == 'worse' else -d.mean()) >= math.log(1.02)
    opposite = dict(better='worse', worse='better').get(says)
    if opposite: assert verdicts([Claim('x', opposite, 'y')], [-d]) == [verdict]

def test_more_claims_make_a_verdict_harder():
    d = .03 + .02*np.array([-1, 0, 1, .5, -.5])
    claim = Claim('x', 'worse', 'y')
    assert verdicts([claim], [d]) == ['reproduced']
    assert verdicts([claim]*12, [d]*12) == ['undecided at this scale']*12

def test_the_detectable_difference_is_found_four_times_of_five():
    "in a table of four claims, by Holm's procedure, where the three others are about nothing"
    rng, claims = np.random.default_rng(0), [Claim(str(i), 'worse', 'y') for i in range(4)]
    difference, found = detectable(.02, 5, 4), 0
    for _ in range(400):
        d = rng.normal(0, .02, (4, 5))
        d[0] += difference
        found += verdicts(claims, list(d))[0] == 'reproduced'
    assert .74 <= found/400 <= .88 # .8, three standard errors below; Holm finds a little more than the first step alone

@settings(max_examples=50, deadline=None)
@given(st.floats(-.1, .1), st.integers(0, 1000), st.integers(2, 6))
def test_numbers_of_a_verdict_belong_together(shift, seed, n):
    d = shift + .01*np.random.default_rng(seed).standard_normal((3, n))
    found = decide([Claim('x', says, 'y') for says in ('better', 'worse', 'equal')], list(d))
    for v in found:
        assert v.family == 3 and 0 <= v.holds <= 1 and 0 <= v.fails <= 1
        (low, high), (joint_low, joint_high) = v.interval, v.joint_interval
        assert joint_low <= low <= v.ratios.mean() <= high <= joint_high
        assert v.detectable >= math.log(1.02)
        if v.word == 'reproduced': assert v.holds < .025
        if v.word == 'not reproduced': assert v.fails < .025

def test_every_command_means_its_row():
    found = commands()
    assert {c.table for c in found} == {'3', '4', '5', '5 original', '6', '7', '9', 'beyond the paper'}
    assert all(meant(parse(c.text)[1]) == c.config for c in found)
    assert len({c.text.split('-p out ')[1] for c in found}) == len(found)

def test_every_row_beyond_the_paper_is_evaluated_by_a_command():
    outs, found = {parse(c.text)[1]['out'] for c in commands()}, evaluations(seed=3)
    assert list(found) == [row for row, *_ in GUIDED]
    for (_, run, w, weak), text in zip(GUIDED, found.values()):
        notebook, given = parse(text)
        assert (notebook, given['generator'], given.get('extrapolation', 0), given.get('weak', ''), given['seed']) == ('nbs/07_evaluate.ipynb', run, w, weak, 3)
        assert run in outs and (not weak.removeprefix('weights:').startswith('runs/') or weak.removeprefix('weights:').removesuffix('/earlier') in outs)

def test_the_commands_of_table_9_start_without_a_teacher():
    found = {c.row: (c, parse(c.text)[1]) for c in commands() if c.table == '9'}
    assert set(found) == {'SD-VAE', 'RAE', 'RAE, decode-encode'} and all(given['teacher'] == 'fresh' for _, given in found.values())
    assert [c.config.decode_encode for c, _ in found.values()] == [False, False, True]
    assert found['SD-VAE'][1]['autoencoder'] == 'stabilityai/sd-vae-ft-mse' and found['SD-VAE'][1]['latents'] != found['RAE'][1]['latents']
    assert found['RAE, decode-encode'][0].hours > 1.5*found['RAE'][0].hours == 1.5*next(c for c in commands() if (c.table, c.row) == ('3', 'C')).hours

def test_papermill_runs_a_command_dry(tmp_path):
    "one command as it is printed, the miniature in place of ImageNet"
    row = next(r for r in ROWS if (r.table, r.name) == ('5', 'neither'))
    text = command(row).text.replace('-p model xl', '-p model tiny').split(' -p nproc')[0]
    words = shlex.split(text.replace('nbs/06_distill.ipynb', str(ROOT/'nbs/06_distill.ipynb')))
    done = programs.run(['-m', 'papermill', *words[1:], '-p', 'dry_run', '1', '--no-progress-bar'], tmp_path, programs.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    made = (tmp_path/words[2]).read_text()
    assert 'dry run: 600 steps of 4 classes x (32 + 0) generated and 32 real samples are ready to start' in made
    assert '`drift.y_softmax` | True |' in made and '`drift.perturbation` | off |' in made

@settings(max_examples=60, deadline=None)
@given(st.floats(-.1, .1), st.floats(.001, .05), st.integers(2, 8), st.integers(1, 6), st.sampled_from(['better', 'worse', 'equal']))
def test_chances_of_verdicts_add_up(difference, spread, seeds, family, says):
    from drift_rae.metrics.verdicts import power, verdict_chances
    chances = verdict_chances(difference, says, spread, seeds, family)
    assert math.isclose(sum(chances.values()), 1, abs_tol=1e-9) and min(chances.values()) > -1e-9
    if says != 'equal': assert chances['reproduced'] == power(difference, spread, seeds, family)
    else: assert math.isclose(chances['not reproduced'], verdict_chances(-difference, says, spread, seeds, family)['not reproduced'], abs_tol=1e-9)

def test_equal_without_power_has_no_verdict_unless_a_difference_is_found():
    from drift_rae.metrics.verdicts import NO_POWER
    wide, narrow = .02*np.array([-1, 0, 1, .5, -.5]), .001*np.array([-1, 0, 1, .5, -.5])
    claim = [Claim('x', 'equal', 'y')]
    assert verdicts(claim, [wide]) == [NO_POWER] and verdicts(claim, [narrow]) == ['reproduced']
    assert verdicts(claim, [wide + .2]) == ['not reproduced']
    assert verdicts([Claim('x', 'worse', 'y')], [3*wide]) == ['undecided at this scale'] # others keep their word

def test_the_readings_are_rows_and_the_old_one_keeps_its_results():
    from drift_rae.ablations import rows_of
    old, new = rows_of('5 square'), rows_of('5 original')
    use, _ = stored(RESULTS)
    for name in ('y-softmax removed', 'both'):
        assert old[name].config().drift.without_y == 'square' and new[name].config().drift.without_y == 'auto'
        assert recipe_hash(old[name].config()) != recipe_hash(new[name].config())
        assert sum(h == recipe_hash(old[name].config()) for h, _ in use) == 5
    assert {r.config().drift.without_y for r in rows_of('5 readings').values()} == {'auto', 'factor', 'floor', 'plain', 'square'}

# rows at their best

def a_run(row, rate, seed, folder, fd):
    "A stored run of the search or of what is reported, with invented distances: average -> epoch -> FD"
    from drift_rae import tuned
    made = dict(noise_seed=10_000 + seed, rate=rate, reads={a: {str(e): dict(fd=fd + .01*(a == 'slow') + .001*e) for e in tuned.EPOCHS} for a in tuned.AVERAGES},
                figures=dict(fd=fd), seconds=dict(cpu=1., evaluation=1.), clipped=1.)
    from drift_rae.parts.bench import cached
    per_class = tuned.SEARCH_IMAGES if seed == tuned.SEARCH_SEED else tuned.FRESH_IMAGES
    return cached('tuned', f'{row.table} {row.name} x{rate:g}', seed, tuned._what(row, rate, per_class), lambda: made, folder)

def test_the_search_ends_before_the_report_and_widens_at_an_edge(tmp_path):
    from drift_rae import tuned
    from drift_rae.ablations import rows_of
    rows = rows_of('3')
    def jobs(): return (job for jobs in tuned._rounds(['3'], (10, 11), tmp_path) for job in jobs)
    def todo(): return [(row.name, rate, seed) for row, rate, seed in jobs()] if complete() else None
    def complete(): return all(tuned.best_point(tuned.searched(r, tmp_path)) for r in rows.values())
    order = []
    for row, rate, seed in jobs():
        order.append((row.name, rate, seed))
        a_run(row, rate, seed, tmp_path, fd={.25: 2.5, .5: 2., 1: 1.5, 2: 1.2, 4: 1.3}[rate] if row.name != 'B' else 1.4 + abs(rate - 1))
    assert order[:9] == [(n, rate, 100) for rate in (1, 2, .5) for n in 'ABC'] # in rounds
    assert order[9:11] == [('A', 4, 100), ('C', 4, 100)] # the best rate of B is inside
    assert order[11:17] == [(n, {'A': 2, 'B': 1, 'C': 2}[n], seed) for seed in (10, 11) for n in 'ABC']
    assert order[17:] == [(n, 1, seed) for seed in (10, 11) for n in 'AC'] # the common setting; B is best there
    assert complete() and todo() == []
    assert tuned.best_point(tuned.searched(rows['A'], tmp_path)) == (2, 'fast', 4)
    v = tuned.read_at('3', 'best', tmp_path)[Claim('B', 'better', 'A')]
    assert len(v.ratios) == 2 and math.isclose(v.ratios[0], math.log(1.404/1.204))
    assert tuned.read_text(tuned.read_at('6', 'best', tmp_path).get(Claim('128+128', 'equal', '64+192'))) == 'not run'
    assert tuned.read_at('9') == {}
    assert tuned.tuned_fd(rows['A'], 16, tmp_path) == {10: 1.216, 11: 1.216}

def test_the_sign_at_one_rate(tmp_path):
    "It needs all five seeds, both averages and each stopping time from 8 epochs on; a row's best rate does not matter"
    from drift_rae import tuned
    from drift_rae.ablations import rows_of
    from drift_rae.common import common_figures, common_ratios, common_sign
    rows, better, worse = rows_of('3'), Claim('B', 'better', 'A'), Claim('B', 'worse', 'A')
    for seed in tuned.FRESH_SEEDS:
        assert common_sign('3', better, tmp_path) == ''
        a_run(rows['A'], 1, seed, tmp_path, 1.4)
        a_run(rows['B'], 2, seed, tmp_path, 1.6) # at another rate: not looked at
        a_run(rows['B'], 1, seed, tmp_path, 1.3)
    assert (common_sign('3', better, tmp_path), common_sign('3', worse, tmp_path)) == ('paper', 'opposite')
    assert common_figures(rows['A'], 'slow', 8, folder=tmp_path) == dict.fromkeys(tuned.FRESH_SEEDS, 1.4 + .01 + .008)
    assert common_ratios('3', better, 'fast', 16, tmp_path) == pytest.approx([math.log(1.316/1.416)]*5)
    path = next(p for p in tmp_path.rglob('*.json') if '3-b-x1' in p.name and p.name.endswith('_10.json'))
    run = json.loads(path.read_text())
    run['reads']['slow']['12']['fd'] = 9. # one reading of one average is enough to turn a mean
    path.write_text(json.dumps(run))
    assert common_sign('3', better, tmp_path) == 'changes'
    assert common_sign('6', Claim('128+128', 'equal', '64+192'), tmp_path) == ''

def test_a_reported_seed_is_not_one_of_the_search():
    from drift_rae import tuned
    assert tuned.SEARCH_SEED not in tuned.FRESH_SEEDS and not set(tuned.FRESH_SEEDS) & set(range(5)) and len(tuned.FRESH_SEEDS) >= 5

def test_further_averages_are_the_same_recursion():
    "A second average with the first one's decay is the first one, to the bit"
    import copy
    from drift_rae.distill import distill
    from drift_rae.parts.bench import Bench
    from drift_rae.parts.step import config_for
    bench = Bench()
    other = copy.deepcopy(bench.teacher)
    config = config_for('tiny', 'b', steps=3, n_class=1, n_pos=8, n_neg=8, n_extra_neg=0)
    average, _ = distill(bench.teacher, bench.store, config, also={other: config.ema})
    assert all((p == q).all() for p, q in zip(average.parameters(), other.parameters()))
    with pytest.raises(ValueError, match='also: accepted without a folder'): distill(bench.teacher, bench.store, config, folder='runs/x', also={other: (.9, 1)})

def test_rows_run_at_the_same_time_are_those_run_alone(tmp_path, monkeypatch):
    from small_runs import few_images
    from drift_rae.parts.bench import EVALUATION, Row
    from drift_rae.parts.workers import as_they_end
    monkeypatch.setitem(EVALUATION, 'per_class', 20) # as few_images has it in each worker
    rows = [Row('check', f'{n} steps', (32, 16, 16), f'steps={n}') for n in (2, 3)]
    for n in (1, 2): assert len(list(as_they_end(few_images, [(r, 0, tmp_path/f'{n}') for r in rows], n))) == 2
    for row in rows:
        one, two = (json.loads(result_path(row, 0, tmp_path/f'{n}').read_text()) for n in (1, 2))
        assert one['figures'] == two['figures'] and one['hash'] == two['hash']
