"The page on which a browser makes images: served without anything but files, driven in Chromium, compared with Python"
import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for package in ('selenium', 'onnx', 'onnxscript'):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev]'")
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from drift_rae.autoencoder import RAE
from drift_rae.flow import load_teacher, one_step, sample
from drift_rae.metrics.images import to_uint8
from drift_rae.parts.generator import OneStepGenerator
from drift_rae.parts.live import TEACHER_POINTS, between, browser_noise

ROOT = Path(__file__).parents[1]
PIXELS = """const c = document.querySelectorAll(arguments[0])[arguments[1]];
const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
return [c.height, c.width, ...d];"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What a static host would serve: made by .ci/live"
    if not shutil.which('npm'): pytest.skip('npm is missing: apt-get install npm')
    to = tmp_path_factory.mktemp('site')/'live'
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run([ROOT/'.ci/live', to], env={**os.environ, 'PATH': path, 'PYTHONPATH': str(ROOT)},
                          capture_output=True, text=True)
    if done.returncode == 4: pytest.skip(done.stderr.strip()) # npm without network
    assert done.returncode == 0, done.stderr
    return to


@pytest.fixture(scope='module')
def address(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
        def end_headers(self): # a browser that keeps files would not see that one is missing
            self.send_header('Cache-Control', 'no-store')
            super().end_headers()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/live/index.html'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def browser():
    found = {name: shutil.which(name) for name in ('chromium', 'chromedriver')}
    missing = [name for name, where in found.items() if not where]
    if missing: pytest.skip(f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found['chromium']
    for flag in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage'): options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found['chromedriver']))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def settled(browser): WebDriverWait(browser, 60).until(lambda b: b.execute_script(
    "return document.getElementById('live').dataset.ready === 'yes' && !document.getElementById('live').dataset.busy"))


def element(browser, name): return browser.find_element('css selector', f'[data-live="{name}"]')


def press(browser, name):
    element(browser, name).click()
    settled(browser)


@pytest.fixture(scope='module')
def page(browser, address):
    "The page with generator and teacher loaded"
    browser.get(address)
    settled(browser)
    press(browser, 'load')
    press(browser, 'teach')
    return browser


def put(browser, label, first=0, second=1, mix=0):
    "Set the page's controls as a reader does, and wait for the images"
    browser.execute_script("""const put = (name, value) => {
      const e = document.querySelector(`[data-live="${name}"]`);
      e.value = value; e.dispatchEvent(new Event('input', {bubbles: true})); };
      put('first', arguments[0]); put('second', arguments[1]); put('mix', arguments[2]);""", first, second, mix)
    browser.execute_script("document.querySelectorAll('input[name=live-class]')[arguments[0]].click()", label)
    settled(browser)


def pixels(browser, selector, number=0):
    "A canvas as an array [3, H, W] of int"
    height, width, *data = browser.execute_script(PIXELS, selector, number)
    rgba = np.array(data).reshape(height, width, 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3].transpose(2, 0, 1)


def largest(shown, image): return abs(shown - to_uint8(image).numpy().astype(int)).max()


@pytest.fixture(scope='module')
def generator(): return OneStepGenerator.from_pretrained('tiny')


@torch.no_grad()
def images(generator, noise, labels):
    noise = noise.expand(len(labels), -1, -1, -1)
    return generator.autoencoder.decode(one_step(generator.model, noise, labels))


@pytest.mark.parametrize('label, first, second, mix', [
    (3, 0, 1, 0), (7, 12345, 1, 0), (0, 4294967295, 2, 0), (5, 0, 1, 37), (9, 8, 88, 50), (1, 6, 77, 100)])
def test_pixels_are_those_of_python(page, generator, label, first, second, mix):
    put(page, label, first, second, mix)
    shape = generator.autoencoder.latent_shape
    noise = between(browser_noise(first, shape), browser_noise(second, shape), mix/100)
    wanted = images(generator, noise, range(10))
    assert largest(pixels(page, '[data-live="image"]'), wanted[label]) <= 1
    for i in range(10): assert largest(pixels(page, '.live-classes canvas', i), wanted[i]) <= 1
    assert wanted.std((2, 3)).min() > .05, 'the comparison would not see an empty picture'
    assert f'Class {label}' in element(page, 'caption').text and f'{mix} %' in element(page, 'share').text


@pytest.mark.parametrize('label, seed', [(2, 0), (8, 31)])
def test_the_teachers_path_is_that_of_python(page, label, seed):
    put(page, label, seed)
    teacher, rae, path = load_teacher('tiny'), RAE.from_pretrained('tiny'), []
    noise = browser_noise(seed, rae.latent_shape).float()[None]
    sample(teacher, noise, [label], steps=TEACHER_POINTS, callback=lambda i, t, x: path.append(x[0]))
    with torch.no_grad(): wanted = rae.decode(torch.stack(path))
    assert len(wanted) == TEACHER_POINTS
    for i, image in enumerate(wanted): assert largest(pixels(page, '.live-teacher canvas', i), image) <= 1


def test_new_noise_gives_a_new_picture_and_its_seed_gives_it_again(page):
    put(page, 4)
    before = pixels(page, '[data-live="image"]')
    press(page, 'draw')
    drawn, seed = pixels(page, '[data-live="image"]'), int(element(page, 'first').get_attribute('value'))
    assert abs(drawn - before).max() > 1
    put(page, 4)
    put(page, 4, seed)
    assert (pixels(page, '[data-live="image"]') == drawn).all()


def test_what_is_loaded_is_small_and_from_the_same_place(folder, address, browser):
    assert sum(f.stat().st_size for f in folder.iterdir()) < 15e6
    browser.get(address)
    settled(browser)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert not [name for name in loaded if name.endswith(('.onnx', '.gz'))], 'before the button is pressed'
    size = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith('ort') or f.name == 'generator.onnx')/1e6
    assert f'({size:.1f} MB)' in element(browser, 'load').text
    press(browser, 'load')
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    home = address.rpartition('/')[0]
    assert [name for name in loaded if name.endswith('.onnx')] == [f'{home}/generator.onnx']
    assert not [name for name in loaded if not name.startswith((home, 'blob:', 'data:'))]


@pytest.mark.parametrize('width', [1400, 390])
def test_it_fits_and_has_names(page, address, width, tmp_path):
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=False))
    page.get_log('browser') # forgets what was before
    page.get(address)
    settled(page)
    press(page, 'load')
    press(page, 'teach')
    put(page, 3)
    assert not [e for e in page.get_log('browser') if e['level'] in ('SEVERE', 'WARNING')]
    assert page.execute_script('return document.documentElement.scrollWidth') <= width
    picture = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert('L')
    assert np.asarray(picture).std() > 5
    unnamed = page.execute_script("""return [...document.querySelectorAll('#live input, #live button, #live canvas')]
      .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()
                     || e.getAttribute('aria-hidden') === 'true')).map(e => e.outerHTML)""")
    assert not unnamed
    if folder := os.environ.get('LIVE_SCREENSHOTS'):
        page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=1500, deviceScaleFactor=1, mobile=False))
        for theme in ('light', 'dark'):
            page.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=theme)]))
            page.save_screenshot(f'{folder}/{width}_{theme}.png')


def test_the_notebooks_own_markup_finds_the_files(folder, address, browser):
    "parts/05e_live.ipynb becomes parts/live.html; the folder live stands beside parts"
    cells = json.loads((ROOT/'nbs/parts/05e_live.ipynb').read_text())['cells']
    block, = re.findall(r'```{=html}\n(.*?)```', '\n'.join(''.join(c['source']) for c in cells), re.S)
    (folder.parent/'parts').mkdir()
    (folder.parent/'parts/live.html').write_text(f'<!DOCTYPE html><html lang="en"><title>T</title>{block}</html>')
    browser.get(address.replace('live/index.html', 'parts/live.html'))
    settled(browser)
    press(browser, 'load')
    assert 'one evaluation' in element(browser, 'caption').text
    assert browser.execute_script("return getComputedStyle(document.getElementById('live')).borderTopWidth") == '1px'


def test_the_page_says_what_it_loads(folder):
    "The sizes in the notebook's text are those of the files"
    text = (ROOT/'nbs/parts/05e_live.ipynb').read_text()
    size = {f.name: f.stat().st_size/1e6 for f in folder.iterdir()}
    runtime = sum(s for name, s in size.items() if name.startswith('ort'))
    teacher = size['teacher.onnx'] + size['decoder.onnx']
    assert f"loads {runtime + size['generator.onnx']:.1f} MB" in text and f'{runtime:.1f} MB, compressed' in text
    assert f"the generator ({size['generator.onnx']:.1f} MB)" in text and f'decoder are {teacher:.1f} MB more' in text
    version = re.search(r'^version=(\S+)', (ROOT/'.ci/live').read_text(), re.M)[1]
    assert f'onnxruntime-web {version}' in text


def test_a_missing_file_is_a_message(folder, address, browser):
    (folder/'generator.onnx').rename(folder/'away')
    try:
        browser.get(address)
        settled(browser)
        press(browser, 'load')
        assert 'generator.onnx: the server answers 404' in element(browser, 'status').text
        assert element(browser, 'load').is_enabled()
    finally: (folder/'away').rename(folder/'generator.onnx')
    messages = [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE']
    assert [m for m in messages if '404' not in m] == [], 'an error in the console'


def test_a_file_address_says_so(folder, browser):
    browser.get_log('browser') # forgets the pages before
    browser.get((folder/'index.html').as_uri())
    assert 'web server' in browser.find_element('id', 'live').text
    assert not [e for e in browser.get_log('browser') if e['level'] == 'SEVERE']
