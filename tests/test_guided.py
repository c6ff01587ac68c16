"Guided sampling, a null label that was trained, guidance as a condition, several steps: from the run to the loaded generator"
from dataclasses import replace
import pytest
import torch

from drift_rae.distill import start
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import image_noise
from drift_rae.flow import load_teacher, one_step
from drift_rae.parts.generator import OneStepGenerator
from drift_rae.parts.recipe import step_strengths
from drift_rae.sharing.sets import make_images
from drift_rae.parts.step import config_for, step_labels, to_tokens
from drift_rae.parts.extrapolation import InWeights, in_steps, strength_time

SMALL = dict(steps=2, n_class=2, n_pos=16, n_neg=8, n_extra_neg=8, monitor_every=0, nproc=1)


@pytest.fixture(scope='module')
def tiny(): return OneStepGenerator.from_pretrained('tiny')


def run(tmp_path, changes):
    start(out=str(tmp_path/'run'), changes=changes, **SMALL)
    return OneStepGenerator.from_pretrained(tmp_path/'run')


def test_no_guidance_is_the_same_image_to_the_bit(tiny):
    labels = [3, 1, 3]
    plain = tiny.sample(labels, seed=4)
    for more in (dict(guidance=0.), dict(guidance=None), dict(guidance=0., guide=load_teacher())):
        assert torch.equal(plain, tiny.sample(labels, seed=4, **more))


@pytest.mark.parametrize('guide', ['null', 'teacher'])
def test_guidance_is_extrapolation(tiny, guide):
    labels, weak = torch.tensor([3, 1]), load_teacher().requires_grad_(False)
    z = image_noise(labels, tiny.autoencoder.latent_shape, 4)
    strong = one_step(tiny.model, z, labels)
    other = one_step(weak, z, labels) if guide == 'teacher' else one_step(tiny.model, z, torch.tensor([10, 10]))
    made = tiny.latents(labels, seed=4, guidance=.3, guide=weak if guide == 'teacher' else 'null')
    torch.testing.assert_close(made, strong + .3*(strong - other), atol=1e-5, rtol=0)


def test_a_folder_carries_its_guide_and_its_strength(tiny, tmp_path):
    for guide in ('null', load_teacher()):
        OneStepGenerator(tiny.model, tiny.autoencoder, guide=guide, guidance=.1).save_pretrained(tmp_path)
        again = OneStepGenerator.from_pretrained(tmp_path)
        assert again.guidance == .1
        wanted = tiny.sample([5], guidance=.1, guide=guide)
        torch.testing.assert_close(again.sample([5], guidance=None), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.sample([5]), tiny.sample([5]), atol=1e-5, rtol=0)
        recommended = make_images(generator=tmp_path, per_class=1, block=10, extrapolation=-1)
        assert (recommended.describe()['nfe'], recommended.describe()['extrapolation']) == (2, .1)


def test_a_run_with_groups_without_class(tmp_path):
    assert run(tmp_path, 'label_dropout=.5').guide == 'null'
    dropped = [step_labels(10, 2, 0, s, .5) for s in range(50)]
    assert all(l[1] == 10 and l[0] < 10 for l in dropped) # one of the two, always


def test_a_run_with_guidance_as_a_condition(tmp_path):
    made = run(tmp_path, 'strength=3. n_uncond=8')
    assert made.guide == 'condition'
    z = image_noise([3], made.autoencoder.latent_shape, 0)
    with torch.no_grad(): wanted = z - made.model(z, torch.full((1,), strength_time(2.)), torch.tensor([3]))
    torch.testing.assert_close(made.latents([3], guidance=1.), wanted, atol=1e-5, rtol=0)


def test_a_run_keeps_an_earlier_average_and_it_can_be_the_weak_side(tmp_path):
    final = run(tmp_path, 'snapshot=1')
    start(out=str(tmp_path/'short'), **{**SMALL, 'steps': 1}) # its first step is the same
    earlier, short = (OneStepGenerator.from_pretrained(tmp_path/d) for d in ('run/earlier', 'short'))
    assert all(torch.equal(p, q) for p, q in zip(earlier.model.parameters(), short.model.parameters()))
    assert not torch.equal(final.sample([3]), earlier.sample([3]))
    for name, guide in (('', earlier), ('weights:', InWeights(earlier.model))):
        images = make_images(generator=tmp_path/'run', per_class=1, block=10, extrapolation=.2, weak=f'{name}{tmp_path}/run/earlier')
        torch.testing.assert_close(images[3].float(), 255*final.sample([3], guidance=.2, guide=guide)[0] - .5, atol=.51, rtol=0)
    start(out=str(tmp_path/'run'), changes='snapshot=1', **SMALL) # finished: nothing happens
    start(out=str(tmp_path/'without'), **SMALL)
    with pytest.raises(ParameterError, match='has kept no earlier average'): start(out=str(tmp_path/'without'), changes='snapshot=1', **SMALL)


def test_in_weights_another_architecture_is_refused(tiny):
    from drift_rae.flow import DiTDH
    other = DiTDH(**{**tiny.model.config, 'class_dropout_prob': 0.})
    with pytest.raises(ParameterError, match='has other tensors'): tiny.sample([1], guidance=.1, guide=InWeights(other))


def test_a_run_of_two_steps(tmp_path):
    made = run(tmp_path, 'times=(1.,.5)')
    assert made.times == (1., .5) and made.noise_shape == (2, *made.autoencoder.latent_shape)
    z = image_noise([3], made.noise_shape, 0)
    torch.testing.assert_close(made.latents([3]), in_steps(made.model, z, torch.tensor([3]), (1., .5)), atol=1e-5, rtol=0)
    with pytest.raises(ParameterError, match='takes 2 steps'): made.sample([3], guidance=.1)
    assert make_images(generator=tmp_path/'run', per_class=1, block=10).describe()['nfe'] == 2


@pytest.mark.parametrize('changes, message', [('label_dropout=.6', 'one group of the 2'), ('strength=2.', 'n_uncond'), ('times=(.5,1.)', 'fall from 1')])
def test_what_cannot_be_meant_is_refused(tmp_path, changes, message):
    with pytest.raises(ParameterError, match=message): run(tmp_path, changes)


def test_switches_that_are_off_are_not_part_of_a_recipe():
    assert not {'label_dropout', 'strength', 'n_uncond', 'times'} & set(config_for('tiny').recipe())


def test_a_network_without_a_null_label_is_refused(tiny):
    from drift_rae.parts.step import check_null
    from drift_rae.flow import DiTDH
    net = DiTDH(**{**tiny.model.config, 'class_dropout_prob': 0.})
    with pytest.raises(ParameterError, match='class_dropout_prob > 0'): check_null(net, config_for('tiny', label_dropout=.1))
    with pytest.raises(ParameterError, match='no null label'):
        OneStepGenerator(net, tiny.autoencoder).sample([1], guidance=.1)


def test_reals_of_all_classes_are_negatives_with_the_weight_of_the_original():
    "(alpha-1)(N_gen-1)/N_unc; with strength 1 they count nothing, with a weight of 1 they are further generated samples"
    from drift_rae.parts.step import _add_unconditional, _pull
    config = config_for('tiny', strength=3., n_uncond=4, n_class=1, n_pos=5, n_neg=3, n_extra_neg=2)
    g = torch.Generator().manual_seed(0)
    gen, pos, extra = (torch.randn(n, 6, 2, 2, generator=g, dtype=torch.float64) for n in (3, 9, 2))
    tokens = [to_tokens(x) for x in (gen, pos, extra)]
    _, real, negatives, weight = _add_unconditional(tokens, [1.5], config)
    assert torch.equal(real, tokens[1][:, :5]) and torch.equal(negatives[:, 2:], tokens[1][:, 5:])
    assert torch.equal(weight, torch.tensor([1., 1., *[1.5*(5-1)/4]*4], dtype=torch.float64).expand(4, 6))
    plain = config_for('tiny', n_class=1, n_pos=5, n_neg=3, n_extra_neg=2)
    def pull(pos, extra, config, **more): return _pull(gen, pos, extra, [3], config, 0, 0, **more)[1]
    without, plain = (replace(c, drift=replace(c.drift, perturbation='off')) for c in (config, plain)) # their noise depends on the number of samples
    torch.testing.assert_close(pull(pos, extra, without, strengths={3: 1.}), pull(pos[:5], extra, plain), atol=1e-6, rtol=1e-6)
    more = torch.cat([extra, pos[5:]])
    torch.testing.assert_close(pull(pos, extra, without, strengths={3: 2.}), pull(pos[:5], more, plain), atol=1e-6, rtol=1e-6)


def test_strengths_are_drawn_per_class_from_a_power_law():
    "P(alpha < a) = (1 - a^-2)/(1 - 4^-2) on [1, 4]"
    config = config_for('tiny', strength=4., n_uncond=4)
    drawn = [step_strengths(range(10), config, 0, s, null=10) for s in range(200)]
    assert all(len(set(d.values())) == 10 for d in drawn) # each class has its own
    a = torch.tensor([v for d in drawn for v in d.values()])
    assert a.min() >= 1 and a.max() <= 4
    for x in (1.2, 1.5, 2., 3.): assert abs((a < x).double().mean() - (1 - x**-2)/(1 - 4**-2)) < .04
