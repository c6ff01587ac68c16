"tests/gpu_day.py, with tiny shapes on the CPU: every part runs, the file is whole after every measurement, and a cut or a failure leaves what is done"
import json
import pytest, torch
import gpu_day

@pytest.fixture(scope='module')
def results(tmp_path_factory): return gpu_day.main(['--device', 'cpu', '--small', '--minutes', '250', '--out', str(tmp_path_factory.mktemp('day')/'day.json')])

def test_every_part_runs(results):
    assert list(results['parts']) == list('abcdef')
    for letter, part in results['parts'].items(): assert part['state'] == 'done', (letter, part)
    a, b, c, d, e, f = results['parts'].values()
    assert a['equal']['c']['within'] and a['equal']['a']['within'] and a['speed']['ratio'] > 0
    assert 0 < b['tiny']['share'] and {'generate', 'field', 'backward', 'optimiser'} <= set(b['tiny']['split'])
    assert b['aim']['reached'] is False # the CPU proves nothing
    assert c['miniature']['equal_to_the_bit'] and d['agreement']['within']
    assert e['sampling, tiny']['one_step'] > 0 and e['metrics']['seconds'] > 0
    assert f['cpu']['fd'] > 0

def test_a_cut_leaves_what_is_done(tmp_path):
    "The file after each measurement is a whole JSON; a measurement that fails is noted, and the next part runs"
    day, seen = gpu_day.Day(tmp_path/'day.json', 'cpu', True), []
    def read(): return json.loads((tmp_path/'day.json').read_text())['parts']
    def one(day):
        "first"
        day.measure('good', lambda: 1)
        seen.append(read()['a'])
        day.measure('bad', lambda: 1/0)
        day.measure('full', lambda: (_ for _ in ()).throw(torch.OutOfMemoryError('CUDA out of memory')))
        day.end = 0
        day.measure('late', lambda: 1)
    def two(day):
        "second"
        raise RuntimeError('nothing here')
    day.run('a', one); day.run('b', two)
    assert seen[0]['good'] == 1 and seen[0]['state'] == 'running'
    parts = read()
    assert parts['a']['bad']['failed'].startswith('ZeroDivisionError') and 'out of memory' in parts['a']['full']['failed']
    assert parts['a']['late'] == dict(left_out='no time left') and parts['a']['state'] == 'failed' and parts['b']['failed'] == 'RuntimeError: nothing here'

def test_the_times_fit_into_25_minutes(): assert sum(gpu_day.SECONDS.values()) <= 25*60

def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(SystemExit, match='no GPU here'): gpu_day.main(['--out', str(tmp_path/'x.json')])
    with pytest.raises(SystemExit, match='needs --small'): gpu_day.main(['--device', 'cpu', '--out', str(tmp_path/'x.json')])
