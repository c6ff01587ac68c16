"Several readers: the same batches, in order; stores in 8 bits; a teacher's batches read ahead; the time of waiting is in the table"
import csv, threading, time
from dataclasses import replace
import pytest, torch
from drift_rae.distill import distill
from drift_rae.engine.parameters import ParameterError
from drift_rae.flow import FlowConfig, train_teacher
from drift_rae.worlds.bits import from_file, to_file
from drift_rae.worlds.latents import LatentStore, open_latents, prefetch, save_latents
from drift_rae.worlds.reading import bench_store
import small_runs

def test_order_whatever_the_readers_do():
    "Later items are ready first, and are handed over last"
    def prepare(i): time.sleep(.02 if i % 3 == 0 else 0); return i
    for readers in (1, 2, 7): assert list(prefetch(prepare, range(20), readers=readers)) == list(range(20))
    assert not [t for t in threading.enumerate() if t.name.startswith('prefetch')]

def test_a_run_is_the_same_for_any_number_of_readers(tmp_path):
    runs = [small_runs.result(*distill(small_runs.teacher(), small_runs.store(), small_runs.config(readers=n))) for n in (1, 2, 5)]
    for figures, weights in runs[1:]: assert figures == runs[0][0] and torch.equal(weights, runs[0][1])

def test_the_table_says_how_long_a_step_waits(tmp_path):
    store = small_runs.store()
    draw, pause = store.draw, .2
    def slow(label, n, generator): time.sleep(pause); return draw(label, n, generator)
    store.draw = slow
    _, rows = distill(small_runs.teacher(), store, small_runs.config(), folder=tmp_path)
    assert all(r['seconds_waiting'] > .02 for r in rows) # four classes of 200 ms each, less what a busy machine computes meanwhile
    assert float(list(csv.DictReader(open(tmp_path/'log.csv')))[-1]['seconds_waiting']) == rows[-1]['seconds_waiting']
    pause = .05
    _, rows = distill(small_runs.teacher(), store, small_runs.config(readers=16, steps=12))
    assert sum(r['seconds_waiting'] for r in rows[-4:]) < 4*.1

def test_a_store_in_8_bits(tmp_path):
    x = torch.randn(30, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    save_latents(LatentStore(x, [10, 0, 20]), tmp_path, dict(made='here'), 'int8', shard_bytes=7*(8*16 + 64))
    rounded = from_file(to_file(x, 'int8'), 'int8', x.shape[1:])
    for mapped in (False, True):
        store = open_latents(tmp_path, dtype=None, mapped=mapped)
        index = torch.tensor([29, 3, 3, 0])
        assert len(store.latents.table) == 5 and torch.equal(store.rows(index), rounded[index])
        assert torch.equal(open_latents(tmp_path, mapped=mapped).rows(index), rounded[index].float())
    with pytest.raises(ParameterError, match='NaN or infinity'): to_file(x/0, 'int8')

def test_a_teachers_batches_ahead(tmp_path):
    "The same for one reader and three, also after a stop; another run than without"
    flow = replace(FlowConfig.preset('tiny'), steps=6, batch=8)
    store = small_runs.store()
    config = dict(input_size=2, in_channels=8, hidden_size=[16, 24], depth=[2, 1], num_heads=[2, 2], num_classes=small_runs.CLASSES)
    losses = {n: train_teacher(store, config=config, flow=replace(flow, readers=n))[1] for n in (0, 1, 3)}
    assert losses[1] == losses[3] != losses[0]
    half = train_teacher(store, config=config, flow=replace(flow, readers=2, precision='bfloat16'))[1]
    assert half == pytest.approx(losses[1], rel=.02) and half != losses[1]

def test_a_store_is_measured(tmp_path):
    save_latents(small_runs.store(), tmp_path, dict(made='here'), 'float16')
    found = bench_store(str(tmp_path), small_runs.config(), 'tiny', step_seconds=1e3, readers=(1, 3), seconds=.2)
    assert [m['readers'] for m in found['measured']] == [1, 3] and 'fast enough' in found['advice']
    with pytest.raises(ParameterError, match='has 6 classes'): bench_store(str(tmp_path), small_runs.config(n_class=7, n_pos=5), 'tiny')
    with pytest.raises(ParameterError, match='21 positives of a class are needed'): bench_store(str(tmp_path), small_runs.config(n_pos=21), 'tiny')
