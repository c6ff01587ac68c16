"""What `test_parts.py` checks: `python -m part_runs FOLDER [every] [ddp] [fsdp]` forks processes that save and load checkpoints in parts, and kills some; it prints JSON.

One program for all cases, because importing torch costs more than all the runs."""
import json, os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict, torch.distributed.device_mesh, torch.distributed.fsdp
import torch._dynamo # once, before the forks
import small_runs
from drift_rae.distill import distill
from drift_rae.engine import checkpoints, machines, sharding, training
from drift_rae.engine.checkpoints import Checkpoints
from drift_rae.engine.launch import all_mean
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.training import train
from drift_rae.flow import Randomness

def together(folder, world, work, *args):
    "Call work(folder, *args) in forked processes that form a group; what each returned, or None if it was killed or failed"
    folder.mkdir(parents=True, exist_ok=True)
    store, children = f'{folder}/rendezvous_{time.monotonic_ns()}', []
    for rank in range(world):
        child = os.fork()
        if child: children.append(child); continue
        try:
            sys.stdout = sys.stderr = open(folder/f'said_{rank}.txt', 'a')
            torch.set_num_threads(1)
            dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
            torch.save(work(folder, *args), f'{store}.{rank}')
            sys.stdout.flush()
        except BaseException:
            import traceback; traceback.print_exc(); sys.stdout.flush(); os._exit(1)
        os._exit(0)
    for child in children: os.waitpid(child, 0)
    paths = [Path(f'{store}.{rank}') for rank in range(world)]
    return [torch.load(p) if p.exists() else None for p in paths]

def kill_at(where, rank, step=4):
    "Let this process, if it has that rank, die within its checkpoint of that step: in the middle of its part, or before the description"
    if dist.get_rank() != rank: return
    write, write_some, describe = Checkpoints._write, checkpoints._Hashed.write, Checkpoints._describe
    def part(self, at, state):
        if at == step: checkpoints._Hashed.write = lambda self, data: (self.file.write(data[:len(data)//2]), self.file.flush(), os.kill(os.getpid(), signal.SIGKILL))
        return write(self, at, state)
    def description(self, at, *rest):
        if at == step: os.kill(os.getpid(), signal.SIGKILL)
        return describe(self, at, *rest)
    if where == 'part': Checkpoints._write = part
    else: Checkpoints._describe = description

class Net(torch.nn.Module):
    "A few linear layers whose rows no number of processes divides"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(2)), torch.nn.Linear(5, 3)
        self.double()
    def forward(self, x):
        for block in self.blocks: x = block(x).tanh()
        return self.head(x)

def step_fn(step, network):
    "Two samples for each process; both directions of a step differ between processes"
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(100*step + dist.get_rank()))
    loss = network(x).square().mean()
    loss.backward()
    return dict(loss=all_mean(dict(loss=loss))['loss'].item())

def run(folder, kind='fsdp', kill=None, stop=-1, thread=False):
    """A training of six steps with a checkpoint after every second one: losses, the last number of this process's own stream, weights and their average on rank 0

    (The rows of a continued run are those of rank 0, so a number that differs between processes is compared only for a step after that.)"""
    if kill: kill_at(*kill)
    if thread: checkpoints.AT_ONCE = 0
    model, average, drawn = Net(), Net().requires_grad_(False), Randomness(3, 'x') # whose state is gathered from all processes
    def with_noise(step, network): return dict(step_fn(step, network), drawn=torch.rand((), generator=drawn.generator).item())
    rows = train(model, with_noise, state=dict(drawn=drawn), steps=6, average=average, sharding=kind, log=folder/'run/log.csv', checkpoints=Checkpoints(folder/'run/checkpoints', {}, every=2),
        callback=lambda step, row: 'enough' if step == stop else None)
    return [[r['loss'], r['gradient_norm']] for r in rows], rows[-1]['drawn'], [sharding.full_state(m) for m in (model, average)]

def distilled(folder, kind, stop=-1):
    "A distillation of six steps, whose gradients come in another order than that of the parameters"
    config = small_runs.config(steps=6, sharding=kind, n_class=dist.get_world_size())
    return small_runs.result(*distill(small_runs.teacher(), small_runs.store(), config, folder=folder/'run', callback=lambda step, row, average: 'enough' if step == stop else None))

def trained(kind, steps=1):
    "A model, its average and its optimiser after some steps"
    model, average = (sharding.wrap(Net(), kind) for _ in range(2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        step_fn(step, model)
        optimiser.step()
        training.ema_update(average, model, .5)
    return dict(model=sharding.unwrap(model), average=sharding.unwrap(average)), optimiser

def save(folder, kind):
    "A checkpoint; the whole state on rank 0, and how many bytes this rank had to hold"
    models, optimiser = trained(kind)
    kept, state = Checkpoints(folder/'kept', {}), checkpoints.collect_state(models, optimiser, {}, [dict(loss=.5)])
    if 'part' in state or dist.get_rank() == 0: kept.save(1, state)
    return dict(state=whole(models, optimiser), bytes=sum(t.nbytes for t in checkpoints._tensors([state.get(k) for k in ('models', 'optimiser')])))

def whole(models, optimiser): return dict(models={k: sharding.full_state(m) for k, m in models.items()}, optimiser=sharding.full_optimiser_state(models['model'], optimiser))

def load(folder, kind):
    "The whole state on rank 0, after loading on this number of processes"
    models, optimiser = trained(kind, 0)
    spread, kept = sharding.is_spread(models['model']), Checkpoints(folder/'kept', {})
    found = kept.load(spread=True) if spread else checkpoints.on_rank_0(kept.load)
    rows = checkpoints.restore_state(found and found[1], models, optimiser, {})
    return dict(state=whole(models, optimiser), rows=rows)

def apart(folder):
    "Each process writes into a folder of its own, as machines do that do not share a disk; the error of each"
    checkpoints.SHARED = 0
    models, optimiser = trained('fsdp')
    kept = Checkpoints(folder/f'disk_{dist.get_rank()}', {})
    try: kept.save(1, checkpoints.collect_state(models, optimiser, {}, []))
    except OSError as e: return str(e)

def apart_at_the_start(folder):
    "As `apart`, found out before the first step; the error of each"
    machines.check_shared.__defaults__ = (0,)
    def no_step(step, network): raise AssertionError('a step was made')
    try: train(Net(), no_step, steps=2, sharding='fsdp', checkpoints=Checkpoints(folder/f'disk_{dist.get_rank()}', {}))
    except ParameterError as e: return str(e)

def same(a, b):
    "Nested values are the same to the bit"
    if isinstance(a, torch.Tensor): return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(same(*v) for v in zip(a, b, strict=True)) if isinstance(a, (list, tuple)) else a == b

def names(folder): return sorted(p.name for p in (folder/'run/checkpoints').iterdir() if p.name.startswith(('step', '.step')))

def killed(folder, where, rank, undisturbed):
    "A run of two that is killed while it saves step 4, then continued by two: what was left, what the continuation loaded, whether it ends the same"
    assert None in together(folder, 2, run, 'fsdp', (where, rank))
    left = names(folder)
    end = together(folder, 2, run)
    return dict(left=left, after=names(folder), same=same(end, undisturbed))

def cases(folder, every, kinds):
    "All cases with `every`, else those of CI"
    found, undisturbed = {}, together(folder/'whole', 2, run)
    assert None not in undisturbed
    for where, rank in (('part', 1), ('description', 0), *[('part', 0)]*every): found[f'{where} {rank}'] = killed(folder/f'{where}_{rank}', where, rank, undisturbed)
    if every: found['thread'] = same(together(folder/'thread', 2, run, 'fsdp', None, -1, True), undisturbed)

    both = together(folder/'state', 2, save, 'fsdp')
    saved = [p['state'] for p in both]
    found['bytes'] = [p['bytes'] for p in both], sum(t.nbytes for t in checkpoints._tensors(saved[0]))
    found['loads'] = {f'{kind} {n}': (lambda p: [same(p['state'], saved[0]), p['rows']])(together(folder/'state', n, load, kind)[0])
                      for kind, n in (('fsdp', 2), ('fsdp', 3), ('ddp', 1), *[('ddp', 2)]*every)}
    if every:
        ddp = together(folder/'other', 2, save, 'ddp')[0]['state']
        found['fsdp after ddp'] = same(together(folder/'other', 3, load, 'fsdp')[0]['state'], ddp)
        found['apart'] = together(folder/'apart', 2, apart)
    found['apart at the start'] = together(folder/'apart_at_the_start', 2, apart_at_the_start)

    part = folder/'whole/run/checkpoints/step_0000006.1of2.pt' # one bit of one part
    data = bytearray(part.read_bytes()); data[len(data)//2] ^= 1; part.write_bytes(data)
    found['damaged'] = same(together(folder/'whole', 2, run), undisturbed), (folder/'whole/said_0.txt').read_text().count('1of2.pt has another checksum')

    found['three'] = {}
    for kind in kinds: # of three processes, the order of a sum matters
        undisturbed = together(folder/f'three_{kind}', 3, distilled, kind)[0]
        stopped = together(folder/f'stopped_{kind}', 3, distilled, kind, 2)[0]
        found['three'][kind] = stopped is None is not undisturbed and same(together(folder/f'stopped_{kind}', 3, distilled, kind)[0], undisturbed)
    return found

if __name__ == '__main__': print(json.dumps(cases(Path(sys.argv[1]), 'every' in sys.argv[2:], [k for k in sys.argv[2:] if k != 'every'])))
