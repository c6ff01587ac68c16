"""How long a step of the distillation takes, where the time goes, and how much of the device's own speed that is.

    python tests/bench_distill.py                          # size s on the CPU, a few samples only: the split, not the speed
    python tests/bench_distill.py --model tiny             # the miniature, whole
    python tests/bench_distill.py --model xl               # on a GPU: the paper's step, whole
    python tests/bench_distill.py --model xl --nproc 8     # on eight
    python tests/bench_distill.py --model xl --micro-batch 16 --recompute 1   # for small cards

It runs the real `drift_step`, DDP or FSDP, clipping, AdamW and EMA, on random weights and latents. Nothing here asserts a time.
`data` is how long a step waits for its samples, which a thread prepares ahead as in a run; their preparation alone is said besides.
On a GPU the split is measured with the device waited for around each part, the seconds per step without, because kernels overlap.
"""
import argparse, copy, json, resource, time
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from drift_rae.engine import launch
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.training import ema_decay, ema_update, linear_decay
from drift_rae.engine.files import versions
from drift_rae.networks.cost import matmul_rate, memory_plan, parameters, step_flops
from drift_rae.networks.ditdh import DiTDH, preset
from drift_rae.worlds.latents import LatentStore
from drift_rae.distill import Ahead
from drift_rae.parts.recipe import DistillConfig
from drift_rae.parts.step import check_world, drift_step, own_chunks, step_labels, step_samples

PARTS = ('data', 'generate', 'field', 'backward', 'optimiser', 'communication', 'other')
FEW = dict(n_class=1, n_pos=4, n_neg=1, n_extra_neg=3, precision='float32') # what a CPU can do of an ImageNet size in seconds

def network(model):
    "A student with random weights: zeros, as at the start of training, would make a GPU look faster than it is"
    torch.manual_seed(0)
    student = DiTDH(**preset(model)).eval()
    for p in student.parameters():
        if p.requires_grad and p.ndim > 1: nn.init.normal_(p, std=.02)
    return student

def random_store(config, shape):
    "As many latents as a step needs, the same for each class, in float16 in memory"
    one = torch.randn(config.n_pos, *shape, generator=torch.Generator().manual_seed(0)).half().numpy()
    return LatentStore(one.repeat(1, 0) if config.n_class == 1 else one[None].repeat(config.n_class, 0).reshape(-1, *shape), [config.n_pos]*config.n_class)

def peak_memory():
    "Bytes: the GPU allocator's peak, or this process's"
    return torch.cuda.max_memory_allocated() if launch.device().type == 'cuda' else 1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def wait():
    if launch.device().type == 'cuda': torch.cuda.synchronize()

def exchange(n, repeats=3):
    "Seconds for one exchange of n float32 gradients alone; 0 without other processes"
    if launch.world_size() == 1: return 0.
    x, best = torch.zeros(n, device=launch.device()), float('inf')
    for i in range(repeats):
        wait(); launch.barrier()
        start = time.perf_counter(); dist.all_reduce(x); wait()
        best = min(best, time.perf_counter() - start)
    return best

def prepare(store, config, step):
    "Seconds that the samples of one step take alone, in this thread"
    start = time.perf_counter()
    for classes in own_chunks(step_labels(store.num_classes, config.n_class, 0, step), config)[0]: step_samples(store, classes, config, 0, step)
    return time.perf_counter() - start

def measure(model, config, steps=3, warmup=1):
    "One process of the benchmark: a dict of figures (averages over steps; of rank 0)"
    device, c = launch.device(), preset(model)
    student = network(model).to(device)
    average = copy.deepcopy(student).requires_grad_(False)
    student.checkpointing = config.recompute
    if config.compiled: student.compile()
    wrapped = launch.wrap(student, config.sharding)
    if config.sharding == 'fsdp': average = launch.wrap(average, config.sharding)
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=config.lr[0], betas=config.betas, weight_decay=0.)
    store = random_store(config, (c['in_channels'], c['input_size'], c['input_size']))

    ahead = Ahead()
    def step(i, clock):
        with clock('other'):
            optimiser.zero_grad(set_to_none=True)
            drift_step(wrapped, store, step_labels(store.num_classes, config.n_class, 0, i), config, 0, i, clock=clock, samples=ahead)
            with clock('optimiser'):
                launch.clip_grad_norm(wrapped, config.clip)
                optimiser.step()
                ema_update(average, student, ema_decay(i, *config.ema))

    for i in range(warmup): step(i, launch.Clock())
    clock, plain = launch.Clock(), lambda name: launch.nullcontext()
    for i in range(steps): step(warmup + i, clock)
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
    wait(); launch.barrier(); start = time.perf_counter()
    for i in range(steps): step(warmup + steps + i, plain)
    wait(); launch.barrier(); seconds = (time.perf_counter() - start)/steps
    ahead.close()
    flops, rate = step_flops(model, config.n_class, config.n_neg, config.n_extra_neg)/launch.world_size(), matmul_rate(device)
    return dict(model=model, device=torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} thread(s)', processes=launch.world_size(),
        seconds=seconds, split={k: clock.seconds.get(k, 0.)/steps for k in PARTS}, gradient_exchange_alone=exchange(parameters(model)), data_alone=prepare(store, config, 0),
        images_per_second=config.n_class*(config.n_neg + config.n_extra_neg)/seconds, flops_per_step=flops, achieved=flops/seconds, matmul=rate, share=flops/seconds/rate,
        peak_bytes=peak_memory(), config=config.to_dict(), versions=versions())

def show(r, few=False):
    "The figures as text"
    c, total = r['config'], sum(r['split'].values())
    print(f"{r['model']} on {r['processes']} x {r['device']}: {c['n_class']} classes x ({c['n_neg']} + {c['n_extra_neg']}) generated and {c['n_pos']} real, {c['precision']}, "
        f"micro-batch {c['micro_batch'] or c['n_neg']*c['at_once']}, {c['at_once']} class(es) at once{', recomputed' if c['recompute'] else ''}{', compiled' if c['compiled'] else ''}")
    if few: print('NOT the paper\'s step: this device gets a few samples only, so that data and optimiser weigh more and the field less than they would')
    print(f"seconds per step   {r['seconds']:.3f}   ({r['images_per_second']:.1f} images/s)")
    for k, v in r['split'].items(): print(f'  {k:16} {v:.3f}   {100*v/total:5.1f} %')
    print(f"  data, prepared alone: {r['data_alone']:.3f} s{'' if r['data_alone'] < r['seconds'] else ': more than a step, so the step has to wait'}")
    if r['processes'] > 1: print(f"  one exchange of all gradients, alone: {r['gradient_exchange_alone']:.3f} s (in a step it is hidden in or behind the backward pass)")
    print(f"network            {r['flops_per_step']/1e12:.3f} TFLOP per step and process, {r['achieved']/1e12:.3f} TFLOP/s = {100*r['share']:.0f} % of this device's matrix product ({r['matmul']/1e12:.3f} TFLOP/s)")
    print(f"peak memory        {r['peak_bytes']/2**30:.2f} GiB {'by the allocator' if 'CPU' not in r['device'] else 'of the process, libraries included'}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--model', default='s', choices=['tiny', 's', 'b', 'l', 'xl']); add('--preset', default='c', choices=['a', 'b', 'c'])
    add('--steps', type=int, default=3); add('--nproc', type=int, default=1, help='processes; 0: all GPUs')
    for name in ('n_class', 'n_pos', 'n_neg', 'at_once', 'micro_batch', 'recompute', 'compiled'): add('--' + name.replace('_', '-'), type=int, default=0, help='0: as the preset says')
    add('--n-extra-neg', type=int, default=-1); add('--precision', default='', choices=['', 'float32', 'bfloat16']); add('--sharding', default='ddp', choices=launch.SHARDING)
    add('--tf32', type=int, default=1, help='1: float32 products (the field) may use TF32'); add('--plan', type=int, default=0, help='1: also the memory plan'); add('--json', default='')
    a = parser.parse_args()
    few = not torch.cuda.is_available() and a.model != 'tiny'
    changes = {**(FEW if few else {}), **{k: getattr(a, k) for k in ('n_class', 'n_pos', 'n_neg', 'at_once', 'micro_batch', 'precision') if getattr(a, k)},
        **({'n_extra_neg': a.n_extra_neg} if a.n_extra_neg >= 0 else {}), 'recompute': bool(a.recompute), 'compiled': bool(a.compiled), 'sharding': a.sharding}
    config = DistillConfig.preset(a.model, a.preset, **changes)
    import bench_distill # other processes know this file by its name only
    r = launch.launch(bench_distill.prepared, a.model, config, a.steps, bool(a.tf32), nproc=a.nproc)
    if launch.is_main():
        show(r, few)
        if a.plan:
            from drift_rae.networks.cost import show_plan
            show_plan(memory_plan(a.model, n_pos=config.n_pos, n_neg=config.n_neg, n_extra_neg=config.n_extra_neg, precision=config.precision,
                settings=((config.micro_batch or config.n_neg, config.recompute),)))
        if a.json: Path(a.json).write_text(json.dumps(r, indent=1))

def prepared(model, config, steps, tf32):
    "`measure`, after this process's settings"
    if tf32 and torch.cuda.is_available(): torch.set_float32_matmul_precision('high')
    check_world(config, launch.world_size())
    return measure(model, config, steps)

if __name__ == '__main__': main()
