"""What `test_nodes.py` runs on several machines: `python -m node_runs FOLDER MACHINES PAUSE`, in this folder, on each of them.

The folder is not shared: each machine has its own below it, named after the machine."""
import platform, sys, time
from pathlib import Path
import torch
import small_runs
from drift_rae.distill import distill
from drift_rae.engine.launch import LaunchError, is_main, launch

def work(folder, pause):
    "A distillation of eight steps, with a checkpoint after every second one"
    def wait(step, row, average):
        if is_main(): print(f'finished step {step + 1}', flush=True)
        time.sleep(pause)
    where = Path(folder, platform.node())
    figures, weights = small_runs.result(*distill(small_runs.teacher(), small_runs.store(), small_runs.config(steps=8), folder=where, callback=wait))
    if is_main(): torch.save(dict(figures=figures, weights=weights), f'{folder}/result.pt')

def main(folder, machines, pause):
    import node_runs # other processes know this file by its name only
    try: launch(node_runs.work, folder, float(pause), nproc=1, nnodes=int(machines), rdzv='10.77.0.1:29400')
    except LaunchError as e: sys.exit(f'LaunchError: {str(e).splitlines()[0]}')

if __name__ == '__main__': main(*sys.argv[1:])
