"The generator as a person uses it: names, kinds of numbers, bounded memory, threads, cards, sets of files"
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drift_rae import RAE, OneStepGenerator
from drift_rae.engine.parameters import ParameterError
from drift_rae.parts import generator as module


@pytest.fixture(scope='module')
def student(): return OneStepGenerator.from_pretrained('tiny')


@pytest.fixture(scope='module')
def animals(student):
    "The same generator with names for its classes"
    names = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibis', 'jay']
    return OneStepGenerator(student.model, student.autoencoder, dict(student.about, class_names=names))


@pytest.mark.parametrize('labels', [3, '3', np.int64(3), [3], ['3'], (np.int32(3),), np.array([3]), torch.tensor([3]), range(3, 4)])
def test_labels_of_every_kind(student, labels): assert torch.equal(student.sample(labels), student.sample([3]))


def test_labels_by_name(animals, student, tmp_path):
    assert torch.equal(animals.sample(['cat', 'ant', 'cat'], seed=4), student.sample([2, 0, 2], seed=4))
    animals.save_pretrained(tmp_path)
    again = OneStepGenerator.from_pretrained(tmp_path)
    assert again.class_names == animals.class_names and torch.equal(again.sample('cat'), student.sample(2))
    assert 'cat' in (tmp_path/'README.md').read_text() and (tmp_path/'samples.png').is_file()
    with pytest.raises(ParameterError, match="label 'cow'.*ant, bee"): animals.sample('cow')


@pytest.mark.parametrize('wrong', [1.7, [1.7], -1, 10, '123', [True], None, [[1]], {'a': 1}, torch.tensor([.5]), [3, -1]])
def test_wrong_labels(student, wrong):
    with pytest.raises(ParameterError, match='accepted'): student.sample(wrong)


@pytest.mark.parametrize('options', [dict(batch=0), dict(batch=1.5), dict(seed=1.5), dict(seed='a'), dict(seed=2**64), dict(seed=[1, 2, 3]), dict(output='jpeg')])
def test_wrong_options(student, options):
    with pytest.raises(ParameterError, match='accepted|seeds'): student.sample([1, 2], **options)


@pytest.mark.parametrize('seed', [3, np.int64(3), np.uint64(3), torch.tensor(3)])
def test_seeds_of_every_kind(student, seed): assert torch.equal(student.sample([1, 2], seed), student.sample([1, 2], 3))


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-5), (torch.bfloat16, .15), (torch.float16, .02)])
def test_every_precision(student, dtype, bound):
    other = OneStepGenerator.from_pretrained('tiny', device='cpu', dtype=dtype)
    assert next(other.parameters()).dtype == dtype
    images = other.sample(range(10))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, student.sample(range(10)), atol=bound, rtol=0)


def test_no_more_noise_than_a_batch(student, monkeypatch):
    drawn, draw = [], module._noise
    monkeypatch.setattr(module, '_noise', lambda images, shape: drawn.append(len(images)) or draw(images, shape))
    whole = student.sample([1, 2, 1]*20, seed=5, batch=60)
    parts = student.sample([1, 2, 1]*20, seed=5, batch=7)
    assert max(drawn[1:]) == 7
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_threads_share_a_generator(student):
    student.train() # stays in evaluation mode
    wanted = student.sample(range(10), seed=1)
    with ThreadPoolExecutor(4) as pool: made = list(pool.map(lambda _: student.sample(range(10), seed=1), range(8)))
    assert all(torch.equal(m, wanted) for m in made)


def test_a_set_of_files_goes_on_where_it_was(student, tmp_path):
    student.save_images(tmp_path, n=25, batch=8, progress=False)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f'{i:06d}.png' for i in range(25)]
    before = {f: f.read_bytes() for f in files}
    for f in files[10:13]: f.unlink()
    student.save_images(tmp_path, n=25, batch=8, progress=False)
    assert {f: f.read_bytes() for f in sorted(tmp_path.iterdir())} == before
    wanted = student.sample([i % 10 for i in range(25)], output='numpy')
    assert (np.stack([np.array(Image.open(f)) for f in files]) == wanted).all()


def test_outputs(student):
    images = student.sample([1, 2])
    assert student.sample([1, 2], output='numpy').shape == (2, 16, 16, 3)
    assert [p.size for p in student.sample([1, 2], output='pil')] == [(16, 16)]*2
    assert torch.equal(student([1, 2]), images) and student.sample([]).shape == (0, 3, 16, 16)
    assert len(repr(student).splitlines()) <= 6


def test_push_to_hub_hands_over_the_whole_folder(student, monkeypatch):
    seen = {}
    class Api:
        def __init__(self, *a, **k): pass
        def create_repo(self, **k): return type('Url', (), dict(repo_id=k['repo_id']))()
        def upload_folder(self, folder_path, **k): seen.update({p.name: p.stat().st_size for p in Path(folder_path).iterdir()})
    monkeypatch.setattr('huggingface_hub.hub_mixin.HfApi', Api)
    student.push_to_hub('me/digits')
    assert {'generator.safetensors', 'generator.json', 'README.md', 'samples.png'} <= set(seen)


@pytest.fixture(scope='module')
def rae(): return RAE.from_pretrained('tiny')


def test_the_autoencoder_takes_pictures(rae):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    wanted = rae.encode(pixels.permute(0, 3, 1, 2).float()/255)
    for given in (pixels, pixels.numpy(), pixels.permute(0, 3, 1, 2), [Image.fromarray(p.numpy()) for p in pixels]):
        assert torch.equal(rae.encode(given), wanted)
    assert rae.encode(Image.new('RGB', (40, 30)), crop=True).shape == (1, 32, 4, 4)


@pytest.mark.parametrize('images', [
    torch.rand(1, 3, 20, 20), torch.rand(1, 3, 16, 18), 255*torch.rand(1, 3, 16, 16), torch.full((1, 3, 16, 16), torch.nan),
    torch.rand(1, 1, 16, 16), torch.rand(1, 3, 1, 1), torch.zeros(1, 3, 16, 16, dtype=torch.int64), Image.new('I;16', (16, 16)),
    Image.new('RGB', (20, 20)), 'a.png', [], None, np.zeros((2, 16, 16), np.uint8)])
def test_the_autoencoder_refuses(rae, images):
    with pytest.raises(ParameterError, match='accepted|empty'): rae.encode(images)
