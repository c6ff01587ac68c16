"Each page of the site as its reader gets it, made by pages.py with what Quarto is made of: one test for each page"
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip('pypandoc', reason='pypandoc_binary is not installed: pandoc renders the pages')
import pages

ROOT, NBS = pages.ROOT, pages.NBS


@pytest.fixture(scope='session')
def site(tmp_path_factory): return pages.shared_site(pages.session_folder(tmp_path_factory))


@pytest.mark.parametrize('name', pages.PAGES)
def test_page(site, name):
    found = pages.problems(site[name], site)
    assert not found, '\n'.join(f'{pages.CHECKS[check]}: {what}' for check, what in found)


# ---- the checks find what they are for

PLANTED = dict(
    directive='#| echo: true', heading='#### Too deep', emphasis='a **bold that never ends', alt='![](x.png)',
    caption='a picture ![dog](x.png) in a line', list='Shown:\n- one thing\n- another', script='|x|^2+|z|^ is wrong',
    markdown='```python\n# see [`stored`](https://drift-rae.github.io/drift_rae/x.html#stored)\n```',
    math='$$\\undefined{x}$$', address='`<function f at 0x7f1b002a7a60>`', link='[there](#nowhere)', stem='as `05_flow` says', reference='as @nobody1900 and @fig-none say')
PLANTED_TOO = [('list', '(12) is an equation'), ('link', '[there](missing.ipynb)'), ('stem', 'in chapter 07'),
    ('reference', 'see @eq-99'),
    ('markdown', 'see [[`stored`](https://drift-rae.github.io/drift_rae/x.html#stored)](flow.html)'), ('markdown', '    [`f`](parts/05a_generator.ipynb)'),
    ('emphasis', '::: {.cell-output-markdown}\n### f\n```python\ndef f():\n```\n\n*a * b and c*d*\n:::')]
FINE = """A list:

- one, `code`, *italic*, **bold**, $x^2$, 3 * 4
- two

![A caption](x.png){#fig-x alt="A dog"}

$$ y = x^2 $$ {#eq-11}

By @eq-11 and @fig-x and [@deng2026drifting], [flow](05_flow.ipynb), `papermill nbs/05_flow.ipynb out.ipynb`.
"""


def small_page(tmp_path, text):
    shutil.copytree(NBS, tmp_path, dirs_exist_ok=True, ignore=lambda d, names: [n for n in names if Path(n).suffix not in ('.lua', '.bib', '.css')])
    (tmp_path/'x.png').write_bytes(b'x')
    (tmp_path/'template.html').write_text(pages.TEMPLATE)
    page = pages.Page('x.ipynb', tmp_path/'x.html', 'x.html', front=dict(title='T', description='S'))
    pages.pandoc(text, page, tmp_path, tmp_path)
    (tmp_path/'flow.html').write_text('')
    page.path.write_text(pages.links(page.path.read_text(), 'x.ipynb', {'x.ipynb': 'x.html', '05_flow.ipynb': 'flow.html'}))
    return page


@pytest.mark.parametrize('check, text', [*PLANTED.items(), *PLANTED_TOO])
def test_a_planted_fault_is_found(tmp_path, check, text):
    page = small_page(tmp_path, text)
    assert check in [name for name, _ in pages.problems(page, {page.source: page})]


def test_a_good_page_has_no_problem(tmp_path):
    page = small_page(tmp_path, FINE)
    assert pages.problems(page, {page.source: page}) == []
    assert '(11)' in page.html.find(id='eq-11').get_text()


def test_cell_options_act_as_in_quarto(tmp_path):
    errors = []
    def made(source, outputs=()):
        return pages.cell_markdown(dict(cell_type='code', source=source, outputs=list(outputs)), tmp_path, 'x', 0, errors)
    said = dict(output_type='stream', name='stdout', text='said\n')
    assert 'code()' not in made('#| echo: false\ncode()', [said]) and 'said' in made('#| echo: false\ncode()', [said])
    assert 'said' not in made('#| output: false\ncode()', [said])
    folded = made('#| code-fold: true\n#| code-summary: "Draw it"\ncode()')
    assert '<summary>Draw it</summary>' in folded and '#|' not in folded
    png = dict(output_type='display_data', data={'image/png': 'AAAA'})
    shown = made('#| label: fig-x\n#| fig-cap: What it shows\n#| fig-alt: A dog\ndraw()', [png])
    assert '![What it shows](x_files/0-0.png){#fig-x .cell-figure alt="A dog"}' in shown
    assert not errors
    made('#| fig-cap: one: two\ndraw()')
    assert errors


# ---- the configuration

def test_nbdev_docs_leaves_the_readme_alone_and_nothing_behind(tmp_path):
    "With a quarto on the path that records how it is called and makes a page"
    house, tools = tmp_path/'house', tmp_path/'tools'
    house.mkdir(), tools.mkdir()
    skip = shutil.ignore_patterns('weights', '__pycache__', '.ipynb_checkpoints', '[0-9]*', 'parts', 'networks', 'metrics', 'imagenet')
    shutil.copytree(ROOT/'nbs', house/'nbs', symlinks=True, ignore=skip)
    shutil.copytree(ROOT/'drift_rae', house/'drift_rae', ignore=shutil.ignore_patterns('weights', '__pycache__'))
    for name in ('settings.ini', 'README.md', '_quarto.yml', '.gitignore'): shutil.copy(ROOT/name, house/name)
    fake = tools/'quarto'
    fake.write_text('#!/bin/sh\necho "$@" >> "$QUARTO_LOG"\nmkdir -p _docs index_files && touch _docs/index.html _docs/README.md\n')
    fake.chmod(0o755)
    git = lambda *words: subprocess.run(['git', *words], cwd=house, capture_output=True, text=True, check=True).stdout
    git('init', '-q')
    git('add', '-A')
    os.utime(house/'README.md', (0, 0)) # older than the index, as in a fresh checkout it may be
    env = {**os.environ, 'PATH': f'{tools}:{os.environ["PATH"]}', 'PYTHONPATH': str(house), 'QUARTO_LOG': str(tmp_path/'log')}
    done = subprocess.run([sys.executable, '-c', 'from nbdev.quarto import nbdev_docs; nbdev_docs.__wrapped__(n_workers=1)'],
                          cwd=house, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'log').read_text().split('\n') == ['render --no-cache', '']
    assert (house/'_docs/index.html').is_file()
    assert (house/'README.md').read_bytes() == (ROOT/'README.md').read_bytes()
    new = [l for l in git('status', '--porcelain', '--untracked-files=all').splitlines() if l[:2] == '??']
    assert not new, new
    changed = [l for l in git('diff', '--name-only').splitlines() if l != 'drift_rae/_modidx.py'] # of the part that was copied
    assert not changed, changed


def quarto(): return yaml.safe_load((ROOT/'_quarto.yml').read_text())


def test_the_configuration_sits_at_the_top_and_names_files_that_exist():
    link = NBS/'_quarto.yml' # a copy in a source distribution, which has no links
    assert link.is_symlink() if (ROOT/'.git').exists() else link.read_bytes() == (ROOT/'_quarto.yml').read_bytes()
    assert link.resolve() == (ROOT/'_quarto.yml').resolve() or not link.is_symlink()
    config = quarto()
    html, website = config['format']['html'], config['website']
    named = [website['favicon'], html['css'], config['bibliography'], *config['filters']]
    named += [t for theme in html['theme'].values() for t in theme if t.endswith('.scss')]
    for name in named: assert (NBS/name).is_file(), name


def test_quarto_accepts_the_configuration():
    "The values whose type Quarto checks (src/resources/schema of quarto-cli); a wrong one ends the build"
    config = quarto()
    html, website = config['format']['html'], config['website']
    assert isinstance(website['favicon'], str)
    assert set(website['repo-actions']) <= {'none', 'edit', 'source', 'issue'}
    assert all(isinstance(website[k], bool) for k in ('page-navigation', 'back-to-top-navigation', 'bread-crumbs', 'open-graph', 'twitter-card'))
    assert html['code-overflow'] in ('scroll', 'wrap') and html['code-fold'] in (True, False, 'show')
    assert set(html['grid']) <= {'content-mode', 'sidebar-width', 'margin-width', 'body-width', 'gutter-width'}
    assert all(str(v).endswith(('px', 'rem')) for v in html['grid'].values())
    assert set(html['theme']) == {'light', 'dark'}
    assert html['html-math-method'] in ('mathjax', 'katex', 'mathml', 'plain', 'webtex', 'gladtex')
    assert set(html['code-tools']) <= {'source', 'toggle', 'caption'}
    assert isinstance(html['lightbox'], (bool, dict)) and isinstance(html['toc-depth'], int)
    assert config['execute'] == {'enabled': False}


def test_no_font_comes_from_another_host():
    "The named themes load Google Fonts unless their variable says not to"
    for theme in quarto()['format']['html']['theme'].values():
        own = [t for t in theme if t.endswith('.scss')]
        assert own and all('$web-font-path: false;' in (NBS/t).read_text() for t in own), theme
    for style in (*NBS.glob('*.css'), *NBS.glob('*.scss')): assert 'http' not in style.read_text(), style.name


def test_the_sidebar_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT/'.ci/sidebar', '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_key_of_the_bibliography_is_whole():
    text = (NBS/'references.bib').read_text()
    entries = text.split('\n@')
    for entry in entries:
        for name in ('title', 'author', 'year'): assert f'  {name} = {{' in entry, entry[:60]
    keys = [e.split('{')[1].split(',')[0] for e in entries]
    assert len(keys) == len(set(keys))


def test_the_readme_leads_into_the_notebooks_and_to_the_papers(tmp_path):
    "On an index with all that .ci/readme must turn into plain Markdown"
    import json
    cell = lambda kind, source, outputs=(): dict(cell_type=kind, source=source, outputs=list(outputs))
    index = dict(cells=[
        cell('markdown', 'See [flow](05_flow.ipynb#how) and [a site](https://x.org), [@holm1979; @deng2026drifting], by @efron1993.\n```sh\nls [a](b)\n```'),
        cell('code', '#| label: fig-a\n#| fig-alt: "A dog"\n#| echo: false\ndraw()', [dict(data={'image/svg+xml': '<svg/>'})])])
    for name in ('.ci', 'nbs'): (tmp_path/name).mkdir()
    shutil.copy(ROOT/'.ci/readme', tmp_path/'.ci'), shutil.copy(NBS/'references.bib', tmp_path/'nbs')
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(index))
    subprocess.run([sys.executable, tmp_path/'.ci/readme'], check=True)
    text = (tmp_path/'README.md').read_text()
    for part in ('[flow](nbs/05_flow.ipynb#how)', '[a site](https://x.org)', 'by Efron and Tibshirani 1993.',
                 '(Holm 1979; [Deng et al. 2026](https://arxiv.org/abs/2602.04770))', 'ls [a](b)',
                 '![A dog](nbs/images/index_0.svg)'): assert part in text, part
    assert 'draw()' not in text and (tmp_path/'nbs/images/index_0.svg').read_text() == '<svg/>'
