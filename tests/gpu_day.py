"""A day with a GPU in 25 minutes: everything about this package that a CPU cannot show, in one JSON file.

    python tests/gpu_day.py                               # on a GPU: parts a to f, gpu_day.json
    python tests/gpu_day.py --parts b e --out again.json  # some of them
    python tests/gpu_day.py --device cpu --small          # the same code with tiny shapes, seconds; CI runs this

(a) field and loss equal the CPU's, and the field's time against its bare matrix products; (b) steps of config C with random weights for s, b and
xl: seconds, split, share of this card's measured matrix product, peak memory against the plan, compiled or not, micro-batches that fit cards of
24, 40 and 80 GB; (c) kill and resume; (d) DDP and FSDP in a group of one process; (e) images per second of sampling and evaluation; (f) a short
run of the miniature, and its Frechet distance against the CPU's. Aim: xl, config C, H100 or H200: at least 45 % of the matrix product, below 80 GB.

The file is written whole after every measurement, so that what was measured before a cut stays. Each part has seconds of its own; a measurement
that would begin after them is left out and named. A part that fails says why, and the next one begins. Nothing here asserts a speed.
"""
import argparse, copy, json, os, signal, subprocess, sys, tempfile, time, traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from drift_rae.distill import Ahead
from drift_rae.drifting import DriftConfig, drift_field, drift_loss
from drift_rae.engine import launch, sharding
from drift_rae.engine.files import versions, write_json
from drift_rae.engine.training import ema_decay, ema_update
from drift_rae.networks.cost import matmul_rate, memory_plan, step_flops
from drift_rae.networks.ditdh import DiTDH, preset
from drift_rae.parts.recipe import config_for
from drift_rae.parts.step import drift_step, step_labels
from drift_rae.worlds.latents import LatentStore

ROOT = Path(__file__).parents[1]
SECONDS = dict(a=90, b=600, c=180, d=120, e=210, f=270) # together 24.5 minutes
SIZES = ('s', 'b', 'xl')
CARDS = (24, 40, 80) # GB
AIM = dict(model='xl', share=.45, gigabytes=80)

class Day:
    "The results, on disk after every change, and the time that is left"
    def __init__(self, out, device, small, scale=1.):
        self.out, self.device, self.small, self.scale = Path(out), torch.device(device), small, scale
        self.begin, self.part, self.end = time.monotonic(), None, 0.
        name = torch.cuda.get_device_name() if self.cuda else 'CPU'
        self.results = dict(device=name, kind=self.device.type, small=small, aim=AIM, started=time.strftime('%Y-%m-%d %H:%M:%S'), versions=versions(), seconds=SECONDS, parts={})
        if self.cuda: self.results['memory_gb'] = torch.cuda.get_device_properties(0).total_memory/1e9
        self.write()

    @property
    def cuda(self): return self.device.type == 'cuda'

    def write(self): write_json(self.out, self.results)

    def add(self, name, value):
        self.part[name] = value
        self.write()

    def measure(self, name, f, *args, **kwargs):
        "Call f unless the part's time is over, and note its value, or why there is none; never raises for a measurement that failed"
        if time.monotonic() > self.end:
            self.add(name, dict(left_out='no time left'))
            return None
        try: value = f(*args, **kwargs)
        except torch.OutOfMemoryError as e: value = dict(failed=f'out of memory: {str(e).splitlines()[0][:200]}')
        except Exception as e: value = dict(failed=f'{type(e).__name__}: {str(e)[:400]}', traceback=traceback.format_exc()[-1500:])
        self.free()
        self.add(name, value)
        return value

    def free(self):
        if self.cuda: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()

    def run(self, letter, f):
        "One part, within its seconds"
        start = time.monotonic()
        self.part = self.results['parts'][letter] = dict(about=f.__doc__, state='running')
        self.end = start + SECONDS[letter]*self.scale
        self.write()
        try: f(self)
        except Exception as e: self.part['failed'] = f'{type(e).__name__}: {str(e)[:400]}'
        failed = 'failed' in self.part or any(isinstance(v, dict) and 'failed' in v for v in self.part.values())
        self.part.update(state='failed' if failed else 'done', took=time.monotonic() - start)
        self.write()
        print(f"{letter}: {self.part['state']} in {self.part['took']:.0f} s", flush=True)

    def time(self, f, times=3):
        "Best seconds of a call, after one that is not counted"
        best = float('inf')
        for i in range(times + 1):
            self.wait(); start = time.perf_counter()
            f()
            self.wait()
            if i: best = min(best, time.perf_counter() - start)
        return best

    def wait(self):
        if self.cuda: torch.cuda.synchronize()

    def peak(self): return torch.cuda.max_memory_allocated() if self.cuda else 0

# ---- (a)
def tokens(day, batch, n, pos, extra, width):
    "Generated, positive and further negative tokens, the same on each device"
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, k, width, generator=g) + shift for k, shift in ((n, 0.), (pos, .3), (extra, .1))]

def field_equals_cpu(day):
    "Largest differences of field, loss and gradient from the CPU in float64, in units of the field's root mean square"
    shape = (2, 8, 16, 8, 32) if day.small else (4, 64, 256, 192, 768)
    gen, pos, extra = tokens(day, *shape)
    found = {}
    for name in ('c', 'a'):
        config = DriftConfig.preset(name)
        config = replace(config, perturbation='off') if config.perturbation != 'off' else config # noise would differ between devices
        def both(device, dtype):
            x, y, z = (t.to(device, dtype, copy=True) for t in (gen, pos, extra))
            x.requires_grad_()
            loss, _ = drift_loss(x, y, z, config=config)
            loss.backward()
            V = drift_field(x.detach(), y, z, tau=.05, scale='mean')
            return [t.detach().double().cpu() for t in (V, loss, x.grad)]
        exact, here = both('cpu', torch.float64), both(day.device, torch.float32)
        errors = [((a - b).abs().max()/a.square().mean().sqrt()).item() for a, b in zip(exact, here)]
        found[name] = dict(zip(('field', 'loss', 'gradient'), errors), within=max(errors) < 1e-3)
    return found

def field_against_products(day):
    "Seconds of loss and gradient of one class of config C, and of its matrix products alone"
    batch, n, pos, extra, width = (2, 8, 16, 8, 32) if day.small else (256, 64, 256, 192, 768)
    gen, y, z = (t.to(day.device) for t in tokens(day, batch, n, pos, extra, width))
    gen.requires_grad_()
    others, config = torch.cat([gen.detach(), z, y], 1), DriftConfig.preset('c')
    weights = torch.rand(batch, n, others.shape[1], device=day.device)
    times = len(config.temperatures)
    def whole():
        gen.grad = None
        drift_loss(gen, y, z, config=config)[0].backward()
    def products(): # distances once, and again for each noise; a weighted sum for each temperature
        for _ in range(times + (config.perturbation != 'off')): torch.bmm(gen.detach(), others.mT)
        for _ in range(times): torch.bmm(weights, others)
    a, b = day.time(whole), day.time(products)
    return dict(field_seconds=a, products_seconds=b, ratio=a/b)

def part_a(day):
    "Field and loss on this device against the CPU, and the field against its bare matrix products"
    day.measure('equal', field_equals_cpu, day)
    day.measure('speed', field_against_products, day)

# ---- (b)
def network(model):
    "A network with random weights: the zeros of a fresh one would make a GPU look faster than it is"
    torch.manual_seed(0)
    student = DiTDH(**preset(model)).eval()
    for p in student.parameters():
        if p.requires_grad and p.ndim > 1: nn.init.normal_(p, std=.02)
    return student

def store_for(config, model):
    "As many latents as a step needs, the same for every class"
    c = preset(model)
    one = torch.randn(config.n_pos, c['in_channels'], c['input_size'], c['input_size'], generator=torch.Generator().manual_seed(0)).half()
    return LatentStore(one.numpy()[None].repeat(config.n_class, 0).reshape(-1, *one.shape[1:]), [config.n_pos]*config.n_class)

class Steps:
    "A student with optimiser and average, and its steps"
    def __init__(self, day, model, config, wrap=lambda network: network):
        self.day, self.config = day, config
        student = network(model).to(day.device)
        self.average = copy.deepcopy(student).requires_grad_(False)
        student.checkpointing = config.recompute
        student.pad_swiglu(config.pad_swiglu)
        if config.compiled: student.compile_blocks()
        self.student, self.wrapped = student, wrap(student)
        self.optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5, betas=config.betas, weight_decay=0., fused=day.cuda or None)
        self.store, self.ahead, self.i = store_for(config, model), Ahead(noise=not day.cuda), 0

    def __call__(self, clock=lambda name: nullcontext(), average=True):
        with clock('other'):
            self.optimiser.zero_grad(set_to_none=True)
            loss, _ = drift_step(self.wrapped, self.store, step_labels(self.store.num_classes, self.config.n_class, 0, self.i), self.config, 0, self.i, clock=clock, samples=self.ahead)
            with clock('optimiser'):
                sharding.clip_grad_norm(self.wrapped, self.config.clip)
                self.optimiser.step()
                if average: ema_update(self.average, self.student, ema_decay(self.i, *self.config.ema))
        self.i += 1
        return loss

def config_of(day, model, **changes):
    "Config C of a size, or with few samples for a trial on the CPU; more steps than are made, so that readers have work"
    few = dict(n_class=2, n_pos=8, n_neg=4, n_extra_neg=4, precision='float32') if day.small else {}
    return config_for(model, 'c', steps=1000, **{**few, **changes})

def step_figures(day, model, rate, steps=2, **changes):
    "Seconds of a step, its split, its share of the matrix product, and its memory against the plan"
    config = config_of(day, model, **changes)
    made = Steps(day, model, config)
    try:
        begin = time.perf_counter()
        made(); day.wait()
        first, clock = time.perf_counter() - begin, sharding.Clock()
        for _ in range(steps): made(clock)
        if day.cuda: torch.cuda.reset_peak_memory_stats()
        day.wait(); begin = time.perf_counter()
        for _ in range(steps): made()
        day.wait()
        seconds = (time.perf_counter() - begin)/steps
    finally: made.ahead.close()
    flops = step_flops(model, config.n_class, config.n_neg, config.n_extra_neg)
    images = config.n_class*(config.n_neg + config.n_extra_neg)
    return dict(classes=config.n_class, micro_batch=config.micro_batch or config.n_neg, recompute=config.recompute, compiled=config.compiled, first_seconds=first, seconds=seconds,
        seconds_of_32_classes=seconds*32/config.n_class, split={k: v/steps for k, v in clock.seconds.items()}, images_per_second=images/seconds,
        flops=flops, share=flops/seconds/rate, peak_gb=day.peak()/1e9, plan_gb=plan_of(day, model, config)/1e9)

def plan_of(day, model, config):
    "Bytes of the plan without autoencoder, monitor and buckets, which are not in these steps"
    if model == 'tiny': return 0
    row = memory_plan(model, ((config.micro_batch or config.n_neg, config.recompute),), config.n_pos, config.n_neg, config.n_extra_neg, config.precision, monitor=0)[0]
    from drift_rae.networks.cost import autoencoder_bytes
    return row['total'] - autoencoder_bytes(model)

def fits(day, model, gigabytes):
    "The largest micro-batch with which a step of one class runs in so much memory, by a limit on the allocator; recomputation only if needed"
    total = day.results.get('memory_gb', 0.)
    if day.cuda and total < .97*gigabytes: return dict(left_out=f'this card has {total:.0f} GB')
    if day.cuda: torch.cuda.set_per_process_memory_fraction(min(1., .95*gigabytes/total))
    settings = [(4, False)] if day.small else [(64, False), (32, False), (16, False), (64, True), (32, True), (16, True), (8, True)]
    tried = []
    try:
        for micro, recompute in settings:
            try:
                made = Steps(day, model, config_of(day, model, n_class=1, micro_batch=micro, recompute=recompute))
                try: made()
                finally: made.ahead.close()
                return dict(micro_batch=micro, recompute=recompute, peak_gb=day.peak()/1e9, too_large=tried)
            except torch.OutOfMemoryError: tried.append([micro, recompute])
            made = None
            day.free()
        return dict(micro_batch=0, too_large=tried)
    finally:
        if day.cuda: torch.cuda.set_per_process_memory_fraction(1.)

def part_b(day):
    "Steps of config C with random weights"
    rate = matmul_rate(day.device, size=128 if day.small else 0)
    day.add('matmul', dict(rate=rate, dtype='bfloat16' if day.cuda else 'float32'))
    with sharding.fast_products() if day.cuda else nullcontext():
        for model in ('tiny',) if day.small else ('xl', 's', 'b'): # the aim's first
            n = 2 if day.small else 4
            day.measure(f'{model}', step_figures, day, model, rate, n_class=n)
            if not day.small: day.measure(f'{model}, compiled', step_figures, day, model, rate, n_class=n, compiled=True)
            for gigabytes in CARDS: day.measure(f'{model}, fits {gigabytes} GB', fits, day, model, gigabytes)
        if not day.small:
            day.measure('xl, 32 classes', step_figures, day, 'xl', rate, steps=1)
    best = max((v for k, v in day.part.items() if k.startswith(('xl', 'tiny')) and isinstance(v, dict) and 'share' in v), key=lambda v: v['share'], default=None)
    if best: day.add('aim', dict(share=best['share'], peak_gb=best['peak_gb'], reached=not day.small and best['share'] >= AIM['share'] and best['peak_gb'] < AIM['gigabytes']))

# ---- (c), (f): runs of the miniature as programs
def program(day, out, device, **options):
    "A run of the miniature in its own process"
    few = dict(n_class=2, n_pos=8, n_neg=4, n_extra_neg=4) if day.small else {}
    words = [x for k, v in {**few, **options}.items() for x in (f'--{k}', str(v))]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **({} if device == 'cuda' else {'CUDA_VISIBLE_DEVICES': ''})}
    return subprocess.Popen([sys.executable, '-m', 'drift_rae.distill', '--nproc', '1', '--monitor_every', '0', '--out', str(out), *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def whole_run(day, out, device, seconds, **options):
    "A run of the miniature from its start or checkpoint to its end; with tiny shapes in this process, because starting one costs more"
    if not day.small: return finished(program(day, out, device, **options), seconds)
    from drift_rae.distill import start
    start(out=str(out), nproc=1, monitor_every=0, n_class=2, n_pos=8, n_neg=4, n_extra_neg=4, **options)

def finished(process, seconds):
    try: said, _ = process.communicate(timeout=max(1., seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f'not done in {seconds:.0f} s: {process.communicate()[0][-300:]}') from None
    if process.returncode: raise RuntimeError(said[-600:])

def weights_of(folder):
    from drift_rae.parts.generator import load_generator
    return torch.cat([p.flatten() for p in load_generator(folder).model.parameters()])

def kill_and_resume(day):
    "A run that is killed between checkpoints and continued, against an undisturbed one"
    steps, options = (6, 'checkpoint_every=2') if day.small else (60, 'checkpoint_every=10')
    with tempfile.TemporaryDirectory() as folder:
        at, kind = Path(folder), day.device.type
        def left(): return day.end - time.monotonic()
        whole_run(day, at/'whole', kind, left(), steps=steps, changes=options)
        run = program(day, at/'cut', kind, steps=steps, changes=options)
        while not list((at/'cut/checkpoints').glob('*.json')) and run.poll() is None and left() > 0: time.sleep(.02)
        alive = run.poll() is None
        run.send_signal(signal.SIGKILL); run.communicate()
        whole_run(day, at/'cut', kind, left(), steps=steps, changes=options)
        a, b = weights_of(at/'whole'), weights_of(at/'cut')
        return dict(killed_while_running=alive, equal_to_the_bit=torch.equal(a, b), largest_difference=(a - b).abs().max().item(), steps=steps)

def part_c(day):
    "Kill and resume"
    day.measure('miniature', kill_and_resume, day)

# ---- (d)
def in_a_group(day, model, kind):
    "Steps in a group of one process, wrapped; None: without a wrapper"
    config = config_of(day, model, n_class=2)
    wrap = {None: lambda m: m, 'ddp': sharding._ddp, 'fsdp': sharding._fsdp}[kind]
    made = Steps(day, model, config, wrap)
    try:
        losses = [made(average=False) for _ in range(2)] # FSDP's parts cannot be averaged with a whole model
        if day.cuda: torch.cuda.reset_peak_memory_stats()
        day.wait(); begin = time.perf_counter()
        losses.append(made(average=False)); day.wait()
        return dict(seconds=time.perf_counter() - begin, losses=losses, peak_gb=day.peak()/1e9)
    finally: made.ahead.close()

def part_d(day):
    "DDP and FSDP in a group of one process"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('cpu:gloo,cuda:nccl' if day.cuda else 'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
        try:
            model = 'tiny' if day.small else 'b'
            found = {kind or 'alone': day.measure(kind or 'alone', in_a_group, day, model, kind) for kind in (None, 'ddp', 'fsdp')}
        finally: dist.destroy_process_group()
    losses = [v['losses'] for v in found.values() if v and 'losses' in v]
    if len(losses) == 3:
        most = max(abs(a/b - 1) for other in losses[1:] for a, b in zip(other, losses[0]))
        day.add('agreement', dict(largest_relative_difference_of_losses=most, within=most < (1e-2 if day.cuda else 1e-4)))

# ---- (e)
def sampling(day, model):
    "Images per second: one step, fifty points with autoguidance's two networks, decoder"
    from drift_rae.flow import one_step, sample
    from drift_rae.networks.vit import DECODERS, RAEDecoder
    from drift_rae.autoencoder import RAE
    n, points = (2, 3) if day.small else (64, 50)
    net, size = network(model).to(day.device), 'tiny' if day.small else 'xl'
    rae = RAE(None, RAEDecoder(DECODERS[size])).eval().to(day.device)
    z = torch.randn(n, net.in_channels, net.input_size, net.input_size, device=day.device)
    y = torch.arange(n, device=day.device) % net.num_classes
    half = torch.autocast('cuda', torch.bfloat16) if day.cuda else nullcontext()
    with torch.no_grad(), half, sharding.fast_products():
        one, decode = day.time(lambda: one_step(net, z, y)), day.time(lambda: rae.decode(z))
        many = day.time(lambda: sample(net, z, y, steps=points, guidance=1.42, guide=net), times=1)
    return dict(batch=n, one_step=n/one, decoder=n/decode, points=points, guided=n/many, precision='bfloat16' if day.cuda else 'float32')

def extracting(day, name):
    "Images per second of an extractor with random weights"
    from drift_rae.metrics.extractors import load_extractor
    extractor = load_extractor(name, 'random', str(day.device))
    n = 1 if day.small else 64
    images = torch.randint(0, 256, (n, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad(): return dict(images_per_second=n/day.time(lambda: extractor(images), times=1 if day.small else 3))

def judging(day):
    "Seconds for the metrics of 50,000 images in 2048 dimensions against 10,000"
    from drift_rae.metrics.neighbours import evaluate_features
    n, m, d = (60, 40, 8) if day.small else (50_000, 10_000, 2048)
    a, b = torch.randn(n, d, device=day.device), torch.randn(m, d, device=day.device)
    begin = time.perf_counter()
    evaluate_features(a, b)
    day.wait()
    return dict(seconds=time.perf_counter() - begin, images=n, reference=m, dimensions=d)

def part_e(day):
    "Throughput of sampling and evaluation"
    for model in ('tiny',) if day.small else ('xl', 's', 'b'): day.measure(f'sampling, {model}', sampling, day, model)
    day.measure('metrics', judging, day)
    for name in ('dinov2',) if day.small else ('inception', 'dinov2'): day.measure(f'extractor, {name}', extracting, day, name)

# ---- (f)
def part_f(day):
    "A short run of the miniature here and on the CPU, and both Frechet distances by the judge"
    from drift_rae.metrics.neighbours import evaluate_features
    from drift_rae.parts.generator import load_generator
    from drift_rae.worlds.data import training_digits
    from drift_rae.worlds.judge import load_judge
    judge, real = load_judge(), training_digits()[0]
    real = judge.features(real[:100] if day.small else real)
    steps, each = (2, 2) if day.small else (150, 100)
    def run(out, device):
        "Seconds of the run, and its distance on the same noises"
        begin = time.monotonic()
        whole_run(day, out, device, day.end - time.monotonic(), steps=steps)
        took, labels = time.monotonic() - begin, torch.arange(10).repeat_interleave(each)
        metrics = evaluate_features(judge.features(load_generator(out).sample(labels, seed=0)), real)
        return dict(seconds=took, steps=steps, fd=metrics['fd'], recall=metrics['recall'])
    with tempfile.TemporaryDirectory() as folder:
        for device in dict.fromkeys((day.device.type, 'cpu')): # once on the CPU alone
            day.measure(device, run, Path(folder)/device, device)
    if not day.small and day.cuda and 'fd' in day.part['cuda'] and 'fd' in day.part['cpu']:
        day.add('ratio', day.part['cuda']['fd']/day.part['cpu']['fd']) # other noises on the GPU: as two seeds

PARTS = dict(a=part_a, b=part_b, c=part_c, d=part_d, e=part_e, f=part_f)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--device', default='cuda', choices=('cuda', 'cpu')); add('--small', action='store_true', help='tiny shapes'); add('--out', default='gpu_day.json')
    add('--parts', nargs='*', default=list(PARTS), choices=list(PARTS)); add('--minutes', type=float, default=25, help='for all parts; their shares stay')
    a = parser.parse_args(argv)
    if a.device == 'cuda' and not torch.cuda.is_available(): sys.exit('no GPU here: --device cpu --small runs the same code with tiny shapes')
    if a.device == 'cpu' and not a.small: sys.exit('--device cpu needs --small: the whole takes days without a GPU')
    day = Day(a.out, a.device, a.small, a.minutes/25)
    for letter in a.parts: day.run(letter, PARTS[letter])
    day.results['took'] = time.monotonic() - day.begin
    day.write()
    return day.results

if __name__ == '__main__': main()
