"Guidance as programs take it: names, defaults of Table 4, a weaker model in an interval, 8 bits, and the bias with both sample sizes"
import json
import pytest, torch
from drift_rae.autoencoder import RAE
from drift_rae.engine.parameters import ParameterError
from drift_rae.engine.streams import stream
from drift_rae.flow import load_teacher, sample
from drift_rae.metrics.frechet import frechet_bias, statistics
from drift_rae.metrics.images import to_uint8
from drift_rae.metrics.neighbours import evaluate_features
from drift_rae.parts.comparison import generate_with_each, measured_before
from drift_rae.sharing.sets import guidance_of, load_guide, make_images

@pytest.fixture(scope='module')
def weaker(tmp_path_factory):
    "The miniature's teacher with noise on its weights, as a file"
    model, path = load_teacher('tiny'), tmp_path_factory.mktemp('guide')/'weaker.safetensors'
    g = stream(0, 'weaker')
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02*torch.randn(p.shape, generator=g))
    return model, path

def test_the_default_of_xl_is_that_of_table_4_and_of_others_none():
    for teacher in ('', 'ditdh-xl', '/somewhere/stage2_model.pt'): assert guidance_of('xl', teacher) == dict(guidance=1.42, interval=(0., 1.), guide='ditdh-s')
    for model, teacher in (('tiny', ''), ('s', ''), ('b', ''), ('l', ''), ('xl', 'fresh')): assert guidance_of(model, teacher)['guidance'] == 1
    assert guidance_of('xl', guidance=1.) == guidance_of('tiny')
    assert guidance_of('xl', guide='none') == dict(guidance=1.42, interval=(0., 1.), guide='')

@pytest.mark.parametrize('given, sentence', [(dict(interval='0.5'), 'two times from 0 to 1'), (dict(interval='.7 .2'), 'the smaller one first'), (dict(interval='0 2'), 'two times'),
    (dict(guidance=-1.), 'a number from 1')])
def test_wrong_values(given, sentence):
    with pytest.raises(ParameterError, match=sentence): guidance_of('tiny', **given)

def test_make_images_guides_with_a_weaker_model_in_an_interval(weaker, monkeypatch):
    model, _ = weaker
    from drift_rae.sharing import sets as generator
    monkeypatch.setattr(generator, 'load_guide', lambda guide, like: model if guide == 'weaker' else load_guide(guide, like))
    made = make_images(steps=6, per_class=1, block=10, guidance=2., interval=(.2, .9), guide='weaker')
    z, y = torch.stack([made.noise(i) for i in range(10)]), torch.arange(10)
    latents = sample(load_teacher('tiny'), z, y, steps=6, guidance=2., interval=(.2, .9), guide=model)
    assert torch.equal(made.read(range(10)), to_uint8(RAE.from_pretrained('tiny').decode(latents).detach(), 'truncate'))
    about = json.loads(json.dumps(made.describe()))
    assert (about['guidance'], about['interval'], about['quantise']) == (2., [.2, .9], 'truncate') and len(about['guide']) == 16
    plain = make_images(steps=6, per_class=1, block=10)
    assert not torch.equal(plain.read(range(10)), made.read(range(10)))

def test_the_comparison_of_06_takes_the_same(weaker):
    teacher, (model, _) = load_teacher('tiny'), weaker
    z, y = torch.randn(4, 32, 4, 4, generator=stream(0, 'z')), torch.arange(4)
    options = dict(guidance=2., interval=(0., 1.), guide=model)
    made = generate_with_each(teacher, teacher, z, y, sampler=options)
    assert torch.equal(made['teacher_50'], sample(teacher, z, y, steps=50, **options))

def test_a_guide_that_does_not_fit(monkeypatch):
    teacher = load_teacher('tiny')
    other = load_teacher('tiny'); other.num_classes = 3
    monkeypatch.setattr('drift_rae.sharing.sets._load_any_size', lambda guide, device: other)
    with pytest.raises(ParameterError, match='its num_classes is 3, the teacher has 10'): load_guide('other', teacher)

def test_figures_of_another_guidance_are_not_taken_for_these(tmp_path):
    config = dict(samples_per_class=5, guidance=json.loads(json.dumps(guidance_of('xl'))))
    (tmp_path/'done.json').write_text(json.dumps(dict(metrics=dict(config=config)))); (tmp_path/'samples.png').touch()
    assert measured_before(tmp_path, 5, guidance_of('xl')) and not measured_before(tmp_path, 5, guidance_of('xl', guidance=1.5))

def test_the_bias_has_both_sample_sizes():
    "A perfect generator: 2,000 images against 200 are off by the error of the 200"
    g = stream(0, 'bias')
    gen, real = (torch.randn(n, 64, generator=g, dtype=torch.float64) for n in (2_000, 200))
    m = evaluate_features(gen, real, balls=real[:50])
    assert m['fd_bias'] == pytest.approx(frechet_bias(statistics(real), 2_000, 200)) and m['fd_bias'] > 9*frechet_bias(statistics(real), 2_000)
    assert m['fd_bias'] == pytest.approx(m['fd'], rel=.25)
