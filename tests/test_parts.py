"Checkpoints of which each rank writes and reads its part (FSDP, two processes, gloo): kills in between, other numbers of processes; three processes continue to the bit"
import json, os
from pathlib import Path
import pytest
from programs import run

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent
PARTS = ['step_0000002.0of2.pt', 'step_0000002.1of2.pt', 'step_0000002.json']

def program(folder, *kinds):
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}:{HERE}', 'OMP_NUM_THREADS': '1'}
    done = run(['-m', 'part_runs', folder, *kinds], HERE, env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)

@pytest.fixture(scope='module')
def found(tmp_path_factory): return program(tmp_path_factory.mktemp('parts'), 'ddp')

@pytest.fixture(scope='module')
def every(tmp_path_factory): return program(tmp_path_factory.mktemp('every'), 'every', 'fsdp')

def same_after_a_kill(case, rank):
    left = [n for n in case['left'] if not n.startswith('.')]
    assert left[:3] == PARTS and 'step_0000004.json' not in left and f'step_0000004.{rank}of2.pt' not in left
    assert any(n.startswith(f'.step_0000004.{rank}of2.pt') for n in case['left']), 'it was killed in the middle of its file'
    assert case['same'], 'continued by two, it ends where an undisturbed run ends, to the bit'

def test_a_kill_within_a_part_leaves_the_checkpoint_before(found): same_after_a_kill(found['part 1'], 1)

def test_a_kill_between_the_parts_and_their_description(found):
    case = found['description 0']
    assert case['left'] == [*PARTS, 'step_0000004.0of2.pt', 'step_0000004.1of2.pt'] and case['same']

@pytest.mark.parametrize('case', ['part 1', 'description 0'])
def test_nothing_half_written_stays(found, case):
    assert found[case]['after'] == [n.replace('0000002', f'000000{s}') for s in '246' for n in PARTS]

def test_each_rank_holds_its_part_only(found):
    parts, whole = found['bytes']
    assert sum(parts) <= 1.05*whole and max(parts) < .65*whole # a layer of 5 x 5 is 3 + 2 rows; counters of the optimiser are on both

@pytest.mark.parametrize('layout', ['fsdp 2', 'fsdp 3', 'ddp 1'])
def test_any_number_of_processes_loads_the_same_bits(found, layout): assert found['loads'][layout] == [True, [dict(loss=.5)]]

def test_a_damaged_part_is_named_and_the_checkpoint_before_is_used(found): assert found['damaged'] == [True, 1]

def test_folders_that_are_not_shared_are_found_out_before_the_first_step(found):
    for said in found['apart at the start']: assert 'is another folder on' in said and 'with sharding=fsdp all machines have to share it' in said

def test_three_processes_continue_to_the_bit(found): assert found['three'] == dict(ddp=True)

@pytest.mark.slow
def test_the_other_cases(every):
    "A kill of rank 0, threads, a whole checkpoint that is spread, DDP on two, a folder that stops being shared, three processes with FSDP"
    same_after_a_kill(every['part 0'], 0)
    assert every['thread'] and every['fsdp after ddp'] and every['loads']['ddp 2'] == [True, [dict(loss=.5)]]
    for said in every['apart']: assert 'which rank 1 has written, is not seen by rank 0: with sharding=fsdp all machines have to share' in said
    assert every['three'] == dict(fsdp=True)
