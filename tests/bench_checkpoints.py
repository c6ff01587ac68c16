"""How long a checkpoint stops the training: `python tests/bench_checkpoints.py [GB]`, 1 GB of state on the CPU unless said otherwise.

Before: the training waits until the file is written and hashed. Now: it waits for the copy in memory."""
import sys, tempfile, time
from statistics import median
import torch
from drift_rae.engine.checkpoints import Checkpoints

def measure(gigabytes=1., times=3):
    "Seconds that a step is blocked, synchronously and in a thread; seconds that the thread takes"
    torch.set_num_threads(1)
    parts = 60
    state = dict(models={f'w{i}': torch.randn(int(gigabytes*1e9/4/parts)) for i in range(parts)})
    before, now, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(folder, {}, keep=1)
        for i in range(times):
            start = time.perf_counter()
            kept.save(2*i, state)
            middle = time.perf_counter()
            kept.save_later(2*i + 1, state)
            end = time.perf_counter()
            kept.wait()
            before.append(middle - start)
            now.append(end - middle)
            whole.append(time.perf_counter() - middle)
    return median(before), median(now), median(whole)

if __name__ == '__main__':
    before, now, whole = measure(*map(float, sys.argv[1:2]))
    print(f'blocked per checkpoint: {before:.2f} s before, {now:.2f} s now; the thread is done after {whole:.2f} s')
