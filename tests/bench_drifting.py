"""How fast the drifting loss is: against the bare matrix products of the same sizes, a torch.cdist loop and plain broadcasting.

    python tests/bench_drifting.py                 # the paper's shape: one class of 256 tokens (some minutes on one CPU core)
    python tests/bench_drifting.py --tokens 32     # the same with fewer tokens
    python tests/bench_drifting.py --device cuda

Nothing here asserts a time: machines differ, and a busy one differs from itself. `tests/test_drifting.py` holds what must be true.
"""
import argparse, json, os, time
from dataclasses import replace
import torch
from drift_rae.drifting import DriftConfig, drift_loss, laplace_noise

TEMPERATURES = (.02, .05, .2)

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

def seconds(f, device, repeats=5):
    "Best of several, after one for warming up: processor time on the CPU (one thread; neighbours count less), wall time on a GPU"
    clock = time.process_time if device == 'cpu' else time.perf_counter
    best = float('inf')
    for i in range(repeats+1):
        if device != 'cpu': torch.cuda.synchronize()
        start = clock(); f()
        if device != 'cpu': torch.cuda.synchronize()
        if i or repeats == 0: best = min(best, clock()-start)
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

def compare(tokens=256, device='cpu', repeats=5, slow_tokens=4):
    "A list of rows (dicts): time per token, ratio to the floor, achieved GFLOP/s, extra memory in units of the distance matrices"
    gen, pos, neg = inputs(tokens, device)
    (B, N, D), T = gen.shape, gen.shape[1] + pos.shape[1] + neg.shape[1]
    targets, weights = torch.cat([gen, neg, pos], 1), torch.rand(B, N, T, device=device)
    d, V = torch.empty(B, N, T, device=device), torch.empty(B, N, D, device=device)
    product = 2*B*N*T*D # floating-point operations of one product
    distance = seconds(lambda: torch.bmm(gen, targets.transpose(1, 2), out=d), device, repeats)
    field = seconds(lambda: torch.bmm(weights, targets, out=V), device, repeats)
    del targets, weights, d, V
    on, noise = DriftConfig.preset('c'), torch.Generator(device).manual_seed(0)
    off = replace(on, perturbation='off')
    draw = seconds(lambda: [laplace_noise(min(16, B-i), N+neg.shape[1], D, generator=noise, device=device) for i in range(0, B, 16)], device, 2)
    small = tuple(x[:slow_tokens] for x in (gen, pos, neg))
    rows = []
    def row(name, time, products, floor, memory=None, share=1.):
        rows.append(dict(name=name, ms_per_token=1e3*time/B/share, to_floor=time/share/floor, gflops=products*product*share/time/1e9,
            memory=None if memory is None else memory/(4*B*N*T)))
    floor_off, floor_on = distance + 3*field, 4*distance + 3*field
    row('floor: 4 bare products', floor_off, 4, floor_off)
    for name, config, products, floor in (('ours, no perturbation', off, 4, floor_off), ('ours, perturbation', on, 7, floor_on)):
        if config is on: row('floor: 7 bare products', floor_on, 7, floor_on); row('drawing the noise alone', draw, 0, floor_on)
        f = lambda: drift_loss(gen, pos, neg, config=config, generator=noise)
        row(name, seconds(f, device, repeats), products, floor, peak_bytes(f, device) - 4*B*N*D) # the field itself is the result, not extra
        if config is off:
            row('torch.cdist, token by token', seconds(lambda: cdist_loop(*small), device, 2), 4, floor_off, share=slow_tokens/B)
            row('broadcasting, token by token', seconds(lambda: broadcasting(*small), device, 1), 4, floor_off, share=slow_tokens/B)
    return rows

def show(rows, title=''):
    "The rows as a table"
    print(title)
    print(f"{'':30}  ms/token  x floor  GFLOP/s  extra memory / distance matrices")
    for r in rows:
        memory = '' if r['memory'] is None else f"{r['memory']:.2f}"
        print(f"{r['name']:30}  {r['ms_per_token']:8.3f}  {r['to_floor']:7.2f}  {r['gflops']:7.1f}  {memory}")

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tokens', type=int, default=256)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads (processor time is summed over them)')
    parser.add_argument('--json', default='', help='also write the rows here')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows = compare(a.tokens, a.device)
    show(rows, f'torch {torch.__version__}, {a.device}, {a.tokens} tokens, 64 queries, 192 extra negatives, 256 positives, 768 channels, 3 temperatures')
    if a.json: open(a.json, 'w').write(json.dumps(rows, indent=1))
