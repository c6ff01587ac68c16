"Each page of the site in a real browser, 1400 and 390 pixels wide: nothing overflows, is cut, is missing or fails"
import pytest

pytest.importorskip('pypandoc', reason='pypandoc_binary is not installed: pandoc renders the pages')
pytest.importorskip('websocket', reason='websocket-client is not installed: it drives the browser')
import browser
import pages

pytestmark = pytest.mark.skipif(browser.program() is None, reason='chromium is not installed (Debian: apt-get install chromium)')


@pytest.fixture(scope='session')
def measured(tmp_path_factory): return browser.problems_of(pages.shared_site(pages.session_folder(tmp_path_factory)))


@pytest.mark.parametrize('name', pages.PAGES)
def test_page(measured, name):
    assert not measured[name], '\n'.join(f'{browser.CHECKS[check]}: {what}' for check, what in measured[name])


FAULTS = {
    'page-phone': '<div style="width: 700px">wide</div>', 'page-wide': '<div style="width: 2000px">wide</div>',
    'cut-wide': f'<pre style="overflow: auto; white-space: pre">{"x"*400}</pre>', 'image': '<img src="none.png" alt="none">',
    'noalt': '<img src="none.png">', 'tex': r'<p>\(x^2\)</p>', 'console': '<script>throw new Error("no")</script>',
    'scroll-wide': f'<table style="display: block; overflow-x: auto"><tr><td>{"x"*400}</td></tr></table>'}


@pytest.fixture(scope='module')
def chromium():
    with browser.Browser() as b: yield b


@pytest.mark.parametrize('check', [*FAULTS, None])
def test_a_planted_fault_is_found(chromium, tmp_path, check):
    file = tmp_path/'x.html'
    file.write_text(f'<!DOCTYPE html><html><body><p>Fine.</p>{FAULTS.get(check, "")}</body></html>')
    found = {name for name, _ in browser.measure(chromium, pages.Page('x.ipynb', file, 'x.html'))}
    assert check in found if check else not found


def test_100_characters_stand_on_one_line(chromium, tmp_path):
    "With the site's style sheet, in code and in output; 130 go on in a second line and are not cut"
    import shutil
    shutil.copytree(pages.NBS, tmp_path, dirs_exist_ok=True,
                    ignore=lambda d, names: [n for n in names if not n.endswith(('.lua', '.bib', '.css'))])
    (tmp_path/'template.html').write_text(pages.TEMPLATE)
    page = pages.Page('x.ipynb', tmp_path/'x.html', 'x.html', front=dict(title='T'))
    texts = ['x = 1', 'x = ' + '1'*96, 'x = ' + '1'*126]
    code = [pages.fenced(t, '.python .cell-code') for t in texts]
    outputs = [f'::: {{.cell-output .cell-output-stdout}}\n{pages.fenced(t, ".default")}:::' for t in texts]
    pages.pandoc('\n\n'.join(code + outputs), page, tmp_path, tmp_path)
    assert browser.measure(chromium, page) == []
    chromium.size(browser.WIDTHS['wide'])
    heights = chromium.evaluate("[...document.querySelectorAll('pre')].map(e => e.offsetHeight)")
    for short, full, long in (heights[:3], heights[3:]): assert short == full < long, heights
