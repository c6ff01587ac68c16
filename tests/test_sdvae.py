"SD-VAE against diffusers, on small random weights; and what is said without diffusers"
import json, sys
import pytest, torch
from drift_rae.networks import sdvae
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import stream

SMALL = {**sdvae.SD_VAE, 'block_out_channels': [8, 8, 16, 16], 'norm_num_groups': 4, 'layers_per_block': 1, 'sample_size': 32}

@pytest.fixture(scope='module')
def network():
    pytest.importorskip('diffusers', reason='diffusers is not installed: pip install drift-rae[sdvae]')
    torch.manual_seed(1)
    net = sdvae.sd_network(SMALL).eval().requires_grad_(False)
    for p in net.parameters(): p.add_(.02*torch.randn(p.shape)) # no bias stays zero
    return net

@pytest.fixture
def folder(network, tmp_path): network.save_pretrained(tmp_path); return tmp_path

def same(a, b): assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_numbers_of_diffusers(network, folder):
    x = torch.rand(2, 3, 32, 32)
    p = network.encode(2*x - 1).latent_dist
    vae = sdvae.load_sdvae(folder)
    torch.testing.assert_close(vae.encode(x, stream(3, 'x')), .18215*p.sample(stream(3, 'x')), atol=1e-6, rtol=0)
    torch.testing.assert_close(sdvae.load_sdvae(folder, sample=False).encode(x), .18215*p.mode(), atol=1e-6, rtol=0)
    assert torch.equal(sdvae.load_sdvae(folder, sample=False, scale=1.).encode(x), p.mode())
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(vae.decode(z, clamp=False), network.decode(z/.18215).sample/2 + .5, atol=1e-6, rtol=0)
    assert vae.decode(9*z).min() >= 0 and vae.decode(9*z).max() <= 1 and vae.latent_shape == (4, 4, 4)

def test_old_names(network, folder):
    "The released files call the attention's parts query, key, value and proj_attn, and may hold them as 1x1 convolutions"
    from safetensors.torch import save_file
    old = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value'}
    def name(k): return '.'.join(old.get(p, p) for p in k.replace('to_out.0', 'proj_attn').split('.'))
    state = {name(k): v.contiguous() for k, v in network.state_dict().items()}
    assert sum('proj_attn' in k for k in state) == 4
    save_file(state, folder/'diffusion_pytorch_model.safetensors')
    same(sdvae.load_sdvae(folder).network.state_dict(), network.state_dict())
    (folder/'diffusion_pytorch_model.safetensors').unlink()
    torch.save({k: v[..., None, None] if 'query.weight' in k else v for k, v in state.items()}, folder/'diffusion_pytorch_model.bin')
    same(sdvae.load_sdvae(folder).network.state_dict(), network.state_dict())

def test_wrong_folders(network, folder):
    file = folder/'diffusion_pytorch_model.safetensors'
    for change, says in ((lambda: (folder/'config.json').write_text(json.dumps({**SMALL, 'latent_channels': 8})), 'holds another architecture'),
                         (lambda: (folder/'config.json').write_text(json.dumps(dict(layers=3))), "unknown entry 'layers' in the configuration"),
                         (lambda: (folder/'config.json').write_text(json.dumps(SMALL)) and file.write_bytes(file.read_bytes()[:5000]), 'not a whole safetensors file'),
                         (file.unlink, 'diffusion_pytorch_model.safetensors: expected'), ((folder/'config.json').unlink, 'config.json: expected')):
        change()
        with pytest.raises(ParameterError) as e: sdvae.load_sdvae(folder)
        assert says in str(e.value) and '\n' not in str(e.value), str(e.value)

def test_full_size_on_meta(network):
    with torch.device('meta'): vae = sdvae.SDVAE(sdvae.sd_network(), sample=False); z = vae.encode(torch.zeros(1, 3, 256, 256))
    assert tuple(z.shape[1:]) == vae.latent_shape == (4, 32, 32) and sum(p.numel() for p in vae.parameters()) == 83_653_863

def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    with pytest.raises(ParameterError, match=r'SD-VAE needs the package diffusers: pip install drift-rae\[sdvae\]'): sdvae.load_sdvae()
