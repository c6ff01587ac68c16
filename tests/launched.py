"""What `test_launch.py` runs in several processes: they import it from here.

    torchrun --standalone --nproc-per-node 2 -m launched OUT.json     # in this folder: the same function, started by torchrun
"""
import copy, json, os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.training import ema_update
from drift_rae.networks.ditdh import DiTDH
from drift_rae.engine.launch import (
    Interrupted, all_any, all_mean, barrier, broadcast_object, catch_signals, device, is_main,
    launch, rank, share, world_size)
from drift_rae.engine.sharding import (
    accumulate, clip_grad_norm, full_optimiser_state, full_state, load_full_optimiser_state,
    load_full_state, unwrap, wrap)

CLASSES, HALF, STEPS = 4, 1, 2

def network():
    torch.manual_seed(0)
    model = DiTDH(input_size=2, in_channels=4, hidden_size=[16, 24], depth=[1, 1], num_heads=[2, 2], num_classes=CLASSES).double()
    for p in model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.1) # its own start is the identity, where most gradients vanish
    return model.eval()

def optimiser_of(model): return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(.9, .95), weight_decay=0.)

def class_loss(model, label, step):
    "A loss of one class that needs its samples only"
    g = torch.Generator().manual_seed(1000*step + label)
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=g)
    return (model(x, torch.ones(3, dtype=torch.float64), torch.full((3,), label)) - x).square().mean()

def train(model, optimiser, average, first, last, n_class=CLASSES, sharding='ddp'):
    "Some steps of the distillation's kind: classes dealt out, gradients accumulated, clipped, averaged; figures of each step"
    rows = []
    for step in range(first, last):
        optimiser.zero_grad()
        mine, total = share(n_class, 'classes', equal=sharding == 'fsdp'), 0.
        for i, label in enumerate(mine):
            with accumulate(model, i == len(mine)-1):
                loss = class_loss(model, label, step)
                (loss*world_size()/n_class).backward()
            total += loss.item()
        norm = clip_grad_norm(model, .05)
        optimiser.step()
        ema_update(average, unwrap(model), .5)
        rows.append(dict(loss=all_mean(dict(loss=total/len(mine)), len(mine))['loss'], norm=norm.item()))
    return rows

def run(sharding='ddp', n_class=CLASSES, states=None):
    "Train from the start (or from the state halfway) to the end; returns what checkpoints halfway and at the end would hold"
    model = network()
    average = wrap(copy.deepcopy(model).requires_grad_(False), sharding)
    model = wrap(model, sharding)
    optimiser = optimiser_of(model)
    def state(): return dict(model=full_state(model), average=full_state(average), optimiser=full_optimiser_state(model, optimiser))
    if states: # as after reading a file: only rank 0 has it
        for k, m in dict(model=model, average=average).items(): load_full_state(m, states[k] if is_main() else None)
        load_full_optimiser_state(model, optimiser, states['optimiser'] if is_main() else None)
        rows, halfway = [], None
    else:
        assert full_optimiser_state(model, optimiser) == {}
        rows = train(model, optimiser, average, 0, HALF, n_class, sharding)
        halfway = copy.deepcopy(state())
    rows += train(model, optimiser, average, HALF, STEPS, n_class, sharding)
    return dict(rows=rows, halfway=halfway, **state())

def small_talk():
    "All the small messages"
    print(f'rank {rank()} prints')
    try: share(world_size()-1, 'classes')
    except ParameterError as e: too_few = str(e)
    return dict(world=world_size(), device=str(device()), threads=torch.get_num_threads(), share=share(9), any=[all_any(rank() == world_size()-1), all_any(False)],
        said=broadcast_object(f'from {rank()}', world_size()-1), too_few=too_few,
        mean=all_mean(dict(a=rank()+.1, b=[rank(), 1.], c=torch.full((2,), rank(), dtype=torch.float32)), weight=rank()+1))

def several(*calls):
    "Several functions of this file in one go, because starting the processes is what takes the time: (name, *arguments) each"
    return [globals()[name](*arguments) for name, *arguments in calls]

def fail(how):
    "Rank 1 fails in some way while the others wait for it"
    print(f'rank {rank()} prints')
    if rank() == 1:
        if how == 'parameter': raise ParameterError("n_class=3: too few")
        if how == 'kill': os.kill(os.getpid(), signal.SIGKILL)
        if how == 'exit': print('the last words', file=sys.stderr, flush=True); os._exit(7)
        if how == 'sys.exit': sys.exit(0)
        raise FloatingPointError('step 7: the loss is nan')
    barrier()
    time.sleep(60)

def wait(folder, polite=True):
    "A loop that a signal ends; with `polite` it saves before"
    Path(folder, f'{rank()}.pid').write_text(str(os.getpid()))
    with catch_signals() as stop:
        for step in range(10**6):
            time.sleep(.01)
            if polite and all_any(stop()):
                if is_main(): Path(folder, 'saved').write_text(str(step))
                barrier()
                raise Interrupted(f'stopped by {stop() or "another rank"} after step {step}; all is saved')

def main(out):
    value = launch(small_talk)
    if rank() == 0: Path(out).write_text(json.dumps({k: v for k, v in value.items() if k != 'mean'}))

if __name__ == '__main__': main(sys.argv[1])
