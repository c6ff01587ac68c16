"The second world: packages of drawn pictures in the form of the real ones, the whole chain on them, and what ships"
import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
import shutil
import tarfile
import time

import pytest
import timm
import torch
from PIL import Image, ImageDraw, ImageOps

from drift_rae.autoencoder import RAE
from drift_rae.engine.files import load_weights, read_json, save_weights, sha256_of, weights_path
from drift_rae.engine.parameters import ParameterError
from drift_rae.flow import load_teacher
from drift_rae.second import emoji as drawn
from drift_rae.second import world as second
from drift_rae.metrics.distances import within_class_variance
from drift_rae.own import vae as own_vae
from drift_rae.own.judge import load_picture_judge, nearest_pixels
from drift_rae.second import measure, tables, vae
from drift_rae.parts.bench import Row
from drift_rae.parts.generator import OneStepGenerator
from drift_rae.tuned import SEARCH_SEED, run_tuned, searched, stored_run


def drawing(kind, i, design):
    "PNG of a disc or a bar; no two are equal"
    picture = Image.new('RGBA', (64, 64))
    pen, colour = ImageDraw.Draw(picture), (5*i % 200, 250 - 4*i, 90 if design == 'google' else 160, 255)
    box = [8 + i % 9, 12, 40 + i % 9, 44] if kind == 'disc' else [8 + i % 40, 5, 17 + i % 40, 58]
    (pen.ellipse if kind == 'disc' else pen.rectangle)(box, fill=colour)
    out = io.BytesIO()
    picture.save(out, format='PNG')
    return out.getvalue()


def package(design, characters=32):
    "An archive with two classes, one subcategory that is too small, and one variant"
    data, listed = io.BytesIO(), []
    with tarfile.open(fileobj=data, mode='w:gz') as archive:
        def add(name, content):
            entry = tarfile.TarInfo(f'package/{name}')
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for kind, n in (('disc', characters), ('bar', characters), ('rare', 3)):
            for i in range(n):
                code = f'{kind[0]}{i:03d}'.upper()
                listed.append(dict(unified=code, image=f'{code}.png', name=code, category='drawn', subcategory=kind))
                add(f'img/{design}/64/{code}.png', drawing(kind, i, design))
        listed.append(dict(listed[0], unified='D000-200D-2640'))
        add('emoji.json', json.dumps(listed).encode())
    return data.getvalue()


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    "A folder with two packages; their digests are put where those of the real ones are"
    place, real = tmp_path_factory.mktemp('packages'), dict(drawn.DESIGNS)
    for design in real:
        data = package(design)
        (place/f'emoji-datasource-{design}-{drawn.VERSION}.tgz').write_bytes(data)
        drawn.DESIGNS[design] = (base64.b64encode(hashlib.sha512(data).digest()).decode(), 'drawn by a test')
    yield place
    drawn.DESIGNS.update(real)


def test_the_rule_unites_small_subcategories_and_leaves_out_smaller_ones():
    sizes = {('A', 'face-a'): 30, ('A', 'face-b'): 31, ('A', 'hat'): 59, ('B', 'face'): 60, ('B', 'sky & weather'): 90}
    assert drawn.class_rule(sizes) == {('A', 'face-a'): 'other-face', ('A', 'face-b'): 'other-face',
                                       ('B', 'face'): 'face', ('B', 'sky & weather'): 'sky-weather'}


def test_no_character_is_in_two_sets_and_the_seed_decides():
    codes = [f'{i:X}' for i in range(75)]
    sets = drawn.split_characters(codes)
    assert [list(sets.values()).count(s) for s in drawn.SPLITS] == [45, 15, 15]
    assert sets == drawn.split_characters(codes[::-1]) != drawn.split_characters(codes, 1)


def test_a_changed_package_is_refused(packages, tmp_path):
    path = next(packages.glob('*google*'))
    (tmp_path/path.name).write_bytes(path.read_bytes() + b'0')
    with pytest.raises(ParameterError, match='SHA-512 .* expected'): drawn.fetch_package('google', tmp_path)
    with pytest.raises(ParameterError, match='no emoji.json'): drawn.read_package(package('google'), 'twitter')


def test_pictures_by_class_set_and_character(packages, tmp_path, capsys):
    about = drawn.emoji(str(tmp_path/'P'), str(packages), each=45)
    assert set(about['classes']) == {'disc', 'bar'}
    of = {s: {p.stem.split('_')[0] for p in (tmp_path/'P'/s/'disc').iterdir()} for s in drawn.SPLITS}
    assert not of['train'] & of['held_out'] and not of['train'] & of['judge'] and sum(map(len, of.values())) == 32
    assert len(list((tmp_path/'P/train/bar').iterdir())) == 45
    pixels, labels = second.unaltered(tmp_path/'P/train')
    assert labels.bincount().tolist() == [about['classes'][k]['train'] for k in ('bar', 'disc')]
    with pytest.raises(ParameterError, match='another set'): drawn.emoji(str(tmp_path/'P'), str(packages), each=44)
    (tmp_path/'P/set.json').unlink() # a call that was stopped leaves its pictures
    with pytest.raises(ParameterError, match='another set'): drawn.emoji(str(tmp_path/'P'), str(packages), 45, seed=1)
    assert drawn.emoji(str(tmp_path/'P'), str(packages), each=45) == about
    (tmp_path/'P/train/bar/broken_google.png').write_bytes(b'0')
    with pytest.raises(ParameterError, match='1 files cannot be read'): second.unaltered(tmp_path/'P/train')


def test_measures_of_variety_and_memory():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=g)
    assert abs(within_class_variance(x, torch.arange(600) % 3) - 4) < .4
    assert within_class_variance(x[:3].repeat_interleave(5, 0), torch.arange(3).repeat_interleave(5)) == 0
    pixels = torch.randint(256, (8, 3, 16, 16), generator=g).byte()
    assert nearest_pixels(pixels[:3], pixels) == 0 < nearest_pixels(pixels[:3], pixels[3:])


@pytest.fixture(scope='module')
def made(packages, tmp_path_factory):
    "A folder of the whole command: a random encoder, one or two updates of everything"
    place, patch = tmp_path_factory.mktemp('world'), pytest.MonkeyPatch()
    weights = place/'encoder.pth'
    torch.save(timm.create_model('test_efficientnet').state_dict(), weights)
    patch.setattr(second, 'LITE0_SHA256', sha256_of(weights))
    patch.setattr(second, 'ENCODER', dict(encoder='timm:test_efficientnet', layers='1,2', size=64, view=64, grid=4,
                                          channels=16))
    patch.setattr(second, 'CHOICES', ((64, (1, 2), True), (64, (2,), False)))
    patch.setattr(measure, 'GUIDANCE', (1., 2.))
    patch.setattr(measure, 'STEPS', (2, 50))
    rows = second.world(str(place/'home'), str(packages), str(weights), each=45, decoder_steps=2, judge_steps=2,
                        teach_steps=2, steps=1, rate=1e-4, per_class=8, nproc=1)
    yield place/'home', rows
    patch.undo()


def test_the_whole_command_measures_every_row(made):
    home, rows = made
    assert {'held out', 'reconstructions', 'reconstructions, train', 'teacher 1, 1', 'teacher 50, 1', 'teacher 50, 2',
            'student A', 'student C'} < set(rows)
    two = measure.measured_rows(home, {'two points': measure._teacher_of(home, 8)(2, 1., 1)})['two points']
    assert rows['teacher 1, 1']['fd'] == pytest.approx(two['fd'], rel=.01) # the same single step of Euler's method
    layers = read_json(home/'layers.json')['rows']
    assert [(r['view'], r['layers'], r['rotated']) for r in layers] == [(64, [1, 2], True), (64, [2], False)]


def test_what_was_measured_is_not_measured_again(made, monkeypatch):
    home, rows = made
    def never(*args, **options): raise AssertionError('measured again')
    monkeypatch.setattr(measure.World, 'generated', never)
    of = dict(generator=str(home/'students/c_0.0001_0'), per_class=8, seed=1)
    assert measure.measured_rows(home, {'student C': of}) == {'student C': rows['student C']}
    with pytest.raises(AssertionError, match='again'): measure.measured_rows(home, {'student C': dict(of, seed=3)})


def test_a_command_that_was_not_begun_is_not_continued(packages, tmp_path, made):
    weights = made[0].parent/'encoder.pth'
    with pytest.raises(ParameterError, match='nothing was begun in .*none'):
        second.world(str(tmp_path/'none'), str(packages), str(weights), resume='must')
    with pytest.raises(ParameterError, match='sha256'): # before the pictures are made
        second.world(str(tmp_path/'none'), str(packages), str(next(packages.glob('*google*'))))
    assert not (tmp_path/'none').exists()


def test_generators_measured_side_by_side_have_the_same_metrics(made):
    home, rows = made
    folders = {n: str(home/f'students/{n.lower()}_0.0001_0') for n in 'AC'}
    of = {n: dict(generator=folder, per_class=8, seed=1) for n, folder in folders.items()}
    found = measure.measured_rows(home, of, processes=2)
    assert found == {n: rows[f'student {n}'] for n in 'AC'} and list(found) == ['A', 'C']


@pytest.fixture(scope='module')
def published(made, tmp_path_factory):
    """What `publish` writes of that folder, results and weights, and what it returns. The folder then has the weights of
    the encoder's network where the tables look for them"""
    home, _ = made
    place = tmp_path_factory.mktemp('published')
    found = second.publish(home, place/'results', place/'weights')
    shutil.copy(home.parent/'encoder.pth', home/'efficientnet-lite0.pth')
    return place, found


def test_publish_writes_what_the_chapter_and_the_package_read(made, published):
    (home, rows), (place, found) = made, published
    stored = json.loads((place/'results/emoji.json').read_text())
    assert stored == json.loads(json.dumps(found)) and stored['rows'].keys() == rows.keys()
    assert stored['steps'] == dict(decoder=2, judge=2, teacher=2, student=1)
    assert str(home.parent) not in (place/'results/emoji.json').read_text()
    whole = OneStepGenerator.from_pretrained(home/'students/c_0.0001_0')
    half = OneStepGenerator.from_pretrained(place/'weights')
    a, b = (g.sample(['disc', 'bar'], seed=3) for g in (whole, half))
    assert a.shape == (2, 3, 64, 64) and (a - b).abs().max() < .01
    files = [(place/'weights/generator.safetensors', home/'students/c_0.0001_0/generator.safetensors'),
             (place/'weights/teacher.safetensors', home/'teacher/teacher.safetensors')]
    for small, large in files: assert small.stat().st_size < .6*large.stat().st_size
    assert str(home.parent).encode() not in files[0][0].read_bytes()
    teacher = load_teacher(files[1][0], 'mini')
    assert teacher.shift == load_teacher(files[1][1], 'mini').shift
    for name in second.JUDGES: assert load_picture_judge(place/'weights', name)(a).shape == (2, 2)
    latents = load_weights(place/'results/emoji_latents.safetensors')[0]['latents']
    assert latents.shape == (6, 16, 4, 4) and latents.dtype == torch.float16
    assert Image.open(place/'results/emoji_pictures.png').size == (192, 128)
    for folder in ('results/emoji_', 'weights/'): assert 'drawn by a test' in (place/f'{folder}ATTRIBUTION.txt').read_text()


def test_publish_says_what_is_missing(tmp_path):
    with pytest.raises(ParameterError, match='lacks results.json, layers.json'): second.publish(tmp_path)


def test_the_shipped_generator_draws_by_name_in_two_seconds():
    begin = time.process_time()
    generator = OneStepGenerator.from_pretrained('emoji')
    pictures = generator.sample(['face', 'time'], seed=0)
    assert time.process_time() - begin < 2
    assert pictures.shape == (2, 3, 64, 64) and len(generator.class_names) == 15
    folder = weights_path('emoji/generator').parent
    assert sum(p.stat().st_size for p in folder.iterdir()) < 16e6 and 'CC BY 4.0' in (folder/'ATTRIBUTION.txt').read_text()
    with pytest.raises(ParameterError, match='label .* accepted'): generator.sample('dragon')


def test_a_row_of_the_papers_tables_runs_in_the_second_world(made, published, tmp_path):
    home, weights = made[0], published[0]/'weights'
    bench, search = tables.world_bench(str(home), str(weights)), tables.world_search(home, 4, (7, 6), weights)
    whole = RAE.from_pretrained(home/'latents/autoencoder')
    some = bench.pictures()[:20]
    assert torch.equal(bench.rae.encode(some), whole.encode(some))
    assert (bench.rae.decode(bench.store.latents[:20]) - whole.decode(bench.store.latents[:20])).abs().max() < .01
    assert (bench.classes, bench.store.latent_shape) == (2, (16, 4, 4)) and len(bench.balls) == 90
    row = Row('3', 'A', (4, 4, 0), 'n_class=2', 'a')
    run = stored_run(row, 1, SEARCH_SEED, bench, tmp_path, search)
    assert {a: list(r) for a, r in run['reads'].items()} == {a: ['4', '8', '12', '16'] for a in ('fast', 'slow')}
    assert run['figures']['n'] == 14 and run['recipe']['weights'] == tables.world_digests(str(weights))
    assert run['recipe']['steps'] == 4 and run['recipe']['lr'] == [3e-4, 3e-6] and run['judges'] == {}
    reported = run_tuned(row, 1, 10, bench, 6, ('fast', 8), search)
    assert reported['judges']['first']['fd'] == pytest.approx(reported['reads']['fast']['8']['fd'], rel=1e-4)
    assert math.isfinite(reported['judges']['second']['fd'])
    assert stored_run(row, 1, SEARCH_SEED, None, tmp_path, search) == json.loads(json.dumps(run))
    assert len(searched(row, tmp_path, search)) == 8
    other = dataclasses.replace(search, recipe=functools.partial(tables.world_recipe, (('judge', 'another'),)))
    assert stored_run(row, 1, SEARCH_SEED, None, tmp_path, other) is None


def test_other_pictures_and_another_encoder_are_refused(made, published, tmp_path):
    home, whole, other = made[0], published[0]/'weights', tmp_path/'home'
    shutil.copytree(home/'pictures', other/'pictures')
    for path in (other/'pictures/train').rglob('*.png'): ImageOps.invert(Image.open(path)).save(path)
    shutil.copy(home/'efficientnet-lite0.pth', other)
    with pytest.raises(ParameterError, match='accepted are the pictures of these weights'): tables.WorldBench(other, whole)
    weights = tmp_path/'weights'
    shutil.copytree(whole, weights)
    fitted, config = load_weights(weights/'encoder.safetensors')
    save_weights(weights/'encoder.safetensors', fitted, dict(config, layers=[0, 1]))
    with pytest.raises(ParameterError, match='was fitted for .* accepted'): tables.WorldBench(home, weights)
    (other/'pictures/train/bar').joinpath('broken.png').write_bytes(b'no picture')
    with pytest.raises(ParameterError, match='1 pictures cannot be read, such as .*broken.png'): tables.WorldBench(other, whole)


def test_a_vae_is_compared_with_the_features(made, published, tmp_path, monkeypatch):
    (home, rows), weights = made, published[0]/'weights'
    monkeypatch.setattr(vae, 'emoji', lambda out: None) # the pictures are there, with another number of copies
    monkeypatch.setattr(vae, 'OPTIONS', dict(vae.OPTIONS, channels=16))
    found = vae.compare(str(home), 2, str(tmp_path), str(weights))
    assert json.loads((tmp_path/'emoji_vae.json').read_text()) == found
    assert Image.open(tmp_path/'emoji_vae.png').size == (2*64, 3*64)
    held_out = found['rows']['features']['held out']
    assert held_out == found['rows']['VAE']['held out']
    assert held_out['fd'] == pytest.approx(rows['held out']['fd'], rel=.02) # judges in half precision
    assert found['rows']['features']['reconstructions']['fd'] != found['rows']['VAE']['reconstructions']['fd']
    for space in ('features', 'VAE'):
        assert set(found['geometry'][space]) == {*vae.NORMALISATIONS, 'classes'} and 0 < found['psnr'][space] < 40
    def never(*a, **k): raise AssertionError('trained again')
    monkeypatch.setattr(own_vae, 'train_vae', never)
    assert vae.world_vae(home, 2).latent_shape == (16, 4, 4)
    with pytest.raises(AssertionError, match='again'): vae.world_vae(home, 2, resume='never')
    with pytest.raises(ParameterError, match="steps=0"): vae.compare(str(home), 0)


def test_the_command_of_the_tables_names_what_it_accepts(capsys):
    for words, said in ((['--tables', '6', '--home', 'x'], "tables='6': accepted are 3, 5, 7"), ([], '--home')):
        with pytest.raises(SystemExit) as e: tables.main(words)
        assert e.value.code == 2 and said in capsys.readouterr().err
