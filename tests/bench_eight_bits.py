"""Short distillations of the digits with latents in float32 and in 8 bits: `python tests/bench_eight_bits.py [steps]`, about ten minutes on one core.

Writes nbs/results/eight_bits.json: the Frechet distance of the student by the judge, for each of five seeds, on the same 2,000 noises."""
import sys
from dataclasses import replace
from pathlib import Path
import torch
from drift_rae.distill import distill
from drift_rae.engine.files import versions, write_json
from drift_rae.engine.streams import image_noise
from drift_rae.flow import one_step
from drift_rae.parts.comparison import compare_digits
from drift_rae.parts.ingredients import load_parts
from drift_rae.parts.recipe import config_for
from drift_rae.worlds.bits import from_file, to_file
from drift_rae.worlds.latents import LatentStore

SEEDS = range(5)

def main(steps=150):
    torch.set_num_threads(1)
    store, rae, teacher = load_parts()
    rounded = from_file(to_file(store.latents, 'int8'), 'int8', store.latent_shape).float()
    stores = dict(float32=store, int8=LatentStore(rounded, store.counts))
    config = replace(config_for('tiny'), steps=steps)
    labels = torch.arange(10).repeat_interleave(200)
    noise, fd = image_noise(labels, store.latent_shape, seed=1_000_000), {k: [] for k in stores}
    for seed in SEEDS:
        for name, latents in stores.items():
            student, _ = distill(teacher, latents, config, seed=seed)
            with torch.no_grad(): made = torch.cat([one_step(student, z, y) for z, y in zip(noise.split(500), labels.split(500))])
            fd[name].append(compare_digits(dict(student=made), labels, rae)['student']['fd'])
            print(seed, name, fd[name][-1], flush=True)
    about = dict(steps=steps, seeds=list(SEEDS), fd=fd, config=config.recipe(), versions=versions(), made_by='tests/bench_eight_bits.py')
    write_json(Path(__file__).parents[1]/'nbs/results/eight_bits.json', about)

if __name__ == '__main__': main(*map(int, sys.argv[1:2]))
