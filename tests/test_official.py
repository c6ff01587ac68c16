"What a notebook cell cannot hold of networks.released and networks.hub: a Hub that fails, its cache, damaged files, foreign repositories"
import hashlib, os, threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import huggingface_hub, pytest, torch
from safetensors.torch import save_file
from drift_rae.networks import digests, released as official
from drift_rae.autoencoder import RAE, RAE_FILES
from drift_rae.networks.vit import RAEDecoder, make_encoder
from drift_rae.engine.parameters import ParameterError
from drift_rae.flow import DiTDH, load_teacher, preset, save_teacher

ROOT, COMMIT = Path(__file__).parents[1], 'c0ffee'*6 + 'abcd'
SMALL = dict(embed_dim=24, depth=2, num_heads=3)
DECODER = {**official.decoder_config(), 'latent_dim': 24, 'decoder_hidden_size': 32, 'decoder_num_hidden_layers': 1, 'decoder_num_attention_heads': 2, 'decoder_intermediate_size': 64}

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache of the Hub's client, and no network"
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def into_cache(cache, repo, files, commit=COMMIT):
    "Lay files (path -> function that writes it) down where the client would have left them, links to blobs and all"
    root = cache/f"models--{repo.replace('/', '--')}"
    for path, write in files.items():
        blob, link = root/'blobs'/hashlib.sha256(path.encode()).hexdigest(), root/'snapshots'/commit/path
        for p in (blob, link): p.parent.mkdir(parents=True, exist_ok=True)
        write(blob); link.symlink_to(os.path.relpath(blob, link.parent))
    (root/'refs').mkdir(exist_ok=True); (root/'refs/main').write_text(commit)

@pytest.fixture(scope='module')
def rae():
    torch.manual_seed(0)
    r = RAE(make_encoder('dinov2', **SMALL), RAEDecoder(DECODER), var=torch.rand(24, 16, 16) + .5).eval()
    return r.requires_grad_(False)

def one_sentence(call, *says):
    with pytest.raises(ParameterError) as e: call()
    assert '\n' not in str(e.value) and all(s in str(e.value) for s in says), str(e.value)
    return str(e.value)

def writer(path): return lambda p: p.write_bytes(Path(path).read_bytes())

# ---- from the cache, offline ----

def test_an_official_autoencoder_by_name(cache, tmp_path, rae, monkeypatch):
    "Decoder, statistics and encoder come from three files of two repositories"
    decoder, stats = official.export_official(rae, tmp_path/'out')
    row = official.OFFICIAL_RAES['dinov2-b']
    into_cache(cache, official.COLLECTION, {row['decoder']: writer(decoder), row['stats']: writer(stats)})
    weights = official.to_hugging_face({k[4:]: v.contiguous() for k, v in rae.encoder.state_dict().items()}, 'dinov2')
    into_cache(cache, 'facebook/dinov2-with-registers-base', {'model.safetensors': lambda p: save_file({k: v.contiguous() for k, v in weights.items()}, p)})
    one_sentence(lambda: RAE.from_pretrained('dinov2-b', decoder=DECODER), 'ViTXL_n08/model.pt is not the file that was expected', '5fedf7c9')
    monkeypatch.setattr(digests, 'SHA256', {official.COLLECTION: ('', {row['stats']: hashlib.sha256(stats.read_bytes()).hexdigest()})})
    monkeypatch.setattr(official, 'make_encoder', lambda name, **k: make_encoder(name, **{**SMALL, **k}))
    images = torch.rand(2, 3, 256, 256)
    for name, more in (('dinov2-b', {}), (official.COLLECTION, {}), (tmp_path/'out', {}), (official.COLLECTION, dict(revision=COMMIT))):
        again = RAE.from_pretrained(name, decoder=DECODER, **more)
        assert torch.equal(again.encode(images), rae.encode(images)) and torch.equal(again.decode(rae.encode(images)), rae.decode(rae.encode(images)))
    blind = RAE.from_pretrained('dinov2-b', decoder=DECODER, encoder='none')
    assert blind.encoder is None and blind.latent_shape == (24, 16, 16)

def test_what_is_not_in_the_cache(cache):
    one_sentence(lambda: RAE.from_pretrained('mae-b'), 'decoders/mae/base_p16/ViTXL_n08/model.pt', official.COLLECTION, 'offline mode', 'hf download')
    one_sentence(lambda: official.load_encoder('siglip2'), 'of the Hugging Face repository google/siglip2-base-patch16-256', 'offline mode')
    one_sentence(lambda: load_teacher('ditdh-xl'), 'ImageNet256/DiTDH-XL/stage2_model.pt', 'offline mode')
    one_sentence(lambda: RAE.from_pretrained('someone/rae'), 'config.json', 'someone/rae', 'nor is there a folder')

def test_our_own_files_in_a_repository(cache, tmp_path):
    tiny = RAE.from_pretrained('tiny')
    tiny.save_pretrained(tmp_path/'rae')
    into_cache(cache, 'someone/rae', {f: writer(tmp_path/'rae'/f) for f in ('config.json', *RAE_FILES)})
    images = torch.rand(2, 3, 16, 16)
    for revision in (None, COMMIT): assert torch.equal(RAE.from_pretrained('someone/rae', revision).encode(images), tiny.encode(images))
    one_sentence(lambda: RAE.from_pretrained('someone/rae', 'v2'), 'at revision v2')
    RAE(None, tiny.decoder, tiny.latent_mean, tiny.latent_var).save_pretrained(tmp_path/'blind')
    into_cache(cache, 'someone/blind', {f: writer(tmp_path/'blind'/f) for f in ('config.json', *RAE_FILES[1:])})
    assert RAE.from_pretrained('someone/blind').encoder is None

def test_teachers(cache, tmp_path):
    tiny = load_teacher('tiny')
    save_teacher(tmp_path/'teacher.safetensors', tiny)
    into_cache(cache, 'someone/teacher', {'teacher.safetensors': writer(tmp_path/'teacher.safetensors')})
    assert load_teacher('someone/teacher').shift == tiny.shift
    path = official.export_teacher(tiny, tmp_path)
    assert set(torch.load(path, weights_only=True)) == {'ema'}
    again = load_teacher(path, 'tiny').state_dict()
    assert all(torch.equal(v, again[k]) for k, v in tiny.state_dict().items())
    into_cache(cache, official.COLLECTION, {official.OFFICIAL_TEACHERS['ditdh-s']['file']: writer(path)})
    for name, size in (('ditdh-s', 'xl'), (official.COLLECTION, 's'), (tmp_path, 'xl')):
        message = one_sentence(lambda: load_teacher(name, size), 'stage2_model.pt holds another architecture')
        assert 'of 382 tensors' in message if name == tmp_path else 'of another shape' in message

def test_a_file_that_changes_does_not_change_the_model(tmp_path):
    net = DiTDH(**preset('tiny')); path = official._save_pt(tmp_path/'teacher.pt', net.state_dict())
    save_teacher(tmp_path/'teacher.safetensors', net)
    for file in (path, tmp_path/'teacher.safetensors'):
        loaded = load_teacher(file, 'tiny'); before = {k: v.clone() for k, v in loaded.state_dict().items()}
        with open(file, 'r+b') as f: f.seek(0, 2); n = f.tell(); f.seek(n//2); f.write(b'\x41'*(n//4))
        assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items()), file

# ---- a Hub on this machine ----

class Hub(BaseHTTPRequestHandler):
    "Serves one file of 24 MiB as the Hub does; the first download breaks off halfway (the client keeps whole pieces of 10 MB)"
    content, log, broken = bytes(range(256))*(24 << 12), [], 1
    def log_message(self, *_): pass
    def do_HEAD(self): self.reply(False)
    def do_GET(self): self.reply(True)
    def reply(self, body):
        if self.path != '/someone/model/resolve/main/model.pt':
            self.send_response(404); self.send_header('X-Error-Code', 'EntryNotFound' if 'someone/model' in self.path else 'RepoNotFound')
            self.send_header('X-Repo-Commit', COMMIT); self.send_header('Content-Length', '0'); return self.end_headers()
        start = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].split('-')[0]) if body else 0
        if body: self.log.append(start)
        data = self.content[start:]
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(self.content)-1}/{len(self.content)}')
        for k, v in (('X-Repo-Commit', COMMIT), ('ETag', f'"{hashlib.sha256(self.content).hexdigest()}"'), ('Content-Length', str(len(data))), ('Accept-Ranges', 'bytes')): self.send_header(k, v)
        self.end_headers()
        if not body: return
        if Hub.broken: Hub.broken -= 1; self.wfile.write(data[:len(data)//2]); self.wfile.flush(); self.connection.close(); return
        self.wfile.write(data)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    Hub.log, Hub.broken = [], 1
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for k, v in dict(NO_PROXY='*', no_proxy='*', HF_HUB_OFFLINE='0').items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr('huggingface_hub.hf_hub_download', partial(huggingface_hub.hf_hub_download, endpoint=f'http://127.0.0.1:{server.server_port}'))
    yield monkeypatch
    server.shutdown(); server.server_close()

def test_download_resumes_and_is_cached(hub):
    digest = hashlib.sha256(Hub.content).hexdigest()
    try: path = official.fetch_file('someone/model', 'model.pt', sha256=digest) # a new client goes on by itself,
    except ParameterError: path = official.fetch_file('someone/model', 'model.pt', sha256=digest) # one before 1.0 with the next call
    assert path.read_bytes() == Hub.content
    assert len(Hub.log) == 2 and Hub.log[0] == 0 and Hub.log[1] > 0, 'the second request asks for the rest only'
    one_sentence(lambda: official.fetch_file('someone/model', 'model.pt', sha256='0'*64), 'model.pt is not the file that was expected', digest)
    one_sentence(lambda: official.fetch_file('someone/model', 'other.pt'), 'the repository does not hold it')
    one_sentence(lambda: official.fetch_file('nobody/model', 'model.pt'), 'no such repository')
    hub.setenv('HF_HUB_OFFLINE', '1')
    assert official.fetch_file('someone/model', 'model.pt', sha256=digest) == path and len(Hub.log) == 2

def test_a_hub_that_cannot_be_reached(hub):
    hub.setattr('time.sleep', lambda seconds: None) # the client tries several times
    hub.setattr('huggingface_hub.hf_hub_download', partial(huggingface_hub.hf_hub_download.func, endpoint='http://127.0.0.1:9'))
    one_sentence(lambda: official.fetch_file('someone/model', 'model.pt'), 'the Hub cannot be reached', 'hf download someone/model model.pt')

# ---- files that are not what they should be ----

def test_damaged_encoder_files(tmp_path):
    net = make_encoder('mae', **SMALL)
    weights = {f'vit.{k}': v.contiguous() for k, v in official.to_hugging_face({k[4:]: v for k, v in net.state_dict().items()}, 'mae').items()}
    more = {**weights, 'decoder.mask_token': torch.zeros(1), 'vit.layernorm.weight': torch.ones(24), 'vit.layernorm.bias': torch.ones(24)}
    save_file(more, tmp_path/'model.safetensors')
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad(): assert torch.equal(official.load_encoder('mae', tmp_path, **SMALL)(images), net.eval()(images))
    one_sentence(lambda: official.load_encoder('mae', tmp_path), 'model.safetensors holds another architecture')
    one_sentence(lambda: official.load_encoder('siglip2', tmp_path, **SMALL), 'missing')
    one_sentence(lambda: official.load_encoder('tiny'), 'accepted is one of dinov2, siglip2, mae')
    raw = (tmp_path/'model.safetensors').read_bytes()
    (tmp_path/'model.safetensors').write_bytes(raw[:len(raw)//2])
    one_sentence(lambda: official.load_encoder('mae', tmp_path, **SMALL), 'not a whole safetensors file')
    (tmp_path/'model.safetensors').unlink()
    torch.save(more, tmp_path/'pytorch_model.bin')
    with torch.no_grad(): assert torch.equal(official.load_encoder('mae', tmp_path, **SMALL)(images), net(images))
    (tmp_path/'pytorch_model.bin').unlink()
    one_sentence(lambda: official.load_encoder('mae', tmp_path, **SMALL), 'expected in the folder', 'model.safetensors', 'pytorch_model.bin')

def test_a_stage_one_training_checkpoint(tmp_path, rae):
    "The official training script saves the whole autoencoder, moving average and all"
    state = {**{f'decoder.{k}': v for k, v in rae.decoder.state_dict().items()}, 'encoder.layernorm.x': torch.ones(1)}
    torch.save(dict(model={k: 0*v for k, v in state.items()}, ema=state, epoch=3), tmp_path/'ep-3.pt')
    again = official.load_decoder(tmp_path/'ep-3.pt', DECODER).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in rae.decoder.state_dict().items())

def test_statistics(tmp_path):
    for stats in (dict(mean=None, var=torch.ones(768, 16, 16)), dict(mean=torch.zeros(768, 16, 16), var=torch.ones(768, 16, 16)), dict(var=torch.ones(768, 16, 16).half())):
        torch.save(stats, tmp_path/'stat.pt')
        mean, var = official.load_stats(tmp_path/'stat.pt', (768, 16, 16))
        assert (mean is None) == (stats.get('mean') is None) and var.dtype == torch.float32
    raw = (tmp_path/'stat.pt').read_bytes(); (tmp_path/'stat.pt').write_bytes(raw[:999])
    one_sentence(lambda: official.load_stats(tmp_path/'stat.pt', (768, 16, 16)), 'not a whole PyTorch file')

@pytest.mark.parametrize('size, millions, tensors', [('b', 86.44, 200), ('l', 304.15, 392), ('xl', 415.35, 456)])
def test_decoder_sizes(size, millions, tensors):
    with torch.device('meta'): decoder = RAEDecoder(official.decoder_config(size=size))
    assert abs(sum(p.numel() for p in decoder.parameters())/1e6 - millions) < .01 and len(decoder.state_dict()) == tensors

def test_each_released_autoencoder_has_the_shape_of_its_encoder():
    for name, row in official.OFFICIAL_RAES.items():
        config = official.decoder_config(name)
        with torch.device('meta'): encoder = make_encoder(row['encoder'], input_size=row['input_size'])
        assert encoder.vit.patch_embed.num_patches == config['num_patches'] and encoder.dim == config['latent_dim']
        assert encoder.config['image_mean'] == config['image_mean'] and encoder.config['image_std'] == config['image_std']

# ---- the numbers of the official classes ----

def test_encoders_are_official():
    from safetensors import safe_open
    oracle = torch.load(ROOT/'tests/fixtures/encoder.pt', weights_only=True)
    net = make_encoder('dinov2', embed_dim=24, depth=3, num_heads=3)
    from drift_rae.engine.files import fill
    fill(net.vit, official.from_hugging_face(oracle['state_dict'], 'dinov2'), 'oracle')
    case = oracle['normalised']['varonly']
    with torch.no_grad():
        torch.testing.assert_close(net(oracle['images']), oracle['z'], atol=1e-5, rtol=0)
        torch.testing.assert_close(RAE(net, RAEDecoder(DECODER), case['mean'], case['var'], case['eps']).encode(oracle['images']), case['z'], atol=1e-5, rtol=0)
    for family in ('siglip2', 'mae'):
        with safe_open(ROOT/f'tests/fixtures/encoder_{family}.safetensors', 'pt') as f: tensors = {k: f.get_tensor(k) for k in f.keys()}
        net = make_encoder(family, **SMALL)
        fill(net.vit, official.from_hugging_face({k[6:]: v for k, v in tensors.items() if k.startswith('state.')}, family), family)
        with torch.no_grad(): torch.testing.assert_close(net(tensors['images']/255).flatten(2).transpose(1, 2), tensors['tokens'], atol=1e-5, rtol=0)

@pytest.mark.skipif(not all(isinstance(__import__('huggingface_hub').try_to_load_from_cache(*f), str) for f in (
    (official.COLLECTION, official.OFFICIAL_RAES['dinov2-b']['decoder']), ('facebook/dinov2-with-registers-base', 'model.safetensors'))),
    reason='the released decoder and DINOv2 (2 GB) are not in the cache of the Hub; RAE.from_pretrained("dinov2-b") fetches them')
def test_the_released_autoencoder_reconstructs_the_cat():
    import numpy as np
    from PIL import Image
    cat = torch.from_numpy(np.array(Image.open(ROOT/'nbs/images/pixabay_cat.png').convert('RGB'))).permute(2, 0, 1)[None]/255
    rae = RAE.from_pretrained('dinov2-b')
    with torch.no_grad(): error = (rae.decode(rae.encode(cat)) - cat).square().mean()
    assert -10*error.log10() > 15

@pytest.mark.parametrize('family', list(official.HUGGING_FACE))
def test_encoders_against_transformers(family, tmp_path):
    "The real width and position grid, as transformers writes and runs them; what the official encoder classes add is done here by hand"
    tf = pytest.importorskip('transformers', reason='transformers is not installed; the package does not need it')
    depth = 2
    torch.manual_seed(5)
    if family == 'dinov2': net = tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_hidden_layers=depth)); tower, norm = net, 'layernorm'
    if family == 'siglip2': net = tf.SiglipVisionModel(tf.SiglipVisionConfig(image_size=256, num_hidden_layers=depth)); tower, norm = net.vision_model, 'post_layernorm'
    if family == 'mae': net = tf.ViTMAEForPreTraining(tf.ViTMAEConfig(num_hidden_layers=depth, decoder_num_hidden_layers=1, mask_ratio=0.)); tower, norm = net.vit, 'layernorm'
    for p in net.parameters(): p.data += .02*torch.randn(p.shape)
    net.save_pretrained(tmp_path)
    last = getattr(tower, norm); last.weight = last.bias = None
    encoder, images = official.load_encoder(family, tmp_path, depth=depth), torch.rand(1, 3, 256, 256)
    size = encoder.input_size
    x = torch.nn.functional.interpolate(images, size=(size, size), mode='bicubic', align_corners=False)
    more = dict(dinov2={}, siglip2=dict(interpolate_pos_encoding=True), mae=dict(noise=torch.arange(256.)[None], interpolate_pos_encoding=True))[family]
    with torch.no_grad():
        tokens = tower.eval()((x - encoder.mean)/encoder.std, **more).last_hidden_state[:, dict(dinov2=5, siglip2=0, mae=1)[family]:]
        torch.testing.assert_close(encoder(images).flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=0)
