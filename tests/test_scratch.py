"Table 9 through the program that distils: fresh weights, decode-encode, SD-VAE; and what is refused"
import json
from pathlib import Path
import pytest, torch
import small_runs
from drift_rae import ablations
from drift_rae.networks import sdvae
from drift_rae.autoencoder import RAE
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import stream
from drift_rae.distill import distill, load_generator, run, start
from drift_rae.imagenet.folders import digits_folder, encode_folder
from drift_rae.worlds.latents import describe_encoder, latent_store, save_latents
from drift_rae.parts.step import RECIPE, config_for, fresh_model

RESULTS = Path(__file__).parents[1]/'nbs'/'results'/'ablations'
FEW = dict(n_class=2, n_pos=8, n_neg=4, n_extra_neg=4, monitor_every=0)

def test_older_recipes_keep_their_names():
    assert 'decode_encode' not in config_for('tiny').recipe() and set(config_for('tiny').recipe()) == set(RECIPE)
    assert config_for('tiny', decode_encode=True).recipe()['decode_encode'] is True
    use, left = ablations.stored(RESULTS)
    assert use and not left

def test_fresh_weights_have_the_shape_of_the_latents_and_the_seed_of_the_run():
    store = small_runs.store()
    a, b, c = (fresh_model('tiny', store, seed).state_dict() for seed in (0, 0, 1))
    assert a['y_embedder.embedding_table.weight'].shape[0] == small_runs.CLASSES + 1 and a['s_embedder.proj.weight'].shape[1] == 8
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['s_embedder.proj.weight'], c['s_embedder.proj.weight'])
    before = torch.get_rng_state()
    fresh_model('tiny')
    assert torch.equal(before, torch.get_rng_state())

def test_a_fresh_run_with_decode_encode_stops_and_goes_on(tmp_path):
    options = dict(FEW, teacher='fresh', seed=5)
    both = dict(options, changes='decode_encode=True checkpoint_every=1')
    rows = start(out=str(tmp_path/'whole'), **both, steps=3)
    assert len(rows) == 3 and all(r['gradient_norm'] > 0 for r in rows)
    made = load_generator(tmp_path/'whole')
    assert made.about['config']['decode_encode'] is True and made.about['teacher'] == 'fresh' and made.sample([3]).shape == (1, 3, 16, 16)
    plain = start(out=str(tmp_path/'plain'), **dict(options, changes='checkpoint_every=1'), steps=3)
    assert plain[0]['gradient_norm'] != rows[0]['gradient_norm']
    with pytest.raises(ParameterError, match='holds another run.*config.decode_encode was True and is None'): start(out=str(tmp_path/'whole'), **dict(options, changes='checkpoint_every=1'), steps=3)
    with pytest.raises(ParameterError, match='holds another run.*config.decode_encode was None and is True'): start(out=str(tmp_path/'plain'), **both, steps=3)
    for kind in ('pt', 'json'): (tmp_path/f'whole/checkpoints/step_0000003.{kind}').unlink()
    again = start(out=str(tmp_path/'whole'), **both, steps=3, resume='must')
    assert [r['gradient_norm'] for r in again] == [r['gradient_norm'] for r in rows]

def test_another_autoencoder_is_another_run(tmp_path):
    go = lambda scale: distill(small_runs.teacher(), small_runs.store(), small_runs.config(decode_encode=True), folder=tmp_path, autoencoder=small_runs.Autoencoder(scale))
    go(1.)
    with pytest.raises(ParameterError, match='holds another run: autoencoder was'): go(2.)

def test_decode_encode_without_an_encoder_is_one_sentence_before_any_work(tmp_path):
    rae = RAE.from_pretrained('tiny')
    save_latents(latent_store('tiny'), tmp_path/'latents', dict(encoder=describe_encoder(rae)))
    RAE(None, rae.decoder, rae.latent_mean, rae.latent_var, rae.eps).save_pretrained(tmp_path/'blind')
    options = dict(FEW, teacher='fresh', autoencoder=str(tmp_path/'blind'), steps=2)
    for dry_run in (0, 1):
        with pytest.raises(ParameterError, match='decode_encode=True: the autoencoder has no encoder') as e:
            start(out=str(tmp_path/'out'), latents=str(tmp_path/'latents'), changes='decode_encode=True', dry_run=dry_run, **options)
        assert '\n' not in str(e.value) and not (tmp_path/'out').exists()
    with pytest.raises(ParameterError, match='give the latents'): start(out=str(tmp_path/'out'), **options)
    assert len(start(out=str(tmp_path/'out'), latents=str(tmp_path/'latents'), **options)) == 2 # without decode-encode it needs none
    with pytest.raises(ParameterError, match='the autoencoder has no encoder'): distill(small_runs.teacher(), small_runs.store(), small_runs.config(decode_encode=True))
    with pytest.raises(ParameterError, match='without a folder'): distill(small_runs.teacher(), small_runs.store(), small_runs.config(), folder=tmp_path/'maps', maps=(None, None))

def test_a_dry_run_goes_through_the_autoencoder_once(tmp_path, capsys):
    start(out=str(tmp_path), teacher='fresh', changes='decode_encode=True', dry_run=1, **FEW)
    said = capsys.readouterr().out
    assert 'are ready to start' in said and 'one latent [1, 32, 4, 4] decoded and encoded again: [1, 32, 4, 4], with a gradient of norm' in said

# --- SD-VAE, in small and with random weights
@pytest.fixture(scope='module')
def sd_folder(tmp_path_factory):
    pytest.importorskip('diffusers', reason='diffusers is not installed: pip install drift-rae[sdvae]')
    folder = tmp_path_factory.mktemp('sdvae')
    torch.manual_seed(0)
    halves = {k: sdvae.SD_VAE[k][:2] for k in ('down_block_types', 'up_block_types')}
    sdvae.sd_network({**sdvae.SD_VAE, **halves, 'block_out_channels': [8, 8], 'norm_num_groups': 4, 'layers_per_block': 1, 'sample_size': 16}).save_pretrained(folder)
    return folder

def test_sd_vae_is_an_autoencoder_for_the_program(sd_folder, tmp_path):
    vae = RAE.from_pretrained(sd_folder)
    assert isinstance(vae, sdvae.PatchedSDVAE) and vae.latent_shape == (16, 4, 4)
    x = torch.rand(3, 3, 16, 16)
    z = vae.encode(x, stream(0, 'z'))
    assert torch.equal(z, sdvae.patches(sdvae.load_sdvae(sd_folder).encode(x, stream(0, 'z'))))
    assert torch.equal(vae.decode(z), sdvae.load_sdvae(sd_folder).decode(torch.nn.functional.pixel_shuffle(z, 2)))
    encode_folder(vae, digits_folder(tmp_path/'images', 12), tmp_path/'latents', size=16, num_classes=10) # as imagenet/02_folders does
    options = dict(FEW, teacher='fresh', autoencoder=str(sd_folder), latents=str(tmp_path/'latents'), steps=2)
    assert len(start(out=str(tmp_path/'out'), **dict(options, monitor_every=1, changes='keep=1'))) == 2
    made = load_generator(tmp_path/'out')
    assert made.model.in_channels == 16 and made.sample([3, 4]).shape == (2, 3, 16, 16)
    torch.testing.assert_close(made.sample([3]), vae.decode(made.latents([3])), atol=1e-6, rtol=0)
    with pytest.raises(ParameterError, match='decode_encode=True: this autoencoder is a VAE'): start(out=str(tmp_path/'no'), **options, changes='decode_encode=True')
    with pytest.raises(ParameterError, match='were made by another encoder'): start(out=str(tmp_path/'no'), **dict(options, autoencoder='tiny'))

def test_digits_in_sd_vae_are_the_same_in_every_process(sd_folder):
    vae = RAE.from_pretrained(sd_folder)
    a, b = (latent_store('tiny', autoencoder=vae).of_class(3) for _ in range(2))
    assert torch.equal(a, b)

def test_sd_vae_of_the_hub_is_known_by_its_configuration(sd_folder, monkeypatch):
    from drift_rae import autoencoder
    asked = []
    def local(repo, files, revision=None, cache=None): asked.append((repo, *files)); return sd_folder
    monkeypatch.setattr(autoencoder, 'hub_folder', local); monkeypatch.setattr(sdvae, 'hub_folder', local); monkeypatch.setattr(sdvae, 'digests_of', lambda *a: {}) # a small file in the place of the released one
    assert RAE.from_pretrained('stabilityai/sd-vae-ft-mse').latent_shape == (16, 4, 4)
    assert asked == [('stabilityai/sd-vae-ft-mse', 'config.json'), ('stabilityai/sd-vae-ft-mse', 'config.json', 'diffusion_pytorch_model.safetensors')]
