"nbs/07_evaluate.ipynb as a program: the ImageNet path on a generated folder with random extractors, and refusals"
import json
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
import programs

ROOT = Path(__file__).parent.parent
MISSING = dict(TORCH_HOME='/nonexistent')


def papermill(notebook, env=None, **parameters):
    "Run the notebook; returns (exit code, what it said, output notebook)"
    p = programs.papermill('07_evaluate', ROOT, notebook, dict(MPLBACKEND='agg', **(env or {})), **parameters)
    return p.returncode, p.stdout + p.stderr, json.loads(Path(notebook).read_text()) if Path(notebook).is_file() else None


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Two folders of 10 PNG files of 64 pixels"
    at, rng = tmp_path_factory.mktemp('imagenet'), np.random.RandomState(0)
    for name in ('generated', 'real'):
        (at/name).mkdir()
        for i in range(10): Image.fromarray(rng.randint(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(at/name/f'{i}.png')
    return at


def test_imagenet_path(folders, tmp_path):
    "Every step that 50,000 images would take, with the true architecture of Inception and one block of DINOv2's ViT-L"
    code, said, _ = papermill(tmp_path/'out.ipynb', model='xl', generator=folders/'generated', reference=folders/'real', inception='random', dinov2='random',
        out=tmp_path/'run', bootstrap=2)
    assert code == 0, said[-3000:]
    rows = json.loads((tmp_path/'run/evaluation.json').read_text())
    assert set(rows) == {'generated'} and set(rows['generated']) == {'inception (random weights)', 'dinov2 (random weights)'}
    for r in rows['generated'].values():
        assert {'fd', 'fd_bias', 'fd_interval', 'precision', 'recall', 'kid', 'n', 'n_real'} <= set(r['metrics'])
        assert all(np.isfinite(v).all() for v in r['metrics'].values())
        p = r['protocol']
        assert p['images']['n'] == p['reference']['n_statistics'] == 10 and len(p['images']['hash']) == len(p['extractor']['weights']) == 16
        assert p['versions']['torch'] == torch.__version__.split('+')[0] or p['versions']['torch'] == torch.__version__
    assert 'is' in rows['generated']['inception (random weights)']['metrics']


@pytest.mark.parametrize('parameters, sentence', [
    (dict(model='xl'), 'model=xl: give -p generator PATH and -p reference PATH'),
    (dict(model='huge'), "model='huge': accepted is one of tiny, nano, mini, s, b, l, xl"),
])
def test_refused(tmp_path, parameters, sentence):
    code, said, _ = papermill(tmp_path/'out.ipynb', out=tmp_path/'run', **parameters)
    assert code == 1 and sentence in said
    assert not (tmp_path/'run').exists()


def test_missing_weights(folders, tmp_path):
    "The file and the place where it belongs are named before any work"
    code, said, _ = papermill(tmp_path/'out.ipynb', MISSING, model='xl', generator=folders/'generated', reference=folders/'real', out=tmp_path/'run')
    assert code == 1 and 'no inception weights at /nonexistent/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth' in said
