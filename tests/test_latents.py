"The latent store and what fills it: the official crop, several writers, kills, damage, odd pictures"
import ast, os, shutil, time
from multiprocessing import get_context
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from papermill import inspect_notebook
from PIL import Image
from torchvision import transforms
from drift_rae.autoencoder import RAE, save_rae
from drift_rae.networks.vit import Encoder, RAEDecoder
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import stream
from drift_rae.parts.step import DistillConfig, step_samples
from drift_rae.imagenet.folders import (
    ClassFolder, UnreadableImage, center_crop, digits_folder, encode_folder, unreadable_images)
from drift_rae.worlds.latents import (
    DTYPES, LatentStore, open_latents, prefetch, save_latents, sort_by_class)
from programs import ROOT, papermill
from test_run import tagged

SIZE = 32
SETTINGS = dict(shard_images=10, batch=4, size=SIZE)

def small_rae(seed=0):
    "A randomly initialised transformer, latents [48, 4, 4]"
    torch.manual_seed(seed)
    encoder = Encoder('vit_tiny_patch16_224', SIZE, patch_size=8, embed_dim=48, depth=1, num_heads=2, class_token=False, global_pool='avg')
    decoder = RAEDecoder(dict(latent_dim=48, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32, decoder_patch_size=8, num_patches=16))
    return RAE(encoder, decoder, var=.5 + torch.rand(48, 4, 4)).eval()

@pytest.fixture(scope='module')
def rae(): return small_rae()

@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Four classes of JPEGs, with the odd ones that ImageNet has too"
    folder = digits_folder(tmp_path_factory.mktemp('photographs'), 17, 4)
    noise = lambda h, w, c, i: torch.randint(256, (h, w, c), generator=stream(0, 'odd', i)).byte().numpy()
    Image.fromarray(noise(70, 33, 1, 0)[..., 0], 'L').save(folder/'n00000000'/'grey.JPEG')
    Image.fromarray(noise(41, 90, 4, 1), 'CMYK').save(folder/'n00000001'/'cmyk.JPEG')
    Image.fromarray(noise(64, 64, 4, 2), 'RGBA').save(folder/'n00000002'/'transparent.png')
    Image.fromarray(noise(150, 20, 3, 3)).convert('P').save(folder/'n00000002'/'palette.png')
    Image.fromarray(noise(1, 300, 3, 4)).save(folder/'n00000003'/'line.png')
    (folder/'n00000003'/'notes.txt').write_text('no picture')
    return folder

def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
def identity(folder): return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(folder).glob('shard-*.npy')}

# images

def official_center_crop(pil_image, image_size):
    "guided-diffusion's `center_crop_arr`, as bytetriper/RAE has it (a4d18c4, src/utils/train_utils.py)"
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return Image.fromarray(arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size])

@pytest.mark.parametrize('width, height', [(500, 375), (375, 500), (256, 256), (512, 511), (511, 1025), (1300, 2600), (100, 77), (257, 4001), (1, 3), (1023, 1024)])
def test_the_crop_is_the_official_one(width, height):
    image = Image.fromarray(torch.randint(256, (height, width, 3), generator=stream(0, width, height)).byte().numpy())
    for size in (256, 64, 33): assert np.array_equal(np.array(center_crop(image, size)), np.array(official_center_crop(image, size)))

def test_pixels_are_those_of_the_official_transform(photographs):
    folder = ClassFolder(photographs, SIZE)
    official = transforms.Compose([transforms.Lambda(lambda im: official_center_crop(im, SIZE)), transforms.ToTensor()])
    for i, (path, label) in enumerate(folder.samples):
        x, y = folder[i]
        assert torch.equal(x, official(Image.open(path).convert('RGB'))) and y == label, path
    assert len(folder) == 4*17 + 5 and folder.classes == [f'n{i:08d}' for i in range(4)]

def test_flips_have_a_name(photographs):
    plain, a, b = ClassFolder(photographs, SIZE), ClassFolder(photographs, SIZE, flip=True, seed=3), ClassFolder(photographs, SIZE, flip=True, seed=3)
    flipped = [not torch.equal(a[i][0], plain[i][0]) for i in range(40)]
    assert 8 < sum(flipped) < 32
    assert all(torch.equal(a[i][0], plain[i][0].flip(-1)) for i in range(40) if flipped[i])
    assert all(torch.equal(a[i][0], b[i][0]) for i in reversed(range(40)))
    b.epoch = 1
    assert [not torch.equal(b[i][0], plain[i][0]) for i in range(40)] != flipped

def test_the_order_of_a_thousand_classes(tmp_path):
    picture = Image.new('RGB', (8, 8))
    for i in range(1000):
        (tmp_path/'imagenet'/f'n{i:08d}').mkdir(parents=True); picture.save(tmp_path/'imagenet'/f'n{i:08d}'/'a.JPEG')
        (tmp_path/'numbers'/str(i)).mkdir(parents=True); picture.save(tmp_path/'numbers'/str(i)/'a.JPEG')
    assert ClassFolder(tmp_path/'imagenet', SIZE, 1000).targets == list(range(1000))
    with pytest.raises(ParameterError, match='do not sort into the order of the labels'): ClassFolder(tmp_path/'numbers', SIZE, 1000)
    shutil.rmtree(tmp_path/'imagenet'/'n00000500')
    with pytest.raises(ParameterError, match='999 class folders'): ClassFolder(tmp_path/'imagenet', SIZE, 1000)

# writers

def write(rank, world, images, out, weights, delay=0.):
    "One writer, in a process of its own"
    torch.set_num_threads(1)
    rae = RAE.from_pretrained(weights)
    encode = rae.encode
    def slowly(x):
        Path(f'{out}-started-{os.getpid()}').touch()
        time.sleep(delay)
        return encode(x)
    rae.encode = slowly
    encode_folder(rae, images, out, rank=rank, world=world, **SETTINGS)

@pytest.fixture(scope='module')
def once(rae, photographs, tmp_path_factory):
    "The store that one undisturbed process writes, and the weights on disk for others"
    folder = tmp_path_factory.mktemp('once')
    save_rae(rae, folder/'rae')
    assert encode_folder(rae, photographs, folder/'store', **SETTINGS) == []
    return folder

@pytest.fixture(scope='module')
def start():
    "Start writers quickly: a fork server that has imported this file already, and what the first network on `meta` imports"
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get('PYTHONPATH', '')])
    context = get_context('forkserver')
    context.set_forkserver_preload(['test_latents', 'torch._dynamo'])
    def begin(*args, world=2, **kwargs):
        writers = [context.Process(target=write, args=(rank, world, *args), kwargs=kwargs) for rank in range(world)]
        for w in writers: w.start()
        return writers
    return begin

def test_two_writers_are_one(once, photographs, start, tmp_path):
    writers = start(photographs, tmp_path/'store', once/'rae')
    for w in writers: w.join(60); assert w.exitcode == 0
    assert files(tmp_path/'store') == files(once/'store')

def test_killed_at_any_moment(once, photographs, start, tmp_path):
    "Finished shards stay the very same files, and in the end nothing tells that anybody was killed"
    store, kept, moments = tmp_path/'store', {}, np.random.default_rng(0)
    for attempt in range(30):
        writers = start(photographs, store, once/'rae', delay=.1)
        while not all(Path(f'{store}-started-{w.pid}').exists() or not w.is_alive() for w in writers): time.sleep(.002)
        time.sleep(moments.uniform(0, .5))
        for w in writers: w.kill()
        for w in writers: w.join(30)
        finished = {p.stem for p in (store/'writing').glob('shard-*.json')}
        now = {k: v for k, v in identity(store).items() if Path(k).stem in finished}
        assert kept.items() <= now.items()
        kept = now
        if len(kept) == 8: break
        with pytest.raises(ParameterError, match='are not finished'): open_latents(store)
        if attempt >= 4 and kept: break
    assert kept and attempt, 'the first kill came after the last shard, or none after a finished one: nothing was tested'
    for w in start(photographs, store, once/'rae'): w.join(60); assert w.exitcode == 0
    assert kept.items() <= identity(store).items()
    assert files(store) == files(once/'store')

def test_what_a_kill_can_leave(once, rae, photographs, tmp_path):
    "A truncated temporary file, a shard without its record, a record without its shard, a record that is half written"
    store = shutil.copytree(once/'store', tmp_path/'store')
    (store/'manifest.json').unlink()
    whole = (store/'shard-00002.npy').read_bytes()
    (store/'.shard-00002.npy.123.tmp').write_bytes(whole[:1000])
    (store/'shard-00001.npy').unlink(); (store/'writing'/'shard-00002.json').unlink()
    (store/'writing'/'shard-00003.json').write_text('{"file": "sha'); (store/'shard-00004.npy').write_bytes(whole[:-1])
    before = identity(store)
    assert encode_folder(rae, photographs, store, **SETTINGS) == []
    assert files(store) == files(once/'store')
    after = identity(store)
    assert {k for k in after if before.get(k) != after[k]} == {f'shard-0000{i}.npy' for i in (1, 2, 3, 4)}

def test_a_lost_shard_is_made_again(once, rae, photographs, tmp_path):
    store = shutil.copytree(once/'store', tmp_path/'store')
    (store/'shard-00003.npy').unlink()
    assert encode_folder(rae, photographs, store, rank=0, world=2, **SETTINGS) == [] # not its shard, and the manifest is there
    with pytest.raises(ParameterError, match='shard-00003.npy cannot be opened'): open_latents(store)
    assert encode_folder(rae, photographs, store, rank=1, world=2, **SETTINGS) == []
    assert files(store) == files(once/'store')

def test_resume(once, rae, photographs, tmp_path):
    with pytest.raises(ParameterError, match='nothing was begun'): encode_folder(rae, photographs, tmp_path/'new', resume='must', **SETTINGS)
    with pytest.raises(ParameterError, match='has finished shards already'): encode_folder(rae, photographs, once/'store', resume='never', **SETTINGS)
    before = identity(once/'store')
    for resume in ('auto', 'must'): assert encode_folder(rae, photographs, once/'store', resume=resume, **SETTINGS) == []
    assert identity(once/'store') == before

@pytest.mark.parametrize('change, sentence', [
    (dict(autoencoder=1), 'made_by.encoder.weights'), (dict(dtype='float16'), r"dtype \(there 'bfloat16', here 'float16'\)"), (dict(shard_images=11), 'planned_shards|images_per_shard'),
    (dict(flip=True), 'made_by.flip'), (dict(size=16), 'made_by.images.size'), (dict(precision='bfloat16'), 'made_by.precision')])
def test_going_on_with_something_else(once, rae, photographs, change, sentence):
    autoencoder = small_rae(change['autoencoder']) if 'autoencoder' in change else rae
    with pytest.raises(ParameterError, match=sentence): encode_folder(autoencoder, photographs, once/'store', **{**SETTINGS, **{k: v for k, v in change.items() if k != 'autoencoder'}})

@pytest.mark.parametrize('wrong, sentence', [(dict(rank=2, world=2), 'rank=2: accepted is a whole number from 0 to 1'), (dict(unreadable='ignore'), "unreadable='ignore'"), (dict(dtype='int7'), "dtype='int7'"), (dict(precision='half'), "precision='half'")])
def test_wrong_arguments(rae, photographs, tmp_path, wrong, sentence):
    with pytest.raises(ParameterError, match=sentence): encode_folder(rae, photographs, tmp_path, **{**SETTINGS, **wrong})

def test_workers_flips_and_types(once, rae, photographs, tmp_path):
    folder, plain = ClassFolder(photographs, SIZE), open_latents(once/'store')
    encode_folder(rae, folder, tmp_path/'flipped', 'float32', shard_images=10, batch=4, workers=2, flip=True)
    store = open_latents(tmp_path/'flipped', rae, folder)
    assert store.counts == [2*c for c in plain.counts] and store.manifest['made_by']['flip'] is True
    some = torch.tensor([0, 20, 72])
    with torch.no_grad(): direct = [rae.encode(torch.stack([folder[int(i)][0] for i in some]).flip(-1) if f else torch.stack([folder[int(i)][0] for i in some])) for f in (0, 1)]
    for f in (0, 1): assert torch.allclose(store.rows(2*some + f), direct[f], atol=1e-5)
    assert torch.allclose(plain.rows(some), direct[0], rtol=2**-8, atol=1e-5)
    encode_folder(rae, folder, tmp_path/'workers', shard_images=10, batch=4, workers=2)
    assert files(tmp_path/'workers') == files(once/'store')

# images that cannot be read

@pytest.fixture
def damaged(photographs, tmp_path):
    folder = shutil.copytree(photographs, tmp_path/'damaged')
    whole = (folder/'n00000001'/'n00000001_3.JPEG').read_bytes()
    (folder/'n00000001'/'n00000001_3.JPEG').write_bytes(whole[:len(whole)//2])
    (folder/'n00000001'/'n00000001_5.JPEG').write_bytes(b'')
    (folder/'n00000003'/'n00000003_0.JPEG').write_text('<html>404</html>')
    png = bytearray((folder/'n00000002'/'palette.png').read_bytes()); png[40:60] = bytes(20)
    (folder/'n00000002'/'palette.png').write_bytes(png)
    return folder
BAD = ['n00000001/n00000001_3.JPEG', 'n00000001/n00000001_5.JPEG', 'n00000002/palette.png', 'n00000003/n00000003_0.JPEG']

@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_images_are_named_and_cost_nothing(damaged, photographs, once, rae, tmp_path, workers):
    assert list(unreadable_images(ClassFolder(damaged, SIZE), workers)) == BAD
    with pytest.raises(UnreadableImage) as e: encode_folder(rae, damaged, tmp_path/'store', workers=workers, **SETTINGS)
    sentence = str(e.value)
    assert '4 images cannot be read' in sentence and all(name in sentence for name in BAD) and "unreadable='skip'" in sentence and '\n' not in sentence
    before = identity(tmp_path/'store')
    assert 3 <= len(before) <= 6
    repaired = shutil.copytree(tmp_path/'store', tmp_path/'repaired')
    for name in BAD: shutil.copy(photographs/name, damaged/name) # repaired under their names
    assert encode_folder(rae, damaged, repaired, **SETTINGS) == []
    assert files(repaired) == files(once/'store')

def test_skipping(damaged, once, rae, tmp_path):
    with pytest.raises(UnreadableImage): encode_folder(rae, damaged, tmp_path/'store', **SETTINGS)
    before = identity(tmp_path/'store')
    assert encode_folder(rae, damaged, tmp_path/'store', unreadable='skip', **SETTINGS) == []
    assert before.items() <= identity(tmp_path/'store').items()
    store, whole, folder = open_latents(tmp_path/'store', images=ClassFolder(damaged, SIZE)), open_latents(once/'store'), ClassFolder(damaged, SIZE)
    assert store.manifest['skipped'] == BAD and store.counts == [c - k for c, k in zip(whole.counts, (0, 2, 1, 1))]
    rest = torch.tensor([i for i in range(len(folder)) if folder.name(i) not in BAD])
    assert torch.allclose(store.rows(torch.arange(len(store))), whole.rows(rest), rtol=2**-7, atol=1e-3) # other batches, other rounding
    assert len(ClassFolder(damaged, SIZE, without=BAD)) == len(rest)
    with pytest.raises(ParameterError, match='there is no x.jpg'): ClassFolder(damaged, SIZE, without=['x.jpg'])

@pytest.mark.parametrize('workers', [0, 1])
def test_a_disk_that_fails_is_not_a_damaged_image(damaged, rae, tmp_path, workers):
    (damaged/'n00000000'/'a.JPEG').symlink_to(tmp_path/'gone')
    with pytest.raises(ParameterError, match='n00000000/a.JPEG cannot be read from the disk: No such file') as e: encode_folder(rae, damaged, tmp_path/'store', unreadable='skip', workers=workers, **SETTINGS)
    assert not isinstance(e.value, UnreadableImage) and '\n' not in str(e.value)

def test_latents_that_do_not_fit(rae, photographs, tmp_path):
    loud = RAE(rae.encoder, rae.decoder, var=torch.full((48, 4, 4), 1e-12), eps=0.)
    with pytest.raises(ParameterError, match='do not fit into float16'): encode_folder(loud, photographs, tmp_path/'store', 'float16', **SETTINGS)
    assert not [p for p in (tmp_path/'store').iterdir() if p.name != 'writing']

# opening and reading

@pytest.fixture
def store(once, tmp_path): return shutil.copytree(once/'store', tmp_path/'store')

def test_damage(store, rae, photographs, tmp_path):
    refused = lambda sentence, **kw: pytest.raises(ParameterError, match=sentence)
    open_latents(store, rae, ClassFolder(photographs, SIZE))
    with refused('made by another encoder: its weights'): open_latents(store, small_rae(1))
    other = RAE(rae.encoder, rae.decoder, var=rae.latent_var + 1)
    with refused('made by another encoder: its statistics.var'): open_latents(store, other)
    with refused('made by another encoder: its statistics.var'): open_latents(store, RAE(None, rae.decoder, var=rae.latent_var + 1)) # a decoder alone
    open_latents(store, RAE(None, rae.decoder, var=rae.latent_var))
    more = shutil.copytree(photographs, tmp_path/'more'); shutil.copy(more/'n00000000'/'grey.JPEG', more/'n00000000'/'again.JPEG')
    with refused('made from other images: number'): open_latents(store, images=ClassFolder(more, SIZE))
    os.rename(more/'n00000000'/'again.JPEG', more/'n00000000'/'z.JPEG'); os.unlink(more/'n00000000'/'grey.JPEG')
    with refused('made from other images: list'): open_latents(store, images=ClassFolder(more, SIZE))
    shard, text = store/'shard-00005.npy', (store/'manifest.json').read_text()
    whole = shard.read_bytes()
    for bytes, sentence in ((whole[:-1], 'has .* bytes, the manifest says'), (whole + b'x', 'has .* bytes'), (whole[:-1] + b'x', 'checksum'), (b'', 'has 0 bytes')):
        shard.write_bytes(bytes)
        with refused('shard-00005.npy.*' + sentence): open_latents(store)
    shard.unlink()
    with refused('shard-00005.npy cannot be opened'): open_latents(store)
    shard.write_bytes(whole)
    for old, new, sentence in (('"dtype": "bfloat16"', '"dtype": "float16"', 'altered'), ('"rows": 10', '"rows": 9', 'altered'), ('{', '', 'is damaged'), (text[len(text)//2:], '', 'is damaged'), ('"sha256"', '"sha"', 'altered|is damaged|lacks')):
        (store/'manifest.json').write_text(text.replace(old, new))
        with refused('manifest.json was altered|manifest.json is damaged|cannot be read' if '|' in sentence else sentence): open_latents(store)
    (store/'manifest.json').write_text(text); open_latents(store, verify=True)

def test_large_stores_are_verified_when_asked(store, monkeypatch):
    shard = store/'shard-00005.npy'
    shard.write_bytes(shard.read_bytes()[:-1] + b'x')
    open_latents(store, verify=False)
    with pytest.raises(ParameterError, match='checksum'): open_latents(store, verify=True)

def test_a_shard_that_is_lost_in_a_run(store):
    "A sentence, also from the prefetching thread, and no bus error"
    latents = open_latents(store)
    config = DistillConfig.preset('tiny', n_pos=10, n_neg=2, n_extra_neg=2)
    samples = lambda step: step_samples(latents, range(4), config, 0, step)
    expected = [samples(s) for s in range(3)]
    for a, b in zip(prefetch(samples, range(3)), expected): assert all(map(torch.equal, a, b))
    ahead = prefetch(samples, range(100))
    next(ahead)
    os.truncate(store/'shard-00002.npy', 5000)
    with pytest.raises(ParameterError, match='shard-00002.npy has 5000 bytes'): [x for x in ahead]
    with pytest.raises(ParameterError, match='shard-00002.npy has 5000 bytes'): samples(0)

def test_too_few_positives(once):
    store = open_latents(once/'store')
    store.require(min(store.counts))
    with pytest.raises(ParameterError, match=r'256 positives of a class are needed: class 0 has 18, and 3 more'): store.require(256)

@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), each=st.integers(1, 7), dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 99))
def test_random_access_equals_the_array(tmp_path_factory, counts, each, dtype, seed):
    g, folder = stream(seed), tmp_path_factory.mktemp('s')
    x = 10*torch.randn(sum(counts), 3, 2, 2, generator=g)
    memory = LatentStore(x.to(DTYPES[dtype][1]), counts)
    save_latents(LatentStore(x, counts), folder, dict(made='here'), dtype, shard_bytes=each*x[:1].nbytes*(4 if dtype == 'float32' else 2)//4 if len(x) else 1)
    disk = open_latents(folder)
    assert disk.counts == counts and len(disk.latents.table) == -(-len(x)//each) if len(x) else len(disk) == 0
    for c, n in enumerate(counts):
        assert torch.equal(disk.of_class(c), memory.of_class(c))
        assert torch.equal(disk.draw(c, n, stream(seed, c)), memory.draw(c, n, stream(seed, c)))
    if len(x):
        index = torch.randint(len(x), (20,), generator=g)
        assert torch.equal(disk.rows(index), memory.rows(index))
        assert torch.equal(disk.latents[index], memory.latents[index])
        for a, b in zip(disk.batch(9, stream(seed)), memory.batch(9, stream(seed))): assert torch.equal(a, b)
        with pytest.raises(ParameterError, match='rows'): disk.rows(torch.tensor([len(x)]))
    shutil.rmtree(folder)

def test_saving_again(tmp_path):
    a, b = (sort_by_class(torch.randn(n, 2, 2, 2, generator=stream(n)), torch.zeros(n, dtype=torch.int64), 2) for n in (50, 7))
    save_latents(a, tmp_path/'x', {}, shard_bytes=160)
    assert len(list((tmp_path/'x').glob('shard-*.npy'))) == 5
    with pytest.raises(ParameterError, match='over itself'): save_latents(open_latents(tmp_path/'x'), tmp_path/'x', {})
    save_latents(b, tmp_path/'x', {})
    assert len(list((tmp_path/'x').glob('shard-*.npy'))) == 1 and len(open_latents(tmp_path/'x')) == 7
    save_latents(open_latents(tmp_path/'x'), tmp_path/'y', {}, 'bfloat16') # from one type to another
    assert torch.equal(open_latents(tmp_path/'y').of_class(0), b.of_class(0).half().bfloat16().float())

def test_papermill_understands_every_parameter():
    assert set(inspect_notebook(str(ROOT/'nbs/imagenet/02_folders.ipynb'))) == {n.targets[0].id for n in ast.parse(tagged('imagenet/02_folders')).body}

def test_the_notebook_on_a_folder(once, photographs, tmp_path):
    "The run that ImageNet gets, on the generated folder: two processes after one another, then opened"
    given = dict(images=photographs, autoencoder=once/'rae', out=tmp_path/'out', image_size=SIZE, shard_images=10, batch=4, check=0, world=2)
    for rank in (1, 0):
        done = papermill('imagenet/02_folders', tmp_path, rank=rank, **given)
        assert done.returncode == 0, done.stderr[-3000:]
    assert files(tmp_path/'out') == files(once/'store')
