"One torch thread per process, here and in every program that a test starts: see `limit_threads`"
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
import torch
torch.set_num_threads(1)

import pytest

@pytest.fixture(scope='module')
def forked_workers():
    import programs
    with programs.forked_workers(): yield

@pytest.fixture(scope='session')
def few_latents(tmp_path_factory):
    "The folder of `save_few_latents`, for runs of which only the course counts"
    import small_runs
    return small_runs.save_few_latents(tmp_path_factory.mktemp('latents')/'few')

def pytest_configure(config): config.addinivalue_line('markers', 'slow: minutes of computation, run only with -m slow')

# the longest first, so that no worker is left alone with one of them at the end; test_site comes later than test_browser,
# because both need the rendered site, and a worker that needs it while another one renders it has to wait
LONGEST = ['test_a_rebuild', 'test_signals', 'test_scale', 'test_run', 'test_done', 'test_geometry', 'test_browser', 'test_own']

def pytest_collection_modifyitems(config, items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST))) # stable: the others stay in their order
    if config.option.markexpr: return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow: run with -m slow'))

# The state of the process that a public call must leave as it was: the tests of this folder check it after each test

def global_state():
    "Threads, precision, types and modes of torch, and the working folder"
    return dict(threads=torch.get_num_threads(), precision=torch.get_float32_matmul_precision(), gradient=torch.is_grad_enabled(),
                dtype=torch.get_default_dtype(), deterministic=torch.are_deterministic_algorithms_enabled(),
                inference=torch.is_inference_mode_enabled(), cudnn=(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
                folder=os.getcwd())

@pytest.fixture(autouse=True)
def state_is_left_as_it_was():
    before = global_state()
    yield
    assert global_state() == before
