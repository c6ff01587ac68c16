"Each page as its reader gets it: processed by nbdev, rendered to HTML, in the sidebar, without raw directives"
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from test_project import NOTEBOOKS, ROOT, copy_of_the_house

@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    house = copy_of_the_house(tmp_path_factory.mktemp('pages'))
    (house/'_quarto.yml').write_text((ROOT/'_quarto.yml').read_text())
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs()'], cwd=house, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    processed = sorted(str(p) for p in (house/'_proc').glob('*.ipynb'))
    done = subprocess.run([sys.executable, '-m', 'jupyter', 'nbconvert', '--to', 'html', *processed], cwd=house, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return house/'_proc'

@pytest.mark.parametrize('name', [p.stem for p in NOTEBOOKS])
def test_page(pages, name):
    html = (pages/f'{name}.html').read_text()
    plain = re.sub(r'<[^>]+>', '', html)
    assert not re.findall(r'^\s*#\|\s*(?:export|hide|default_exp|eval|exec_doc)\b.*', plain, re.M)
    assert 'Traceback (most recent call last)' not in plain
    front = ''.join(json.loads((pages/f'{name}.ipynb').read_text())['cells'][0]['source'])
    assert re.search(r'^title: \S', front, re.M), 'nbdev found no title'

def test_the_sidebar_has_every_page_in_reading_order():
    listed = re.findall(r'^\s+- (\w+)\.ipynb', (ROOT/'_quarto.yml').read_text(), re.M)
    assert sorted(listed) == [p.stem for p in NOTEBOOKS]
    assert listed[0] == 'index'

def test_the_site_configuration_sits_at_the_top():
    assert (ROOT/'nbs/_quarto.yml').is_symlink() and (ROOT/'nbs/_quarto.yml').resolve() == (ROOT/'_quarto.yml').resolve()
