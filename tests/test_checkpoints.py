"Checkpoints that are written in a thread, renamed, on a full disk; a table that was lost; files and links"
import errno, json, os, threading
from pathlib import Path
import pytest, torch
from torch import nn
from drift_rae.engine import checkpoints, files
from drift_rae.engine.checkpoints import Checkpoints
from drift_rae.engine.files import atomic
from drift_rae.engine.training import train
from drift_rae.parts.monitor import Monitor

def run(folder, steps=6, callback=None, resume='auto', **options):
    "A line fitted in a few steps, with a checkpoint after every second one; its weights and rows"
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    def step_fn(step, network):
        loss = network(torch.randn(8, 4)).square().mean()
        loss.backward()
        return dict(loss=loss.item())
    rows = train(model, step_fn, steps=steps, lr=(.1, .1), resume=resume, callback=callback,
                 checkpoints=Checkpoints(folder/'checkpoints', dict(steps=steps), every=2, **options),
                 log=folder/'log.csv')
    return model.weight.detach(), [r['loss'] for r in rows]

def stop_at_3(step, row): return 'enough' if step == 3 else None

def stopped(folder):
    with pytest.raises(RuntimeError, match='enough'): run(folder, callback=stop_at_3)

@pytest.fixture
def in_a_thread(monkeypatch): monkeypatch.setattr(checkpoints, 'AT_ONCE', 0)

def test_a_thread_gives_the_same_run(tmp_path, in_a_thread):
    whole = run(tmp_path/'whole')
    stopped(tmp_path/'cut')
    again = run(tmp_path/'cut', resume='must')
    assert torch.equal(whole[0], again[0]) and whole[1] == again[1]

def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, in_a_thread, monkeypatch):
    release, steps, write = threading.Event(), [], checkpoints._Hashed.write
    def slow(self, data):
        assert release.wait(60)
        return write(self, data)
    monkeypatch.setattr(checkpoints._Hashed, 'write', slow)
    def callback(step, row):
        steps.append(step)
        if step == 3: release.set() # the checkpoint after step 1 is still being written
    run(tmp_path, callback=callback)
    assert steps == list(range(6))

def test_an_error_of_the_thread_ends_the_run_and_names_the_disk(tmp_path, in_a_thread, monkeypatch):
    class Full:
        def __init__(self, file): self.file = file
        def __getattr__(self, name): return getattr(self.file, name)
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def write(self, data): raise OSError(errno.ENOSPC, 'No space left on device')
    def full_open(path, mode='r', **more):
        file = open(path, mode, **more)
        return Full(file) if str(path).endswith('.tmp') and 'step_0000004' in str(path) else file
    monkeypatch.setattr(checkpoints, 'open', full_open, raising=False)
    with pytest.raises(OSError, match='No space left.*is full, .* GB are free.*of step 2'): run(tmp_path, steps=40)
    monkeypatch.undo()
    assert not list((tmp_path/'checkpoints').glob('.*.tmp'))
    run(tmp_path, steps=40, resume='must')

@pytest.mark.parametrize('damage', ['deleted', 'emptied', 'half', 'cell', 'header'])
def test_a_lost_table_is_written_anew(damage, tmp_path, capsys):
    whole = run(tmp_path/'whole')
    stopped(tmp_path/'cut')
    log = tmp_path/'cut'/'log.csv'
    text = log.read_text()
    lines = text.splitlines(keepends=True)
    if damage == 'deleted': log.unlink()
    else: log.write_text(dict(emptied='', half=text[:len(text)//2], cell=text.replace(lines[2][:4], 'x,y,'),
                              header=''.join(lines[1:]))[damage])
    capsys.readouterr()
    again = run(tmp_path/'cut')
    assert again[1] == whole[1] and len(log.read_text().splitlines()) == 7
    assert capsys.readouterr().out.count('written anew from the checkpoint') == 1

def test_a_renamed_checkpoint_is_not_believed(tmp_path, capsys):
    whole = run(tmp_path/'whole')
    stopped(tmp_path/'cut')
    kept = Checkpoints(tmp_path/'cut/checkpoints', {})
    for kind in ('pt', 'json'): kept.file(4, kind).rename(kept.file(5, kind))
    again = run(tmp_path/'cut')
    assert 'is of step 4, renamed: it is not used' in capsys.readouterr().out and torch.equal(whole[0], again[0])

def test_other_names_do_not_block(tmp_path):
    stopped(tmp_path)
    for name in ('step_final.json', 'step_0000060_old.json', 'step_0000060_old.pt'): (tmp_path/'checkpoints'/name).write_text('{}')
    run(tmp_path, resume='must')
    assert (tmp_path/'checkpoints/step_0000060_old.pt').exists()

def test_rows_survive_packing():
    for rows in ([], [dict(a=1, b=.1), dict(a=2**60, b=1e-300)], [dict(a=1), dict(a=.5)], [dict(a='x', b=None)]):
        assert checkpoints.unpack_rows(checkpoints.pack_rows(rows)) == rows

def test_a_damaged_table_of_the_monitor_is_moved_aside(tmp_path, capsys):
    monitor = Monitor.__new__(Monitor)
    monitor.folder = tmp_path
    monitor.file.write_text('[{"step": 1, "fd"')
    assert monitor.rows_before(9) == [] and (tmp_path/'monitor_damaged.json').exists()
    assert 'cannot be read' in capsys.readouterr().out

def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path/'victim'
    victim.write_text('untouched')
    monkeypatch.setattr(files.secrets, 'token_hex', lambda n: 'guessed')
    (tmp_path/'.a.txt.guessed.tmp').symlink_to(victim)
    with pytest.raises(OSError):
        with atomic(tmp_path/'a.txt') as f: f.write_text('x')
    assert victim.read_text() == 'untouched'

@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides(umask, mode, tmp_path):
    before = os.umask(umask)
    try: files.save_weights(tmp_path/'w.safetensors', dict(x=torch.zeros(2)), {})
    finally: os.umask(before)
    assert (tmp_path/'w.safetensors').stat().st_mode & 0o777 == mode

def test_long_names(tmp_path):
    files.write_json(tmp_path/('x'*250 + '.json'), {})
    with pytest.raises(OSError, match='too long'): files.write_json(tmp_path/('x'*256), {})
