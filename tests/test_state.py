"Public calls leave threads, random numbers, precision, gradient mode and default type as they were, also when they fail"
import contextlib, io
import numpy as np
import pytest, torch
import wrong
from conftest import global_state
from drift_rae import autoencoder, evaluate, flow
from drift_rae.engine import training
from drift_rae.metrics import extractors, features, images
from drift_rae.worlds import judge, vae

def fails(x): raise RuntimeError('the extractor fails')

@contextlib.contextmanager
def same_state(dtype=torch.float32):
    "With two threads and medium precision, which no call may change"
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision('medium')
    torch.manual_seed(5)
    try:
        before, random, legacy = global_state(), torch.get_rng_state(), np.random.get_state()[1].copy()
        yield
        assert global_state() == before
        assert torch.equal(torch.get_rng_state(), random), 'the global generator has moved'
        assert (np.random.get_state()[1] == legacy).all()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)

CALLS = dict(
    sample_images=lambda d: images.sample_images(lambda rank: wrong.noise_images()(), d/'b'),
    extract=lambda d: features.extract(wrong.noise_images()(), wrong.toy()),
    failing_extractor=lambda d: pytest.raises(RuntimeError, features.extract, wrong.noise_images()(),
                                              extractors.Extractor('x', fails, 12, '', '')),
    train_encoder=lambda d: autoencoder.train_encoder(wrong.x4(), [0, 1, 2, 3], steps=1, batch=4),
    train_decoder=lambda d: autoencoder.train_decoder(wrong.rae().encoder, wrong.x4(), steps=1, batch=4),
    train_teacher=lambda d: flow.train_teacher(wrong.z4(), torch.arange(4), steps=1),
    sample=lambda d: wrong.gen().sample([1, 2]),
    wrong_label=lambda d: pytest.raises(ValueError, wrong.gen().sample, [77]),
    flow_sample=lambda d: flow.sample(wrong.teacher(), wrong.z4(), [0, 1, 2, 3], steps=3),
    encode=lambda d: wrong.rae().encode(wrong.x4()),
    reference=lambda d: evaluate.load_reference(wrong.noise_images()(), wrong.toy()),
    kernel_distance=lambda d: evaluate.kernel_distance(wrong.feats(), wrong.feats(), subset_size=10),
    random_extractor=lambda d: extractors.load_extractor('inception', 'random'),
    failing_training=lambda d: pytest.raises(ValueError, training.fit, torch.nn.Linear(1, 1), None, steps=1))

@pytest.mark.parametrize('name', CALLS)
def test_a_call_leaves_the_state_as_it_was(name, tmp_path):
    for make in (wrong.gen, wrong.rae, wrong.teacher, wrong.toy): make() # loading is not what is measured here
    layer = torch.nn.Linear(1, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        if name == 'failing_training':
            with same_state(): pytest.raises(ValueError, training.fit, layer, None, steps=1)
        else:
            with same_state(): CALLS[name](tmp_path)
