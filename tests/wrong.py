"""The machinery behind wrong_inputs.txt: what each line may use, and what became of it.

Each line of the table is `target | expression | wanted`. An expression runs in an empty folder. What
became of it is one of: `clear` (a ParameterError, or a ValueError that this package raises itself),
`raw` (any other exception), `late` (clear, but a network had run before), `accepted` (no exception).
`wanted` is clear or accepted. A line that is accepted where clear is wanted is a silent one."""
import contextlib, functools, io, json, math, os, shlex, shutil, sys, tempfile, time, traceback, zipfile
from pathlib import Path
from importlib import import_module
import numpy as np
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from drift_rae.engine.parameters import ParameterError

HERE = Path(__file__).parent
TABLE = HERE/'wrong_inputs.txt'
T, nan, inf = torch.tensor, math.nan, math.inf
huge = 10**400 # a whole number of 401 digits
MODULES = ['autoencoder', 'diffusion_gan', 'distill', 'drifting', 'evaluate', 'flow', 'geometry', 'theorem1',
           'engine.checkpoints', 'engine.files', 'networks.hub', 'engine.launch', 'engine.parameters', 'engine.progress',
           'engine.streams', 'engine.training', 'imagenet.critics', 'imagenet.folders', 'imagenet.stage1', 'imagenet.stage2',
           'metrics.extractors', 'metrics.features', 'metrics.frechet', 'metrics.images', 'metrics.neighbours',
           'metrics.verdicts', 'networks.ditdh', 'networks.released', 'networks.sdvae', 'networks.vit', 'networks.cost',
           'parts.generator', 'sharing.sets', 'parts.ingredients', 'parts.monitor', 'sharing.onnx', 'parts.paths', 'parts.recipe', 'parts.step',
           'parts.weights', 'worlds.data', 'worlds.judge', 'worlds.latents', 'worlds.measure', 'worlds.shards', 'worlds.vae',
           'parts.bench', 'imagenet.stage1_data', 'parts.workers', 'second.emoji', 'own.layers', 'second.world']

def lines():
    "(number, target, expression, wanted) of each line of the table"
    for i, line in enumerate(TABLE.read_text().splitlines(), 1):
        if line.strip() and not line.startswith('#'):
            target, expression, wanted = (x.strip() for x in line.split(' | '))
            yield i, target, expression, wanted

def names_in(code):
    "All names that compiled code and the functions inside it use"
    return {*code.co_names, *(n for c in code.co_consts if hasattr(c, 'co_names') for n in names_in(c))}

def resolved(name):
    "An object of the table by name: a shared one, a module of the package, or a helper of this file"
    if name in MADE: return MADE[name]()
    path = next((m for m in MODULES if m.split('.')[-1] == name), None)
    return import_module(f'drift_rae.{path}') if path and name not in globals() else globals().get(name)

MADE = {}
def made(f):
    MADE[f.__name__] = functools.cache(f)
    return f

@made
def rae():
    from drift_rae.autoencoder import RAE
    return RAE.from_pretrained('tiny')
@made
def gen():
    from drift_rae.distill import OneStepGenerator
    return OneStepGenerator.from_pretrained('tiny')
@made
def teacher():
    from drift_rae.flow import load_teacher
    return load_teacher('tiny')
@made
def judge():
    from drift_rae.worlds.judge import load_judge
    return load_judge('tiny')
@made
def vae():
    from drift_rae.worlds.vae import load_vae
    return load_vae('tiny')
@made
def store():
    from drift_rae.worlds.latents import sort_by_class
    g = torch.Generator().manual_seed(0)
    return sort_by_class(torch.randn(400, 32, 4, 4, generator=g), torch.arange(400) % 10, 10)
@made
def toy():
    from drift_rae.metrics.extractors import Extractor
    pool = torch.nn.AdaptiveAvgPool2d(2)
    return Extractor('toy', lambda x: dict(features=pool(x.float()).flatten(1)), 12, 'none', 'none')
@made
def judge_extractor():
    from drift_rae.worlds.judge import load_extractor
    return load_extractor('judge')
@made
def noise_images():
    from drift_rae.metrics.images import GeneratedImages
    return lambda n=5, side=8, **o: GeneratedImages(lambda z, y: torch.sigmoid(z), (3, side, side), 4, n, **o)

def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def x4(**o): return rand(4, 3, 16, 16).to(**o) if o else rand(4, 3, 16, 16)
def z4(): return torch.randn(4, 32, 4, 4, generator=torch.Generator().manual_seed(0))
def feats(n=40, d=6, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
def bad(x, value, at=0):
    x = x.clone()
    x.view(-1)[at] = value
    return x

def npz(name='a.npz', write=np.savez, **arrays):
    write(name, **{k: np.asarray(v) for k, v in arrays.items()})
    return name
def pixels(n=6, side=8): return (rand(n, side, side, 3)*255).byte().numpy()
def png(name, array, mode=None, **o):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array), mode).save(name, **o)
    return name
def picture(name, side=8): return png(name, pixels(1, side)[0])
def pictures(folder='pics', n=3, side=8):
    for i in range(n): picture(f'{folder}/{i}.png', side)
    return folder
def classes(folder='classes', names=('n00000000', 'n00000001'), n=3):
    for c in names: pictures(f'{folder}/{c}', n, 20)
    return folder
def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name
def js(name, data): return write(name, json.dumps(data))
def pt(name, what):
    torch.save(what, name)
    return name
def weights(name='w.safetensors', config=None, **tensors):
    from safetensors.torch import save_file
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, name, metadata={'config': config if isinstance(config, str) else json.dumps(config or {})})
    return name
def changed(name, at=-1, cut=None):
    "The file with one bit flipped, or only its first bytes"
    data = bytearray(Path(name).read_bytes())
    if cut is None: data[at] ^= 64
    else: data = data[:cut]
    Path(name).write_bytes(data)
    return name
def edited(name, **changes):
    "A JSON file with entries changed (a.b.c: value); Ellipsis removes the entry"
    data = json.loads(Path(name).read_text())
    for path, value in changes.items():
        *outer, last = path.split('__')
        part = data
        for k in outer: part = part[int(k) if k.isdigit() else k]
        if value is ...: del part[last]
        else: part[int(last) if isinstance(part, list) else last] = value
    Path(name).write_text(json.dumps(data))
    return name
def config_of(name, **changes):
    "A safetensors file whose configuration has other entries"
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    with safe_open(name, 'pt') as f: config = json.loads(f.metadata()['config'])
    for path, value in changes.items():
        *outer, last = path.split('__')
        part = config
        for k in outer: part = part[k]
        if value is ...: del part[last]
        else: part[last] = value
    save_file(load_file(name), name, metadata={'config': json.dumps(config)})
    return name
def saved_rae(folder='rae'):
    rae().save_pretrained(folder)
    return folder
@functools.cache
def _a_generator():
    "A folder with the miniature's generator, saved once: saving draws images for the card"
    place = tempfile.mkdtemp()
    gen().save_pretrained(place)
    return place
def saved_generator(folder='gen'):
    shutil.copytree(_a_generator(), folder)
    return folder
def saved_teacher(name='t.safetensors'):
    from drift_rae.flow import save_teacher
    save_teacher(name, teacher())
    return name
def saved_store(folder='store', n=40):
    from drift_rae.worlds.latents import save_latents, sort_by_class
    g = torch.Generator().manual_seed(0)
    save_latents(sort_by_class(torch.randn(n, 8, 2, 2, generator=g), torch.arange(n) % 4, 4), folder, {})
    return folder
def resigned(folder, **changes):
    "A store whose manifest was altered and signed again"
    from drift_rae.worlds.shards import digest_json
    path = Path(folder)/'manifest.json'
    edited(path, **changes)
    data = json.loads(path.read_text())
    data['sha256'] = digest_json({k: v for k, v in data.items() if k != 'sha256'})
    path.write_text(json.dumps(data))
    return folder
def statistics_file(name='s.npz', about=None, d=12, **changes):
    made_by = about or json.dumps(toy().describe(), sort_keys=True)
    return npz(name, **{**dict(mu=np.zeros(d), sigma=np.eye(d), n=100, extractor=made_by), **changes})
def small_run(folder='run', steps=4, **o):
    "Checkpoints of a short training"
    from drift_rae.engine.checkpoints import Checkpoints
    from drift_rae.engine.training import fit
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    c = Checkpoints(folder, dict(kind='test', **o), every=2)
    fit(model, lambda step: model(torch.ones(1, 2)).square().sum(), steps=steps, checkpoints=c, resume=o.get('resume', 'auto'))
    return folder
def blocks(folder='blocks', **o):
    from drift_rae.metrics.images import sample_blocks
    sample_blocks(MADE['noise_images']()(**{'block': 10, **o}), folder)
    return folder
def deep(n=100_000): return '['*n

def cells_of(notebook):
    cells = [c for c in json.loads((HERE.parent/'nbs'/f'{notebook}.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    return [''.join(c['source']) for c in cells]
def cell(notebook, wrong):
    "The cells of a notebook up to the check of its parameters, with other parameters; an error must come there"
    cells = cells_of(notebook)
    plain = ['\n'.join(l for l in c.splitlines() if not l.startswith('#|')) for c in cells]
    last = next(i for i, s in enumerate(plain) if s.lstrip().startswith('check_parameters('))
    space = {}
    for source in [*cells[:last], wrong, cells[last]]: exec(source, space)

def cli(words):
    "The command `drift_rae` with these words; a refusal (exit code 1 or 2 and a message) is a ParameterError"
    from drift_rae.commands.command import main
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said): main(shlex.split(words))
    except SystemExit as e:
        if e.code in (1, 2): raise ParameterError(said.getvalue().strip()[-1000:]) from None
        raise RuntimeError(f'exit code {e.code}') from None

def outcome(expression, folder):
    "What became of an expression: (word, message)"
    ran = []
    def note(module, inputs):
        if type(module).__module__.startswith('drift_rae'): ran.append(module)
    code = compile(expression, 'wrong_inputs.txt', 'exec')
    space = {n: resolved(n) for n in names_in(code)}
    space = {n: v for n, v in space.items() if v is not None}
    if 'saved_generator' in space: _a_generator() # before forward passes are counted
    hook = register_module_forward_pre_hook(note)
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, space)
        return 'accepted', ''
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1].filename
        own = '/drift_rae/' in last or isinstance(e, ParameterError)
        word = 'clear' if own and isinstance(e, ValueError) else 'raw'
        if word == 'clear' and (not str(e).strip() or len(str(e)) > 1500): word = 'raw'
        if word == 'clear' and len(ran) > 1: word = 'late' # the first may have refused its input
        return word, f'{type(e).__name__}: {str(e)[:300]}'
    finally:
        hook.remove()
        os.chdir(before)
