"""Pages in a headless Chromium, driven through its own protocol: what overflows, what is cut, what is missing.
One browser for all pages; each page is loaded once and measured at both widths."""
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path

WIDTHS = {'wide': 1400, 'phone': 390}
CHECKS = {f'{check}-{name}': f'{what} at {width} px' for name, width in WIDTHS.items()
          for check, what in dict(page='the page scrolls sideways', cut='a code or output block is cut',
                                  scroll='a table or formula scrolls sideways').items() if (check, name) != ('scroll', 'phone')}
CHECKS |= dict(image='a missing image', noalt='an image without alt text', tex='raw TeX', console='an error in the console')

MEASURE = r"""(() => {
  const found = [], say = (check, what) => found.push([check, String(what).trim().replace(/\s+/g, ' ').slice(0, 80)]);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth + 1) {
    const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1
      && !e.closest('.math.display, table, pre') && ![...e.children].some(c => c.getBoundingClientRect().right > root.clientWidth + 1));
    say('page', root.scrollWidth + ' px: ' + (wide.length ? wide[0].tagName + ' ' + wide[0].textContent : ''));
  }
  for (const e of document.querySelectorAll('pre, pre code, p code, li code'))
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1) say('cut', e.textContent);
  for (const e of document.querySelectorAll('table, .math.display'))
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1) say('scroll', e.scrollWidth + ' px: ' + e.textContent);
  for (const e of document.images) {
    if (!e.complete || !e.naturalWidth) say('image', e.src.split('/').pop());
    if (!e.alt.trim()) say('noalt', e.src.split('/').pop());
  }
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest('pre, code, script, style, annotation')) continue;
    if (/\\\(|\\\[|\$\$|\\(frac|sum|mathbb|hat|tilde)\b/.test(node.data)) say('tex', node.data);
  }
  return found;
})()"""


def program():
    "The Chromium on this machine, or None"
    return next((p for name in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(name))), None)


class Browser:
    "A headless Chromium with one tab"
    def __enter__(self):
        from websocket import create_connection
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars',
                 '--no-first-run', '--allow-file-access-from-files', '--remote-allow-origins=*', '--remote-debugging-port=0',
                 f'--user-data-dir={self.folder.name}', 'about:blank']
        self.process = subprocess.Popen([program(), *flags], stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if address := re.search(r'ws://\S+', line): break
        else: raise RuntimeError('chromium did not start')
        self.numbers, self.events = count(1), []
        self.socket = create_connection(address[0], timeout=60)
        # a tab in the background is laid out when it is asked, and not painted, which nobody would look at
        target = self.call('Target.createTarget', url='about:blank', background=True)['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'): self.call(f'{domain}.enable')
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def receive(self):
        message = json.loads(self.socket.recv())
        if 'method' in message: self.events.append(message)
        return message

    def call(self, method, **params):
        "Send a command and wait for its answer"
        number = next(self.numbers)
        session = dict(sessionId=self.session) if hasattr(self, 'session') else {}
        self.socket.send(json.dumps(dict(id=number, method=method, params=params, **session)))
        while True:
            message = self.receive()
            if message.get('id') == number:
                if 'error' in message: raise RuntimeError(f'{method}: {message["error"]["message"]}')
                return message['result']

    def evaluate(self, code):
        "The value of a JavaScript expression; a promise is waited for"
        done = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in done: raise RuntimeError(str(done['exceptionDetails'])[:500])
        return done['result'].get('value')

    def size(self, width, height=900):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url):
        "Load an address and wait until it and its images are there"
        self.events.clear()
        self.call('Page.navigate', url=url)
        end = time.monotonic() + 60
        while not any(e['method'] == 'Page.loadEventFired' for e in self.events):
            if time.monotonic() > end: raise TimeoutError(url)
            self.receive()
        self.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")

    def errors(self):
        "What was written to the console as an error, and exceptions"
        for event in self.events:
            params = event['params']
            if event['method'] == 'Runtime.exceptionThrown': yield params['exceptionDetails']['text']
            if event['method'] == 'Runtime.consoleAPICalled' and params['type'] == 'error': yield str(params['args'])[:200]
            if event['method'] == 'Log.entryAdded' and params['entry']['level'] == 'error': yield params['entry']['text']

    def picture(self, file, height=None):
        "A screenshot of the whole page, or of its top"
        whole = self.call('Page.getLayoutMetrics')['cssContentSize']
        clip = dict(x=0, y=0, width=whole['width'], height=min(whole['height'], height or 16000), scale=1)
        data = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=True, clip=clip)['data']
        Path(file).write_bytes(base64.b64decode(data))


def measure(browser, page):
    "(check, what) of everything that is wrong with a page at one of the widths"
    found = []
    browser.size(WIDTHS['wide'])
    browser.open(page.path.resolve().as_uri())
    for name, width in WIDTHS.items():
        browser.size(width)
        for check, what in browser.evaluate(MEASURE):
            if f'{check}-{name}' in CHECKS: found.append((f'{check}-{name}', what))
            elif check in CHECKS and name == 'wide': found.append((check, what))
    return found + [('console', e) for e in browser.errors()]


def problems_of(site):
    "Notebook -> problems of its page"
    with Browser() as browser: return {name: measure(browser, page) for name, page in site.items()}
