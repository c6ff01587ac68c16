"Own images: every mode, data sets in their true layout, encoders by name, stopped runs, and the chapter's commands"
import io
import json
import pickle
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from drift_rae.autoencoder import RAE
from drift_rae.commands.command import load_command, main, summary
from drift_rae.distill import OneStepGenerator
from drift_rae.engine import checkpoints
from drift_rae.engine.command import make_parser
from drift_rae.engine.parameters import ParameterError
from drift_rae.own import encoders, vae
from drift_rae.own.encode import autoencoder_of, coloured_digits, encode
from drift_rae.own.pictures import Pictures, dataset_folder, to_rgb
from drift_rae.own.run import run
from drift_rae.own.teach import teach

ROOT = Path(__file__).parents[1]
SHORT = dict(size=16, encoder_steps=2, decoder_steps=4)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Three classes, 40 pictures each, and two broken files"
    home = coloured_digits(tmp_path_factory.mktemp('own')/'PICTURES', 40)
    (home/'red'/'broken.png').write_bytes((home/'red'/'000.png').read_bytes()[:60])
    (home/'red'/'empty.jpg').write_bytes(b'')
    return home


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I', 'F', 'I;16'])
def test_any_mode_becomes_three_channels(mode):
    image = Image.fromarray(np.full((3, 4), 200, np.uint16)) if mode == 'I;16' else Image.new('RGB', (4, 3), 'white').convert(mode if mode != 'LAB' else 'RGB')
    made = to_rgb(image)
    assert made.mode == 'RGB' and made.size == (4, 3)
    if mode != 'I;16': assert min(made.getpixel((0, 0))) > 240


def test_a_rotated_photograph_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6 # the camera was held upright
    Image.new('RGB', (40, 20)).save(tmp_path/'a.jpg', exif=exif)
    assert to_rgb(Image.open(tmp_path/'a.jpg')).size == (20, 40)


def cifar10(root, each=3):
    "Five batches in the true layout; 15 pictures"
    home = root/'cifar-10-batches-py'
    home.mkdir(parents=True)
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    for b in range(1, 6):
        data = dict(batch_label=b'x', labels=[(b + i) % 10 for i in range(each)], data=np.full((each, 3072), 40*b, np.uint8), filenames=[])
        (home/f'data_batch_{b}').write_bytes(pickle.dumps(data))
    (home/'batches.meta').write_bytes(pickle.dumps(dict(label_names=names)))
    return [f'{c}_{n}' for c, n in enumerate(names)]


def flowers102(root):
    "204 photographs of 102 classes, as setid.mat and imagelabels.mat say it"
    from scipy.io import savemat
    home = root/'flowers-102'
    (home/'jpg').mkdir(parents=True)
    for i in range(1, 205): Image.new('RGB', (8, 6), (i, 0, 0)).save(home/'jpg'/f'image_{i:05d}.jpg')
    savemat(home/'imagelabels.mat', dict(labels=[[1 + i % 102 for i in range(204)]]))
    savemat(home/'setid.mat', dict(trnid=[list(range(1, 61))], valid=[list(range(61, 121))], tstid=[list(range(121, 205))]))


def imagenette(root):
    "Two photographs of each of the ten classes"
    from torchvision.datasets import Imagenette
    for wnid in Imagenette._WNID_TO_CLASS:
        for split in ('train', 'val'):
            home = root/'imagenette2-160'/split/wnid
            home.mkdir(parents=True)
            for i in range(2): Image.new('RGB', (200, 160)).save(home/f'{wnid}_{i}.JPEG')


def test_cifar10(tmp_path, monkeypatch):
    names = cifar10(tmp_path)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *a: True) # the checksums are those of the whole files
    folder = Pictures(dataset_folder('cifar10', str(tmp_path)), 16)
    assert len(folder) == 15 and set(folder.classes) <= set(names) and folder.classes == sorted(folder.classes)
    x, label = folder[0]
    assert x.shape == (3, 16, 16) and folder.classes[label].split('_')[0] in '0123456789'
    assert dataset_folder('cifar10', str(tmp_path)) == tmp_path/'cifar10_pictures'


def test_flowers102(tmp_path, monkeypatch):
    flowers102(tmp_path)
    monkeypatch.setattr('torchvision.datasets.flowers102.check_integrity', lambda *a: True)
    folder = Pictures(dataset_folder('flowers102', str(tmp_path)), 16)
    assert len(folder) == 204 and len(folder.classes) == 102 and folder.classes[0].startswith('000_')


def test_imagenette(tmp_path):
    imagenette(tmp_path)
    folder = Pictures(dataset_folder('imagenette', str(tmp_path)), 16)
    assert len(folder) == 20 and folder.classes[0] == '0_tench' and len(folder.classes) == 10


def test_a_stopped_encoding_continues_to_the_same_latents(pictures, tmp_path, monkeypatch):
    whole = encode(str(pictures), out=str(tmp_path/'whole'), **SHORT)
    calls = []

    def stop(self, step, network):
        calls.append(step)
        if len(calls) == 3: raise KeyboardInterrupt
        return original(self, step, network)
    original = encoders.Stage1.__call__
    with monkeypatch.context() as m:
        m.setattr(encoders.Stage1, '__call__', stop)
        with pytest.raises(KeyboardInterrupt): encode(str(pictures), out=str(tmp_path/'stopped'), **SHORT)
    assert not (tmp_path/'stopped'/'manifest.json').exists() and (tmp_path/'stopped'/'encoder'/'done.json').is_file()
    assert encode(str(pictures), out=str(tmp_path/'stopped'), resume='must', **SHORT) == whole
    stores = [json.loads((tmp_path/name/'manifest.json').read_text())['shards'] for name in ('whole', 'stopped')]
    assert [s['sha256'] for s in stores[0]] == [s['sha256'] for s in stores[1]]
    assert whole['skipped'] == 2 and whole['counts'] == [40, 40, 40] and whole['classes'] == ['blue', 'green', 'red']


def test_an_encoder_of_timm_from_a_file(pictures, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model('test_efficientnet')
    torch.save({f'other.{k}': v for k, v in network.state_dict().items()}, tmp_path/'weights.pth') # as another package names them
    made = encode(str(pictures), encoder='timm:test_efficientnet', weights=str(tmp_path/'weights.pth'), layers='2,3', channels=16,
                  size=16, decoder_steps=2, out=str(tmp_path/'latents'))
    rae = RAE.from_pretrained(autoencoder_of(tmp_path/'latents'))
    assert list(rae.latent_shape) == made['shape'] and made['shape'][0] == 16 and 16 % made['shape'][1] == 0
    x = torch.rand(2, 3, 16, 16)
    assert rae.decode(rae.encode(x)).shape == x.shape
    stem = network.state_dict()['conv_stem.weight']
    assert torch.equal(rae.encoder.network.state_dict()['conv_stem.weight'], stem)


@pytest.mark.parametrize('encoder', ['own', 'vae'])
def test_a_stopped_training_of_an_encoder_continues_to_the_same_latents(pictures, tmp_path, monkeypatch, encoder):
    options = dict(encoder=encoder, size=16, channels=8, decoder_steps=4, encoder_steps=4*(encoder == 'own'))
    for module in (encoders, vae): monkeypatch.setattr(module, 'Checkpoints', lambda *a, every: checkpoints.Checkpoints(*a, every=2))
    encode(str(pictures), out=str(tmp_path/'whole'), **options)
    save = checkpoints.Checkpoints._save_now
    def stop(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(checkpoints.Checkpoints, '_save_now', stop)
        encode(str(pictures), out=str(tmp_path/'stopped'), **options)
    name = dict(own='encoder', vae='vae')[encoder]
    assert not (tmp_path/'stopped'/name/'done.json').exists()
    with redirect_stdout(io.StringIO()) as said: encode(str(pictures), out=str(tmp_path/'stopped'), **options)
    assert f'{name} from 2: 2/2' in said.getvalue() # it went on
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, two = (RAE.from_pretrained(autoencoder_of(tmp_path/n)).encode(x) for n in ('whole', 'stopped'))
    assert torch.equal(one, two)


def test_a_vae_is_a_latent_space_like_the_others(pictures, tmp_path):
    "A teacher and a generator are made in it"
    run(str(pictures), out=str(tmp_path), model='nano', encoder='vae', size=16, channels=8, decoder_steps=2, teach_steps=2, steps=2, nproc=1)
    rae = RAE.from_pretrained(autoencoder_of(tmp_path/'latents'))
    assert rae.latent_shape == (8, 4, 4)
    assert rae.latent_mean is None and rae.latent_var.unique().numel() == 1 # one scalar, as for SD-VAE
    assert OneStepGenerator.from_pretrained(tmp_path).sample([0, 1], seed=0).shape == (2, 3, 16, 16)


def test_what_is_refused(pictures, tmp_path):
    for options, words in [
            (dict(encoder='timn:resnet18'), 'accepted is own, vae, timm:NAME'), (dict(size=31), 'accepted is a multiple of 4'),
            (dict(dataset='cifar10'), 'give either images'), (dict(encoder='tiny', size=32), 'makes pictures of 16 pixels'),
            (dict(encoder='timm:resnet18', layers='a'), "layers='a'"), (dict(size=-1), 'size=-1'), (dict(resume='no'), "resume='no'"),
            (dict(encoder='vae', layers='2'), 'encoder=vae does not use it'), (dict(encoder='vae', encoder_steps=3), 'encoder=vae does not use it')]:
        with pytest.raises(ParameterError, match=re.escape(words)): encode(str(pictures), out=str(tmp_path/'x'), **options)
    with pytest.raises(ParameterError, match='there is no such folder'): encode(str(tmp_path/'none'))
    with pytest.raises(ParameterError, match='expected a folder with shards'): teach(str(tmp_path/'none'))


def test_a_released_kind_of_autoencoder_needs_no_training(pictures, tmp_path):
    made = encode(str(pictures), encoder='tiny', out=str(tmp_path/'latents'))
    assert made['shape'] == [32, 4, 4] and autoencoder_of(tmp_path/'latents') == 'tiny' and not (tmp_path/'latents'/'decoder').exists()


CHAPTER = ROOT/'nbs/own/01_own_images.ipynb'
NOT_RUN = { # beginning of a line, or a word in it -> why it is not run here
    'npm pack': 'downloads the pictures of the example', 'tar xzf': 'unpacks that download',
    'python -c "from drift_rae.own.pictures': 'sorts that download', '--dataset': 'downloads a data set',
    'dinov2-b': 'downloads a released autoencoder', 'timm:resnet50': 'downloads weights of timm',
    'pip install': 'an environment of gigabytes: .ci/run and .ci/ranges make one',
    'git clone': 'test_readme.py compares it with what CI runs', 'python -m venv': 'the same',
    'papermill': 'needs ImageNet: test_readme.py parses it', 'torchrun': 'needs ImageNet: test_readme.py parses it'}
FEW = dict(encode=' --size 16 --encoder_steps 2 --decoder_steps 2', teach=' --steps 2 --batch 16 --nproc 1', distill=' --steps 2 --nproc 1',
           run=' --size 16 --encoder_steps 2 --decoder_steps 2 --teach_steps 2 --steps 2 --nproc 1',
           fid=' --features judge --size 16 --unreadable skip') # Inception would have to be fetched, and takes a minute


def commands_of(text):
    "The lines of a text's shell blocks, continuations joined"
    blocks = re.findall(r'(?ms)^```sh\n(.*?)^```', text)
    return [line for block in blocks for line in re.sub(r'\\\n\s*', '', block).splitlines()]


def chapter():
    cells = json.loads(CHAPTER.read_text())['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def test_the_chapter_names_all_four_steps():
    names = [shlex.split(line)[1] for line in commands_of(chapter()) if line.startswith('drift_rae')]
    assert {'encode', 'teach', 'distill', 'evaluate', 'run'} <= set(names)


def lines(): return list(dict.fromkeys(commands_of(chapter()) + commands_of((ROOT/'README.md').read_text())))


def why_not(line): return next((why for words, why in NOT_RUN.items() if line.startswith(words) or words.startswith(('-', 'd', 't')) and words in line), '')


@pytest.mark.parametrize('line', [l for l in lines() if why_not(l)])
def test_a_line_that_is_not_run_is_understood(line):
    words = shlex.split(line)
    if words[0] == 'drift_rae': make_parser(load_command(words[1]), words[1]).parse_args(words[2:])
    pytest.skip(why_not(line)) # the rest of the line


def python_blocks(text): return re.findall(r'(?ms)^```python\n(.*?)^```', text)


@pytest.fixture(scope='module')
def commanded(pictures, tmp_path_factory):
    "A folder in which every command of chapter and README has run, with few updates"
    folder = tmp_path_factory.mktemp('commanded')
    (folder/'PICTURES').symlink_to(pictures)
    wanted = [line for line in lines() if not why_not(line)]
    assert all(line.startswith('drift_rae ') for line in wanted), wanted
    names = [shlex.split(line)[1] for line in wanted]
    assert sorted(names) == ['distill', 'encode', 'evaluate', 'fid', 'run', 'sample', 'teach'], 'each once'
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line, name in zip(wanted, names):
            try: main(shlex.split(line + FEW.get(name, ''))[1:])
            except SystemExit as e: pytest.fail(f'{line}: exit code {e.code}')
    return folder


def test_the_commands_of_chapter_and_readme_run(commanded, monkeypatch):
    monkeypatch.chdir(commanded)
    for folder in ('RUN', 'GENERATOR'):
        generator = OneStepGenerator.from_pretrained(folder)
        assert generator.about['class_names'] == ['blue', 'green', 'red'] and generator.sample([2]).shape == (1, 3, 16, 16)
    (script,), (readme,) = python_blocks(chapter()), python_blocks((ROOT/'README.md').read_text())
    for code, name, shape in ((script, 'pictures', (2, 3, 16, 16)), (readme, 'images', (4, 3, 16, 16))):
        space = {}
        exec(code, space)
        assert tuple(space[name].shape) == shape and 0 <= space[name].min() and space[name].max() <= 1


def test_a_second_run_makes_nothing(commanded, monkeypatch, capsys):
    "After the chapter's `drift_rae run PICTURES --out RUN`, with the same options"
    monkeypatch.chdir(commanded)
    options = dict(encoder_steps=2, decoder_steps=2, teach_steps=2, steps=2, size=16, nproc=1)
    generator, found = Path('RUN/generator.safetensors'), json.loads(Path('RUN/results.json').read_text())
    before = generator.stat().st_mtime_ns
    assert run('PICTURES', 'RUN', **options) == found
    assert capsys.readouterr().out.count('nothing is made again') == 3
    assert generator.stat().st_mtime_ns == before
    with pytest.raises(ParameterError, match='holds another run'): run('PICTURES', 'RUN', **{**options, 'seed': 1})
