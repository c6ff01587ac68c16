"The decoder against outputs of the official implementation (tests/fixtures/README.md)"
from pathlib import Path
import pytest, torch
from drift_rae.autoencoder import RAE
from drift_rae.networks.vit import RAEDecoder, sincos_positions
from drift_rae.engine.parameters import ParameterError

FIXTURE = Path(__file__).parent/'fixtures/decoder.pt'

@pytest.fixture(scope='module')
def oracle(): return torch.load(FIXTURE, weights_only=True)

@pytest.fixture(scope='module')
def decoder(oracle):
    decoder = RAEDecoder(oracle['config'])
    decoder.load_state_dict(oracle['state_dict'], strict=True)
    return decoder.requires_grad_(False)

def test_logits(oracle, decoder): torch.testing.assert_close(decoder(oracle['z']), oracle['logits'], atol=1e-5, rtol=0)

def test_images(oracle, decoder): torch.testing.assert_close(RAE(None, decoder).decode(oracle['z'], clamp=False), oracle['recon'], atol=1e-5, rtol=0)

def test_images_with_a_variance_and_no_mean(oracle, decoder):
    case = oracle['normalised']['varonly']
    assert case['mean'] is None
    rae = RAE(None, decoder, None, case['var'], case['eps'])
    torch.testing.assert_close(rae.decode(case['z'], clamp=False), case['recon'], atol=1e-5, rtol=0)

def test_positions(oracle): torch.testing.assert_close(sincos_positions(32, 16), oracle['state_dict']['decoder_pos_embed'][0, 1:], atol=1e-6, rtol=0)

def test_a_folder_with_half_a_file(tmp_path):
    RAE.from_pretrained('tiny').save_pretrained(tmp_path)
    whole = (tmp_path/'decoder.safetensors').read_bytes()
    (tmp_path/'decoder.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(ParameterError, match='decoder.safetensors is not a whole safetensors file'): RAE.from_pretrained(tmp_path)

def test_a_folder_of_another_architecture(tmp_path):
    from drift_rae.engine.files import load_weights, save_weights
    RAE.from_pretrained('tiny').save_pretrained(tmp_path)
    weights, config = load_weights(tmp_path/'decoder.safetensors')
    save_weights(tmp_path/'decoder.safetensors', weights, {**config, 'decoder_hidden_size': 32})
    with pytest.raises(ParameterError, match='disagree about decoder_hidden_size of the decoder: 64 and 32'): RAE.from_pretrained(tmp_path)
    (tmp_path/'config.json').unlink()
    with pytest.raises(ParameterError, match='decoder.safetensors holds another architecture: of .* of another shape') as e: RAE.from_pretrained(tmp_path)
    assert '\n' not in str(e.value)
