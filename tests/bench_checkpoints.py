"""How long a checkpoint stops the training: `python tests/bench_checkpoints.py [GB]`, 1 GB of state on the CPU unless said otherwise.

Before: the training waits until the file is written and hashed. Now: it waits for the copy in memory. Writes nbs/results/checkpoints.json."""
import os, sys, tempfile, time
from pathlib import Path
from statistics import median
import torch
from drift_rae.engine.checkpoints import Checkpoints
from drift_rae.engine.files import versions, write_json

def measure(gigabytes=1., times=3):
    "Seconds that a step is blocked, synchronously and in a thread; seconds that the thread takes; seconds of checking and reading"
    torch.set_num_threads(1)
    parts = 60
    state = dict(models={f'w{i}': torch.randn(int(gigabytes*1e9/4/parts)) for i in range(parts)})
    found = dict(before=[], now=[], thread=[], load=[])
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(folder, {}, keep=1)
        for i in range(times):
            start = time.perf_counter()
            kept.save(2*i, state)
            middle = time.perf_counter()
            kept.save_later(2*i + 1, state)
            end = time.perf_counter()
            kept.wait()
            written = time.perf_counter()
            kept.load()
            for k, seconds in zip(found, (middle - start, end - middle, written - middle, time.perf_counter() - written)): found[k].append(seconds)
    return {k: median(v) for k, v in found.items()}

def machine():
    "The processor, its logical cores, and how many processes wanted to run in the last minute"
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    name = next((l.partition(':')[2].strip() for l in lines if l.startswith('model name')), 'unknown')
    return dict(processor=name, cores=os.cpu_count(), load=round(os.getloadavg()[0], 1))

if __name__ == '__main__':
    gigabytes = float(sys.argv[1]) if sys.argv[1:] else 1.
    found = measure(gigabytes)
    print(f"blocked per checkpoint: {found['before']:.2f} s before, {found['now']:.2f} s now; the thread is done after {found['thread']:.2f} s; checked and read in {found['load']:.2f} s")
    about = dict(gigabytes=gigabytes, seconds=found, machine=machine(), versions=versions(), made_by='tests/bench_checkpoints.py')
    write_json(Path(__file__).parents[1]/'nbs/results/checkpoints.json', about)
