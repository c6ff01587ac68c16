"""A program for test_rebuilds.py: what `rebuild=1` of three chapters runs, with small networks and two steps of training.
First in two processes into the folder `two`; once more, with nothing to do; then two of the three in one process into `one`.

Workers import this file too, so what is replaced here is replaced in them."""
import os
import sys
from dataclasses import replace
from pathlib import Path

import small_runs
import torch
from drift_rae.engine.streams import image_noise
from drift_rae.flow import sample
from drift_rae.parts import bench, workers

small_runs.CLASSES = 10
full = bench.Row.config
bench.Row.config = lambda row, model='tiny': replace(full(row), steps=2, n_class=2, n_pos=4, n_neg=4, n_extra_neg=2)
bench.results_folder = lambda: Path('results')

from drift_rae import guided, steps, trajectories # with these rows


class Small:
    "In place of a bench and of a space: latents of 2 x 2, and a figure that is no distance"
    def __init__(self, name=''):
        self.name, self.teacher, self.store = name, small_runs.teacher(torch.float32), small_runs.store()
        self.teacher.shift = 1.
        self.labels = torch.arange(small_runs.CLASSES)

    def noise(self, seed): return image_noise(self.labels, self.store.latent_shape, seed)

    def evaluate(self, generate, per_class, noise_seed, more=True):
        made = torch.cat([generate(z[None], y[None]) for z, y in zip(self.noise(noise_seed), self.labels)])
        return dict(fd=made.square().mean().item())

    def endpoints(self, seed): return self.noise(seed), self.labels, sample(self.teacher, self.noise(seed), self.labels, steps=3)


measured, BUDGET = trajectories.measure, 2000
trajectories.measure = lambda method, space, seed, rate: measured(method, space, seed, BUDGET, rate=rate)
trajectories.shared_spaces = lambda: {name: Small(name) for name in ('RAE', 'VAE')}
trajectories.TRIED = dict(matching=(1e-3,))
for module in (guided, steps): module.shared_bench = Small
for side in set(guided.GRID) - {'null label', 'field .2'}:
    for grid in (guided.GRID, guided.FURTHER, guided.WHOLE): grid.pop(side, None)
guided.LATER.clear()
guided.REPORTED = guided.SEEDS = (1,)
steps.SEEDS, steps._WHO['teacher'] = (0,), (steps._teacher, (1,))
workers.PRELOAD = ('drift_rae.parts.bench', 'torch._dynamo') # the optimiser imports the latter, which takes longer than these runs


def go(folder):
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)


go(Path(sys.argv[1])/'two')
if __name__ == '__main__':
    for processes in (2, 1): # the second time there is nothing to do
        trajectories.rebuild_trajectories(0, processes)
        guided.rebuild_guided(processes)
        steps.rebuild_steps(processes)
        print('---', flush=True)
    go(Path(sys.argv[1])/'one')
    trajectories.rebuild_trajectories(0, 1)
    steps.rebuild_steps(1)
