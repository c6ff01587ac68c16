"""2,000 random inputs in six kinds: each ends in a result or in a clear message, and no file is changed.

The kinds are parameters of the main program, `changes`, manifests of latent stores, descriptions of checkpoints, reference
files and image files. The cases are the same in each run."""
import contextlib, functools, io, json, os, string, tempfile, warnings
from pathlib import Path
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
import wrong
from drift_rae import distill, evaluate
from drift_rae.engine.checkpoints import Checkpoints
from drift_rae.engine.parameters import ParameterError, check_parameters
from drift_rae.metrics import images
from drift_rae.parts import recipe
from drift_rae.worlds import latents
from drift_rae.worlds.shards import digest_json

def cases(n): return settings(max_examples=n, deadline=20_000, derandomize=True, database=None,
                              suppress_health_check=list(HealthCheck))

def tried(call):
    "Whether a call gave a result; a clear message counts as none, and every other exception is an error of the test"
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: call()
        except ParameterError as e:
            assert 10 < len(str(e)) < 2000
            return False
        return True

@functools.cache
def template(kind):
    "The bytes of each file of a small example, in memory"
    with tempfile.TemporaryDirectory() as d, contextlib.chdir(d), contextlib.redirect_stdout(io.StringIO()):
        dict(store=lambda: wrong.saved_store('x'), run=lambda: wrong.small_run('x'), npz=lambda: wrong.statistics_file(),
             images=lambda: wrong.npz(arr_0=wrong.pixels()), png=lambda: wrong.picture('a.png'))[kind]()
        return {p.relative_to(d).as_posix(): p.read_bytes() for p in Path(d).rglob('*') if p.is_file()}

@contextlib.contextmanager
def files(kind, **changes):
    "The example in an empty folder, with some contents replaced; checks that the call changes nothing"
    contents = {**template(kind), **changes}
    with tempfile.TemporaryDirectory() as d:
        for name, data in contents.items():
            path = Path(d)/name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(d)
        for name, data in contents.items(): assert (Path(d)/name).read_bytes() == data, name

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 50), st.floats(), st.text(max_size=8),
                    st.sampled_from([10**400, -1, 2**64, 'tiny', '../x', '/etc/passwd', float('nan')]))
values = st.recursive(scalars, lambda s: st.one_of(st.lists(s, max_size=4), st.dictionaries(st.text(max_size=4), s, max_size=3)), max_leaves=6)

@cases(400)
@given(st.dictionaries(st.sampled_from([*recipe.RULES, 'sede', 'modle']), values, max_size=4))
def test_parameters(changes):
    given_now = dict(model='tiny', preset='c', out='', seed=0, steps=0, resume='auto', nproc=0, nnodes=1, rdzv='', teacher='', latents='',
                     autoencoder='', n_class=0, n_pos=0, n_neg=0, n_extra_neg=-1, changes='', monitor_every=-1, stop_above=0, dry_run=0)
    given_now.update({k: v for k, v in recipe.RULES.items() if k not in given_now and not callable(v) and not isinstance(v, tuple)})
    tried(lambda: check_parameters({**given_now, **changes}, **{k: recipe.RULES[k] for k in recipe.RULES}))

NAMES = ['n_neg', 'n_pos', 'lr', 'ema', 'betas', 'clip', 'steps', 'drift.scope', 'drift.temperatures', 'drift.floor', 'sharding', 'precision', 'times', 'colour', 'drift']
words = st.one_of(st.text(string.printable, max_size=12), values.map(repr), st.sampled_from(['(.9,1e999)', '1e999', '[', '(' * 300, '-' * 400 + '1', '{}', "'a'*9"]))

@cases(500)
@given(st.lists(st.tuples(st.sampled_from(NAMES), words).map('='.join) | st.text(max_size=10), max_size=3))
def test_changes(parts): tried(lambda: recipe.changed(recipe.config_for('tiny'), ' '.join(parts)))

def put(data, path, value):
    "A nested structure with one entry replaced"
    if not path: return value
    key, *rest = path
    if isinstance(data, dict) and data:
        k = sorted(data)[key % len(data)]
        return {**data, k: put(data[k], rest, value)}
    if isinstance(data, list) and data:
        i = key % len(data)
        return [*data[:i], put(data[i], rest, value), *data[i+1:]]
    return value

paths = st.lists(st.integers(0, 40), min_size=1, max_size=3)

@cases(300)
@given(paths, values, st.booleans())
def test_manifests(path, value, signed):
    manifest = put(json.loads(template('store')['x/manifest.json']), path, value)
    if signed: manifest['sha256'] = digest_json({k: v for k, v in manifest.items() if k != 'sha256'})
    def call():
        store = latents.open_latents(folder/'x')
        store.rows(torch.arange(min(3, len(store))))
    with files('store', **{'x/manifest.json': json.dumps(manifest).encode()}) as folder: tried(call)

@cases(250)
@given(paths, values, st.integers(0, 400))
def test_descriptions_of_checkpoints(path, value, cut):
    name = 'x/step_0000004.json'
    about = json.dumps(put(json.loads(template('run')[name]), path, value)).encode()
    if cut < 100: about = about[:cut]
    with files('run', **{name: about}) as folder:
        tried(lambda: Checkpoints(folder/'x', dict(kind='test'), every=2).load())

def altered(data, place, byte, cut):
    "Bytes with one changed, and cut off"
    data = bytearray(data)
    data[place % len(data)] = byte
    return bytes(data[:len(data)*cut//100])

alterations = st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 100) | st.just(100) | st.just(100))

@cases(250)
@given(alterations)
def test_references(a):
    with files('npz', **{'s.npz': altered(template('npz')['s.npz'], *a)}) as folder:
        tried(lambda: evaluate.load_reference(folder/'s.npz', wrong.toy()))

@cases(150)
@given(alterations)
def test_image_archives(a):
    with files('images', **{'a.npz': altered(template('images')['a.npz'], *a)}) as folder:
        tried(lambda: images.open_images(folder/'a.npz').read([0, -1 % 6]))

@cases(200)
@given(alterations)
def test_image_files(a):
    with files('png', **{'a.png': altered(template('png')['a.png'], *a)}) as folder:
        tried(lambda: images.open_images(folder).read([0]))
