"A distillation small enough to be run many times, killed and spread over processes; imported by the processes that tests start"
import os, signal, sys, time
from dataclasses import replace
import torch
from drift_rae.engine import checkpoints, launch, sharding
from drift_rae.networks.ditdh import DiTDH
from drift_rae.distill import distill
from drift_rae.worlds.latents import save_latents, sort_by_class
from drift_rae.parts.recipe import DistillConfig

CLASSES = 6

def teacher(dtype=torch.float64):
    "A flow model with random weights"
    torch.manual_seed(0)
    model = DiTDH(input_size=2, in_channels=8, hidden_size=[16, 24], depth=[2, 1], num_heads=[2, 2], num_classes=CLASSES)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.1*torch.randn_like(p))
    return model.to(dtype).eval()

def store(): return sort_by_class(torch.randn(CLASSES*20, 8, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(CLASSES*20) % CLASSES, CLASSES)

def save_few_latents(folder):
    "A store on disk for the miniature, 40 random latents of each digit: read at once, where all the digits would be encoded for seconds"
    labels = torch.arange(400) % 10
    save_latents(sort_by_class(torch.randn(400, 32, 4, 4, generator=torch.Generator().manual_seed(1)), labels, 10), folder, {})
    return str(folder)

def config(preset='c', **changes):
    values = dict(n_class=4, n_pos=16, n_neg=4, n_extra_neg=8, steps=4, lr=(1e-3, 1e-4), ema=(.9, 2), at_once=1, checkpoint_every=2)
    return replace(DistillConfig.preset('tiny', preset), **{**values, **changes})

class Autoencoder(torch.nn.Module):
    "Latents to images of 4 x 4 and back, with fixed random weights: something for decode-encode to go through"
    def __init__(self, scale=1.):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.there, self.back = (torch.nn.Parameter(scale*torch.randn(n, m, generator=g, dtype=torch.float64)/n**.5) for n, m in ((32, 48), (48, 32)))
        self.encoder = torch.nn.Identity() # it has one
    def decode(self, z, clamp=True): return (z.flatten(1) @ self.there).tanh().view(-1, 3, 4, 4)
    def encode(self, x): return (x.flatten(1) @ self.back).view(-1, 8, 2, 2)

def result(model, rows):
    "Losses, figures and averaged weights as plain numbers"
    return [[r[k] for k in r if k not in ('seconds', 'memory_gib', 'images_per_second', 'seconds_waiting')] for r in rows], torch.cat([p.flatten() for p in sharding.full_state(model).values()]) if launch.is_main() else sharding.full_state(model)

def several(cases):
    "One result for each (preset, changes)"
    return [result(*distill(teacher(), store(), config(preset, **changes), seed=3, autoencoder=Autoencoder())) for preset, changes in cases]

def stopped_after(folder, step, resume='auto', **changes):
    "A run that a monitor stops after some step"
    return result(*distill(teacher(), store(), config(steps=8, **changes), folder=folder, resume=resume, callback=lambda s, row, average: 'enough' if s == step else None))

def forever(folder):
    "A run that only a signal ends"
    def wait(step, row, average): print('step', step, flush=True); time.sleep(.05)
    distill(teacher(), store(), config(steps=100_000), folder=folder, callback=wait)

def few_images(job):
    "A row of the ablations, judged by 20 images of each class, where 500 are the default"
    from drift_rae import ablations
    from drift_rae.parts.bench import EVALUATION
    EVALUATION['per_class'] = 20
    return ablations._run_and_store(job)

# --- a program that forks runs and kills them: importing torch once costs more than all the runs
def attempt(folder, rank, world, store_file, suicide):
    "One process of a run; with `suicide` it kills itself while it writes its checkpoint after so many bytes"
    torch.set_num_threads(1)
    if world > 1: torch.distributed.init_process_group('gloo', init_method=f'file://{store_file}', rank=rank, world_size=world)
    if suicide and rank == 0:
        write, left = checkpoints._Hashed.write, [suicide]
        def cut(self, data):
            left[0] -= memoryview(data).nbytes
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return write(self, data)
        checkpoints._Hashed.write = cut
    model, rows = distill(teacher(), store(), config(steps=30, checkpoint_every=2), folder=folder)
    figures, weights = result(model, rows)
    if rank == 0: torch.save(dict(figures=figures, weights=weights), f'{folder}/result.pt')

def fork(folder, world, suicide=0):
    "Start the processes of one attempt"
    children = []
    store_file = f'{folder}/rendezvous_{time.monotonic_ns()}'
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = open(f'{folder}/said_{rank}.txt', 'a')
                attempt(folder, rank, world, store_file, suicide); code = 0
            finally: os._exit(code)
        children.append(child)
    return children

def killed(folder, world, kills, seed):
    "Kill a run `kills` times, then let it finish; print how many kills hit a running process"
    draw = torch.Generator().manual_seed(seed)
    hits = 0
    for i in range(kills):
        suicide = int(torch.randint(1, 400_000, (), generator=draw)) if i % 3 == 2 else 0
        children = fork(folder, world, suicide)
        if not suicide: time.sleep(float(torch.rand((), generator=draw))*.6)
        else: os.waitpid(children.pop(0), 0); hits += 1
        for child in children: os.kill(child, signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        hits += not suicide and any(os.WIFSIGNALED(s) for s in statuses)
    statuses = [os.waitpid(child, 0)[1] for child in fork(folder, world)]
    assert not any(statuses), open(f'{folder}/said_0.txt').read()[-2000:]
    print(hits)

if __name__ == '__main__': killed(sys.argv[1], *map(int, sys.argv[2:]))
