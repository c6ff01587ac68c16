"The whole chain at size b, on the CPU, once: photographs, latents, distillation, generator, images, metrics (random weights; slow)"
import json, os, resource, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SECONDS, GIB = 360, 16 # the limits of the test

def run(*words, cwd):
    "A program in its own process; what it printed"
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT/"tests"}', 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '2')})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout

def make_latents(folder):
    "Six pictures of two classes, and their latents [768, 16, 16] by an RAE of the released shape with random weights"
    from drift_rae.autoencoder import RAE
    from drift_rae.imagenet.folders import encode_folder
    from drift_rae.networks.vit import DECODERS, RAEDecoder, make_encoder
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    for i in range(6):
        at = Path(folder, 'pictures', f'class_{i % 2}')
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (8, 9, 3), dtype=np.uint8)).resize((288, 256)).save(at/f'{i}.png')
    rae = RAE(make_encoder('dinov2'), RAEDecoder(DECODERS['b'])).eval()
    assert rae.latent_shape == (768, 16, 16)
    rae.save_pretrained(f'{folder}/rae')
    encode_folder(rae, f'{folder}/pictures', f'{folder}/latents', batch=2)

def measure_images(folder):
    "One image of each class by the written generator, and their distance to the pictures by features of random weights"
    from drift_rae.evaluate import evaluate_images, load_extractor, load_reference
    from drift_rae.imagenet.folders import ClassFolder
    from drift_rae.metrics.images import TensorImages
    from drift_rae.sharing.sets import make_images
    judge = load_extractor('dinov2', 'random') # Inception's score needs more images
    pictures = ClassFolder(f'{folder}/pictures', 256)
    real = TensorImages(torch.stack([pictures.pixels(i) for i in range(len(pictures))]))
    made = make_images(generator=f'{folder}/run', per_class=1, block=2)
    metrics, record = evaluate_images(TensorImages(made.read(range(2)), **made.name), load_reference(real, judge), judge, k=1)
    Path(folder, 'metrics.json').write_text(json.dumps(dict(size=made.size, metrics=metrics, record=record)))

@pytest.mark.slow
def test_the_whole_chain_at_size_b(tmp_path):
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run('-c', f'import test_chain; test_chain.make_latents({str(tmp_path)!r})', cwd=tmp_path)
    said = run('-m', 'drift_rae.distill', '--model', 'b', '--teacher', 'fresh', '--latents', 'latents', '--autoencoder', 'rae', '--out', 'run', '--steps', 3, '--n_class', 2,
        '--n_pos', 2, '--n_neg', 2, '--n_extra_neg', 2, '--monitor_every', 3, '--changes', 'precision=float32 monitor_samples=4 keep=1 lr=(1e-4,1e-4)', cwd=tmp_path)
    assert '3/3' in said
    made = tmp_path/'run'
    assert {'generator.safetensors', 'generator.json', 'log.csv', 'monitor.json', 'done.json'} <= {p.name for p in made.iterdir()}
    about = json.loads((made/'generator.json').read_text())
    assert about['model']['hidden_size'] == [768, 2048] and about['model']['in_channels'] == 768
    rows = (made/'log.csv').read_text().splitlines()
    assert len(rows) == 1 + 3
    losses = [float(r.split(',')[rows[0].split(',').index('loss')]) for r in rows[1:]]
    assert np.isfinite(losses).all() and len(json.loads((made/'monitor.json').read_text())) == 1
    run('-c', f'import test_chain; test_chain.measure_images({str(tmp_path)!r})', cwd=tmp_path)
    found = json.loads((tmp_path/'metrics.json').read_text())
    assert found['size'] == [256, 256] and np.isfinite(found['metrics']['fd']) and found['record']['images']['network'] == 'student'
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, cpu, peak = time.perf_counter() - start, now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime, now.ru_maxrss/2**20
    print(f'wall {wall:.0f} s, CPU {cpu:.0f} s, peak of one process {peak:.1f} GiB')
    assert cpu < SECONDS and peak < GIB
