"""How fast the drifting loss is: against the bare matrix products of the same sizes, a torch.cdist loop and plain broadcasting.

    python tests/bench_drifting.py                 # the paper's shape: one class of 256 tokens (some minutes on one CPU core)
    python tests/bench_drifting.py --tokens 32     # the same with fewer tokens
    python tests/bench_drifting.py --pieces        # also what other ways of doing each piece cost
    python tests/bench_drifting.py --device cuda   # the default where there is a GPU

What is compared is timed in turns, over and over, and the best turn of each counts, because a machine that is busy with other things slows
all of them. Nothing here asserts a time. `tests/test_drifting.py` holds what must be true.

The aim is 1.5 times the floor: the bare products of the call's shape, one for the distances and three for the fields; with perturbation four
for the distances, the first of which is for the mean distance. Ours does one product less with perturbation, because the distances to the
positives are linear in the noise. The noise itself is no product, 196,608 normal numbers per token: with it counted, perturbation stays
beyond the aim. Nearly all of its time is the generator's random bits, and no other generator that was tried is much faster; other bits are
other noise, and the saved runs of 06_distill could not be drawn again. What is left above the floor is the products of the parts, which are
smaller than those of the whole and less efficient, a reading of the samples for their norms, the softmaxes, the additions of the fields, and
with perturbation the noise and the moved samples. How many rows to take at a time is a compromise: a chunk costs the same few hundred calls
however many rows it has, and many rows leave a processor's caches. The original's preset costs more than the default, because its y-softmax
and its floor need the logarithm of four sums per temperature, and its root mean square needs all weights twice. For the root mean square,
keeping the fields is the fastest way and the only one that needs more than three distance matrices; taking them twice costs three products
more, adding their weights one.
"""
import argparse, json, math, os, time
from dataclasses import replace
import numpy as np
import torch
from drift_rae import drifting
from drift_rae.drifting import DriftConfig, distances, drift_loss, laplace_noise
from drift_rae.parts.weights import Samples, weighted_difference

TEMPERATURES = (.02, .05, .2)
ON = DriftConfig.preset('c')
OFF = replace(ON, perturbation='off')
RMS = replace(OFF, normalisation='rms')

def inputs(tokens, device='cpu', n=64, extra=192, m=256, dim=768, seed=0):
    "gen, pos, neg of the paper's shape [tokens, samples, 768]"
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, k, dim, generator=g).to(device) for k in (n, m, extra))

def cdist_loop(gen, pos, neg, temperatures=TEMPERATURES):
    "One token at a time, torch.cdist anew for each temperature, two products: how most published versions do it. Unit fields, added"
    out = torch.zeros_like(gen)
    for b in range(len(gen)):
        negatives = torch.cat([gen[b], neg[b]])
        scale = torch.cdist(gen[b], torch.cat([negatives, pos[b]])).mean()
        for tau in temperatures:
            to_pos, to_neg = torch.cdist(gen[b], pos[b]), torch.cdist(gen[b], negatives)
            to_neg.fill_diagonal_(float('inf'))
            V = (-to_pos/(tau*scale)).softmax(-1) @ pos[b] - (-to_neg/(tau*scale)).softmax(-1) @ negatives
            out[b] += V/V.norm(dim=-1, keepdim=True)
    return out

def broadcasting(gen, pos, neg, temperatures=TEMPERATURES):
    "All differences of one token at once, [N, N+P+M, D]; of all tokens they would fill the machine"
    out = torch.zeros_like(gen)
    for b in range(len(gen)):
        negatives = torch.cat([gen[b], neg[b]])
        to_pos, to_neg = pos[b] - gen[b][:, None], negatives - gen[b][:, None]
        d_pos, d_neg = to_pos.norm(dim=-1), to_neg.norm(dim=-1)
        scale = torch.cat([d_neg, d_pos], 1).mean()
        d_neg.fill_diagonal_(float('inf'))
        for tau in temperatures:
            p, q = (-d_pos/(tau*scale)).softmax(-1), (-d_neg/(tau*scale)).softmax(-1)
            V = (p[..., None]*to_pos).sum(1) - (q[..., None]*to_neg).sum(1)
            out[b] += V/V.norm(dim=-1, keepdim=True)
    return out

def seconds(functions, device, repeats=7):
    "Best time of each of a dict of functions, run in turns after a first for warming up: processor time on a CPU (neighbours count less), wall time on a GPU"
    clock, best = time.process_time if device == 'cpu' else time.perf_counter, dict.fromkeys(functions, math.inf)
    for i in range(repeats+1):
        for name, f in functions.items():
            if device != 'cpu': torch.cuda.synchronize()
            start = clock(); f()
            if device != 'cpu': torch.cuda.synchronize()
            if i: best[name] = min(best[name], clock()-start)
    return best

def peak_bytes(f, device):
    "Most bytes that `f` held at once beyond what was there before: the allocator's count"
    if device != 'cpu':
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        f(); torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99') # the profiler talks to itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p: f()
    held = peak = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        held += e.nbytes(); peak = max(peak, held)
    return peak

class Floor:
    "The bare products of the call's shape: gen with all targets, and weights with all targets"
    def __init__(self, gen, pos, neg):
        self.gen, self.targets = gen, torch.cat([gen, neg, pos], 1)
        (self.B, self.N, self.D), self.T = gen.shape, self.targets.shape[1]
        self.w, self.d, self.V = (torch.rand(self.B, self.N, k, device=gen.device) for k in (self.T, self.T, self.D))
        self.functions = {'distance': lambda: torch.bmm(self.gen, self.targets.mT, out=self.d), 'field': lambda: torch.bmm(self.w, self.targets, out=self.V)}

def laplace_rows(B, K, D, generator, device):
    "The noise of one call, in the blocks in which it is drawn"
    for i in range(0, B, 8): laplace_noise(min(8, B-i), K, D, generator=generator, device=device)

def compare(tokens=256, device='cpu', repeats=7, slow_tokens=4):
    "A list of rows (dicts): time per token, ratio to the floor, achieved GFLOP/s, extra memory in units of the distance matrices"
    gen, pos, neg = inputs(tokens, device)
    floor, noise, side = Floor(gen, pos, neg), torch.Generator(device).manual_seed(0), 2048 if device == 'cpu' else 8192
    square = torch.randn(side, side, device=device)
    B, N, T, D = floor.B, floor.N, floor.T, floor.D
    original = DriftConfig.preset('deng2026')
    ours = {'ours, no perturbation': OFF, 'ours, perturbation': ON, "ours, the original's preset": original}
    calls = {k: lambda c=c: drift_loss(gen, pos, neg, config=c, generator=noise) for k, c in ours.items()}
    t = seconds(floor.functions | calls | {'draw': lambda: laplace_rows(B, T-pos.shape[1], D, noise, device), 'square': lambda: square @ square}, device, repeats)
    small = tuple(x[:slow_tokens] for x in (gen, pos, neg))
    slow = seconds({'torch.cdist, token by token': lambda: cdist_loop(*small), 'broadcasting, token by token': lambda: broadcasting(*small)}, device, 1)
    del floor
    product, off, on = 2*B*N*T*D, t['distance'] + 3*t['field'], 4*t['distance'] + 3*t['field'] # operations of one product; the floors
    rows = []
    def row(name, time, flop, floor, **more):
        rows.append(dict(name=name, ms_per_token=1e3*time/B, to_floor=time/floor, gflops=flop/time/1e9, of_machine=flop/time*t['square']/(2*side**3), **more))
    memory = lambda k: (peak_bytes(calls[k], device) - 4*B*N*D)/(4*B*N*T) # the field itself is the result, not extra
    row('floor: 4 bare products', off, 4*product, off)
    for k in ('ours, no perturbation', "ours, the original's preset"): row(k, t[k], 4*product, off, memory=memory(k))
    for k, v in slow.items(): row(k, v*B/slow_tokens, 4*product, off)
    row('floor: 7 bare products', on, 7*product, on)
    row('ours, perturbation', t['ours, perturbation'], 7*product, on, memory=memory('ours, perturbation'))
    row('  of which drawing the noise', t['draw'], 0, on)
    row('  the rest', t['ours, perturbation'] - t['draw'], 7*product, on)
    return rows

def show(rows, title=''):
    "The rows as a table"
    print(title)
    print(f"{'':30}  ms/token  x floor  GFLOP/s  of a large product's  extra memory / distance matrices")
    for r in rows:
        memory = f"{r['memory']:.2f}" if 'memory' in r else ''
        print(f"{r['name']:30}  {r['ms_per_token']:8.3f}  {r['to_floor']:7.2f}  {r['gflops']:7.1f}  {r['of_machine']:20.0%}  {memory}")

# other ways

def box_muller(bits, out):
    "Normal numbers from pairs of 32 random bits"
    bits, half = bits.view(torch.int32).view(2, -1), out.numel()//2
    a, b = out.view(-1)[:half], out.view(-1)[half:]
    radius = bits[0].mul(2.**-32).add_(.5).clamp_(min=2.**-33).log_().mul_(-2).sqrt_()
    angle = bits[1].mul(2*math.pi*2.**-32)
    torch.cos(angle, out=a).mul_(radius); torch.sin(angle, out=b).mul_(radius)
    return out

def found_for_rms(gen, pos, neg, config):
    "Samples, unit of coordinates and a function that goes through all fields"
    s = Samples(gen, pos, neg)
    scale, kept = drifting._mean_distance(s, config, None, 1)
    unit, coordinate = drifting._units(s, config, scale)
    return s, coordinate, lambda: drifting._fields(s, config, unit, kept, [None])

def rms_keeping_fields(gen, pos, neg, config):
    "The root mean square's field with the field of every temperature kept until the last row"
    with torch.no_grad():
        s, coordinate, found = found_for_rms(gen, pos, neg, config)
        n = len(config.temperatures)
        parts, square, V = s.new(n, s.B, s.N, s.D, fill=None), s.new(n, s.B), s.new(s.B, s.N, s.D)
        for t, r, samples, w, _ in found():
            parts[t, r] = weighted_difference(*samples, *w)
            square[t, r] = parts[t, r].square().sum((1, 2))
        mean_square = (square/coordinate**2).mean(1)/(s.N*s.D)
        for part, q in zip(parts, mean_square): V.addcdiv_(part, (coordinate*q.sqrt())[:, None, None])
    return V

def rms_fields_twice(gen, pos, neg, config):
    "The same with every field computed twice"
    with torch.no_grad():
        s, coordinate, found = found_for_rms(gen, pos, neg, config)
        square, V = s.new(len(config.temperatures), s.B), s.new(s.B, s.N, s.D)
        field = s.new(s.size, s.N, s.D, fill=None)
        for t, r, samples, w, _ in found():
            F = weighted_difference(*samples, *w, out=field[:len(w[0])])
            square[t, r] = torch.linalg.vector_norm(F, dim=(1, 2)).square()
        rms = ((square/coordinate**2).mean(1)/(s.N*s.D)).sqrt()
        for t, r, samples, w, _ in found():
            F = weighted_difference(*samples, *w, out=field[:len(w[0])])
            V[r].addcdiv_(F, (coordinate[r]*rms[t])[:, None, None])
    return V

def pieces(tokens=32, repeats=9, chunk=8):
    "Rows (piece, way, time over the floor with perturbation) on the CPU; the first way of each piece is the one that is used"
    gen, pos, neg = inputs(tokens)
    floor, g, B, N, K, D = Floor(gen, pos, neg), torch.Generator().manual_seed(0), len(gen), 64, 256, 768
    rows = [slice(i, i+chunk) for i in range(0, B, chunk)]
    noise, moved, bits = torch.randn(B, K, D), torch.empty(chunk, K, D), torch.empty(chunk*K*D//2, dtype=torch.int64)
    weights, one = torch.rand(B, N, K), torch.ones(B, 1, 1)
    sfc, pcg, array = np.random.Generator(np.random.SFC64(0)), np.random.Generator(np.random.PCG64(0)), np.empty((chunk, K, D), np.float32)
    gram, field, along = torch.rand(B, N, K), torch.empty(chunk, N, D), torch.rand(B, N, K)
    both = torch.empty(chunk, 2*K, D)
    each = lambda f: lambda: [f(r) for r in rows]
    def parts(r, n): return zip((gen[r], neg[r]), n.split((N, K-N), 1), moved.split((N, K-N), 1))
    def anew(r):
        for tau in TEMPERATURES: [torch.addcmul(x, n, one[r], value=tau, out=o) for x, n, o in parts(r, noise[r])]
    def in_place(r):
        for x, n, o in parts(r, noise[r]): torch.add(x, n, alpha=TEMPERATURES[0], out=o)
        for a, b in zip(TEMPERATURES, TEMPERATURES[1:]): moved.add_(noise[r], alpha=b-a)
    def moved_fields(r):
        in_place(r)
        for _ in TEMPERATURES: field.baddbmm_(weights[r], moved, alpha=-1)
    def unmoved_fields(r):
        for _ in TEMPERATURES:
            field.baddbmm_(weights[r][..., :N], gen[r], alpha=-1).baddbmm_(weights[r][..., N:], neg[r], alpha=-1).baddbmm_(weights[r], noise[r], alpha=-1)
    def from_products(r):
        product = torch.bmm(noise[r, :N], pos[r].mT)
        for tau in TEMPERATURES: distances(gen[r], pos[r], products=torch.add(gram[r], product, alpha=tau))
    def one_product_each(r):
        for tau in TEMPERATURES: distances(gen[r], pos[r])
    def three(r):
        for _ in TEMPERATURES:
            torch.bmm(weights[r], pos[r], out=field)
            field.baddbmm_(weights[r][..., :N], gen[r], alpha=-1).baddbmm_(weights[r][..., N:], neg[r], alpha=-1)
    def copied(r):
        torch.cat([gen[r], neg[r], pos[r]], 1, out=both)
        for _ in TEMPERATURES: torch.bmm(floor.w[r], both, out=field)
    stacked_w, stacked = torch.rand(chunk, 3*N, K), torch.empty(chunk, 3*N, D)
    def stack(r):
        torch.bmm(stacked_w, pos[r], out=stacked)
        stacked.baddbmm_(stacked_w[..., :N], gen[r], alpha=-1).baddbmm_(stacked_w[..., N:], neg[r], alpha=-1)
    loss = lambda config, chunk=None: lambda: drift_loss(gen, pos, neg, config=config, generator=g, chunk=chunk)
    table = {'drawing the noise': {
            'torch normal_': each(lambda r: moved.normal_(generator=g)),
            'its random bits alone (uniform_)': each(lambda r: moved.uniform_(generator=g)),
            'torch 64-bit integers, Box-Muller': each(lambda r: box_muller(bits.random_(-2**63, None, generator=g), moved)),
            'numpy SFC64 integers, Box-Muller': each(lambda r: box_muller(torch.from_numpy(sfc.integers(-2**63, 2**63-1, bits.numel())), moved)),
            'numpy standard_normal (PCG64)': each(lambda r: pcg.standard_normal(out=array, dtype=np.float32))},
        'moving the samples, three temperatures': {'from one temperature to the next, in place': each(in_place), 'from the clean samples each time': each(anew)},
        'fields of the negatives, moved': {'move, then multiply': each(moved_fields), 'multiply samples and noise apart': each(unmoved_fields)},
        'distances to the positives, moved': {'from two products': each(from_products), 'one product per temperature': each(one_product_each)},
        'three fields, not moved': {'three lists where they lie': each(three), 'copied into one first': each(copied), 'temperatures stacked': each(stack)},
        'whole call, no perturbation': {'as many rows as chosen': loss(OFF), **{f'{c} rows at a time': loss(OFF, c) for c in (2, 8, 32)}},
        'whole call, perturbation': {'as many rows as chosen': loss(ON), **{f'{c} rows at a time': loss(ON, c) for c in (2, 16, 32)}},
        'whole call, root mean square': {'weights twice, added; one more product': loss(RMS), 'fields twice': lambda: rms_fields_twice(gen, pos, neg, RMS),
            'fields kept': lambda: rms_keeping_fields(gen, pos, neg, RMS)}}
    t = seconds(floor.functions | {(a, b): f for a, ways in table.items() for b, f in ways.items()}, 'cpu', repeats)
    off, on = t['distance'] + 3*t['field'], 4*t['distance'] + 3*t['field']
    return [(a, b, t[a, b]/(off if 'no perturbation' in a or 'root' in a or 'not moved' in a else on)) for a, ways in table.items() for b in ways]

def show_pieces(rows):
    "The pieces as a table"
    print(f"{'piece':40}{'way (the first is used)':44}x floor")
    for i, (a, b, x) in enumerate(rows): print(f"{a if i == 0 or rows[i-1][0] != a else '':40}{b:44}{x:7.2f}")

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tokens', type=int, default=256)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads (processor time is summed over them)')
    parser.add_argument('--pieces', action='store_true', help='also time the pieces and the other ways of doing them, on the CPU')
    parser.add_argument('--json', default='', help='also write the rows here')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows = compare(a.tokens, a.device)
    show(rows, f'torch {torch.__version__}, {a.device}, {a.tokens} tokens, 64 queries, 192 extra negatives, 256 positives, 768 channels, 3 temperatures')
    if a.pieces: show_pieces(pieces(min(a.tokens, 32)))
    if a.json: open(a.json, 'w').write(json.dumps(rows, indent=1))
