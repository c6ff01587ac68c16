"""The site without Quarto: nbdev's own processing, each page turned into Markdown as Quarto would do,
pandoc (which Quarto is made of) with the site's bibliography, filter and style sheet. `python tests/pages.py
--counts` prints how many problems of which kind each page has; `--list [PAGE]` prints the problems."""
import ast
import base64
import fcntl
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).parents[1]
NBS = ROOT/'nbs'
PAGES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
HOST = 'https://drift-rae.github.io/drift_rae/'
QUARTO_BYTES = 1_100_000 # what Quarto itself adds to each page: scripts, icons, two themes
MOST_BYTES = 2_000_000
WIDTH = 100 # characters of a line of code or output
MEDIA = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}
CHECKS = dict(
    render='pandoc or nbdev could not make the page', front='no title or no subtitle',
    directive='a raw or invalid directive', list='a list that became a paragraph, or the reverse',
    markdown='raw Markdown in a signature', emphasis='a stray asterisk or backtick', script='a sub- or superscript gone wrong',
    math='a formula that is not rendered', heading='a heading level skipped', alt='an image without alt text',
    caption='a figure without caption', label='a figure label missing or used twice', link='a link or anchor to nowhere',
    address='an address in memory',
    stem='a chapter named without a link', reference='an unresolved @reference or citation',
    wide='a line over 100 characters', size='a page over 2 MB', api='an entry of the API reference is missing or empty',
    param='a parameter of a function or a field of a dataclass without comment')

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$pagetitle$</title>
<style>$highlighting-css$</style>
<style>
/* Quarto's defaults, in short, so that the site's own style sheet acts on what it acts on there */
*, ::before, ::after { box-sizing: border-box }
body { font: 17px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif; margin: 0 }
main { max-width: 900px; margin: 0 auto; padding: 0 12px }
pre { overflow: auto; font-size: .875em; margin: 0 0 1rem }
code { font-family: 'DejaVu Sans Mono', monospace; font-size: .875em }
div.sourceCode { background: rgba(233, 236, 239, .65); padding: .5rem; margin: 1em 0 }
table { width: 100%; border-collapse: collapse } td, th { padding: .5rem; text-align: left }
img { height: auto } figure { margin: 0 0 1rem } figcaption { font-size: 90%; color: #5a6570 }
</style>
$for(css)$<link rel="stylesheet" href="$css$">$endfor$
</head><body><main class="content" id="quarto-document-content">
<header id="title-block-header" class="quarto-title-block"><h1 class="title">$title$</h1>
$if(description)$<div class="description">$description$</div>$endif$</header>
$body$
</main></body></html>
"""


@dataclass
class Page:
    "A rendered page"
    source: str # notebook, relative to nbs/
    path: Path # the HTML file
    url: str # its address, relative to the site
    warnings: str = '' # of pandoc
    front: dict = field(default_factory=dict) # YAML at its head
    yaml_errors: list = field(default_factory=list) # cell options that are not YAML
    module: str = '' # that the notebook exports

    @cached_property
    def html(self):
        from bs4 import BeautifulSoup
        gc.disable() # it would look for garbage among all the tags again and again: half of the time
        try: return BeautifulSoup(self.path.read_text(), 'html.parser')
        finally: gc.enable()

    @cached_property
    def tags(self):
        "All tags in the order of the document: one pass for all checks, each search of BeautifulSoup is one of its own"
        return self.html.find_all()

    def named(self, *names): return [tag for tag in self.tags if tag.name in names]

    @cached_property
    def ids(self): return {t['id'] for t in self.tags if t.has_attr('id')} | {a['name'] for a in self.named('a') if a.has_attr('name')}

    @cached_property
    def prose(self):
        "The texts outside code, formulas and scripts"
        def texts(tag):
            for child in tag.contents:
                if type(child).__name__ == 'NavigableString': yield child
                elif getattr(child, 'name', None) and child.name not in ('code', 'pre', 'math', 'script', 'style', 'svg', 'head'): yield from texts(child)
        return list(texts(self.html))


# ---- from the notebook to Markdown

def options(source):
    "The cell options at the head of a cell and the code below them"
    lines = source.splitlines()
    n = next((i for i, l in enumerate(lines) if l.strip() and not l.startswith('#|')), len(lines))
    head = '\n'.join(l[2:].removeprefix(' ') for l in lines[:n] if l.startswith('#|'))
    values = yaml.safe_load(head) if head.strip() else {}
    if not isinstance(values, dict): raise yaml.YAMLError(f'not "key: value": {head}')
    return values, '\n'.join(lines[n:])


def fenced(text, attributes):
    "A fenced block that holds any text"
    ticks = '`'*max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{ticks} {{{attributes}}}\n{text}\n{ticks}\n'


def as_text(value): return ''.join(value) if isinstance(value, list) else value


def quoted(text): return str(text).replace('\\', '\\\\').replace('"', '\\"')


def output_markdown(output, opts, folder, stem, k):
    "What a reader sees of one output: the richest form, as Quarto chooses it"
    if output['output_type'] == 'stream':
        text, name = as_text(output['text']).rstrip('\n'), output['name']
        if opts.get('output') == 'asis': return text
        return f'::: {{.cell-output .cell-output-{name}}}\n{fenced(text, ".default")}:::\n' if text else ''
    if output['output_type'] == 'error':
        return f'::: {{.cell-output .cell-output-error}}\n{fenced(as_text(output["traceback"]), ".default")}:::\n'
    data = output.get('data', {})
    for mime in ('text/html', 'text/markdown', *MEDIA, 'text/latex', 'text/plain'):
        if mime not in data: continue
        value = as_text(data[mime])
        if mime == 'text/html': return f'::: {{.cell-output .cell-output-display .cell-output-html}}\n\n```{{=html}}\n{value}\n```\n\n:::\n'
        if mime == 'text/markdown': return f'::: {{.cell-output .cell-output-display .cell-output-markdown}}\n{value}\n:::\n'
        if mime in MEDIA: return picture(value, MEDIA[mime], opts, folder, f'{stem}_files/{k}.{MEDIA[mime]}', k)
        if mime == 'text/latex': return f'::: {{.cell-output .cell-output-display}}\n{value}\n:::\n'
        return f'::: {{.cell-output .cell-output-display}}\n{fenced(value, ".default")}:::\n'
    return ''


def picture(value, kind, opts, folder, name, k):
    "A picture as a file beside the page, with the caption and alt text of the cell's options"
    file = folder/name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value) if kind == 'svg' else file.write_bytes(base64.b64decode(value))
    caption, alt, label = (opts.get(key) or '' for key in ('fig-cap', 'fig-alt', 'label'))
    if isinstance(caption, list): caption = caption[0]
    if isinstance(alt, list): alt = alt[0]
    label = f'#{label} ' if label and not opts.setdefault('shown', 0) else ''
    opts['shown'] = 1
    alt = f' alt="{quoted(alt)}"' if alt else ''
    return f'\n![{caption}]({name}){{{label}.cell-figure{alt}}}\n'


def cell_markdown(cell, folder, stem, n, errors):
    "A cell of a processed notebook"
    source = as_text(cell['source'])
    if cell['cell_type'] == 'markdown': return source
    if cell['cell_type'] == 'raw': return '' if source.startswith('---') else source
    try: opts, code = options(source)
    except yaml.YAMLError as e:
        errors.append(f'{source.splitlines()[0]}: {str(e).splitlines()[0]}')
        opts, code = {}, source
    if opts.get('include') is False: return ''
    shown = ''
    if code.strip() and opts.get('echo', True) is not False:
        shown = fenced(code, '.python .cell-code')
        if opts.get('code-fold') in (True, 'show'):
            summary = opts.get('code-summary', 'Code')
            shown = f'<details class="code-fold"><summary>{summary}</summary>\n\n{shown}\n</details>\n'
    outs = [] if opts.get('output') is False else cell.get('outputs', [])
    parts = [output_markdown(o, opts, folder, stem, f'{n}-{i}') for i, o in enumerate(outs)]
    return '::: {.cell}\n\n' + '\n\n'.join([shown, *parts]) + '\n\n:::'


def front_matter(nb):
    "The YAML that nbdev made of the title cell"
    first = as_text(nb['cells'][0]['source']) if nb['cells'] else ''
    return yaml.safe_load(first.strip().strip('-')) if first.startswith('---') else {}


def links(html, source, urls):
    "Links to notebooks as Quarto writes them: to the page that was made of the notebook"
    def page(match):
        target, anchor = match[1], match[2] or ''
        where = os.path.normpath(os.path.join(os.path.dirname(source), unquote(target)))
        if where not in urls: return match[0]
        return f'href="{os.path.relpath(urls[where], os.path.dirname(urls[source]) or ".")}{anchor}"'
    return re.sub(r'href="(?!https?:)([^"#]+\.ipynb)(#[^"]*)?"', page, html)


# ---- the site

def process(house):
    "Run nbdev's proc_nbs, as nbdev_docs does, on a copy of what it reads"
    skip = shutil.ignore_patterns('weights', '__pycache__', 'runs', '.ipynb_checkpoints', '_proc')
    for name in ('nbs', 'drift_rae'): shutil.copytree(ROOT/name, house/name, symlinks=True, ignore=skip)
    for name in ('settings.ini', 'README.md', '_quarto.yml'): shutil.copy(ROOT/name, house/name)
    env = {**os.environ, 'PYTHONPATH': str(house), 'OMP_NUM_THREADS': '1'}
    # in one process, whose end is cut short: each notebook's shell would collect all garbage once more when Python ends
    code = 'import os; from nbdev.serve import proc_nbs; proc_nbs(n_workers=0); os._exit(0)'
    done = subprocess.run([sys.executable, '-c', code], cwd=house, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-3000:])
    return house/'_proc'


def pandoc(markdown, page, folder, proc):
    "One page to HTML"
    import pypandoc
    depth = os.path.relpath(folder, page.path.parent)
    command = [pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html5', '--standalone', '--mathml', '--wrap=preserve',
        '--lua-filter', proc/'equations.lua', '--lua-filter', Path(__file__).with_name('crossref.lua'),
        '--bibliography', proc/'references.bib', '-M', 'link-citations=true',
        '--css', f'{depth}/styles.css', '--template', folder/'template.html', '-o', page.path]
    head = yaml.safe_dump({k: v for k, v in page.front.items() if k != 'output-file'} | {'pagetitle': page.front.get('title', '')})
    done = subprocess.run(list(map(str, command)), input=f'---\n{head}---\n\n{markdown}', cwd=page.path.parent, capture_output=True, text=True)
    page.warnings = done.stderr
    if done.returncode: page.path.write_text('<main></main>')


def render(folder):
    "The whole site in a folder; returns its pages"
    with tempfile.TemporaryDirectory() as scratch:
        proc = process(Path(scratch))
        keep = shutil.ignore_patterns('*.ipynb', '_quarto.yml')
        shutil.copytree(proc, folder, dirs_exist_ok=True, ignore=keep)
        (folder/'template.html').write_text(TEMPLATE)
        notebooks = {name: json.loads((proc/name).read_text()) for name in PAGES}
        fronts = {name: front_matter(nb) for name, nb in notebooks.items()}
        urls = {name: str(Path(name).with_name(fronts[name].get('output-file', Path(name).stem + '.html'))) for name in PAGES}

        def one(name):
            page = Page(name, folder/urls[name], urls[name], front=fronts[name])
            found = re.search(r'#\| default_exp (\S+)', (NBS/name).read_text())
            page.module = found[1].split('\\n')[0].rstrip('",') if found else ''
            page.path.parent.mkdir(parents=True, exist_ok=True)
            parts = [cell_markdown(c, page.path.parent, page.path.stem, i, page.yaml_errors)
                     for i, c in enumerate(notebooks[name]['cells'])]
            pandoc('\n\n'.join(p for p in parts if p), page, folder, proc)
            html = links(page.path.read_text(), name, urls)
            html = re.sub(r'(<math display="block".*?</math>)', r'<span class="math display">\1</span>', html, flags=re.S)
            page.path.write_text(html)
            return page
        with ThreadPoolExecutor(2) as pool: return list(pool.map(one, PAGES))


def session_folder(tmp_path_factory):
    "A folder that all processes of a test session share (with -n each has a folder below it)"
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base


def shared_site(base):
    "Rendered once for all processes of a test session"
    folder = base/'site'
    with open(base/'site.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = base/'site.json'
        if not store.exists():
            pages = render(folder)
            names = ('source', 'url', 'warnings', 'front', 'yaml_errors', 'module')
            store.write_text(json.dumps([{n: getattr(p, n) for n in names} for p in pages]))
    return {p['source']: Page(path=folder/p['url'], **p) for p in json.loads(store.read_text())}


# ---- what a page must not have

def check_render(page, site):
    if not page.html.find('main').get_text(strip=True): yield page.warnings.strip()[-200:]
    for cell in page.html.select('.cell-output-error'): yield 'an error is stored: ' + cell.get_text()[-80:]


def check_front(page, site):
    if not page.front.get('title'): yield 'no title'
    if not page.front.get('description') and page.source != 'index.ipynb': yield 'no subtitle ("> ..." below the title)'
    if (NBS/page.source).is_file():
        first = as_text(json.loads((NBS/page.source).read_text())['cells'][0]['source'])
        lost = [l for l in first.splitlines() if l.strip() and not l.startswith(('# ', '> '))]
        if lost: yield f'nbdev leaves out what follows the subtitle in the first cell: {lost[0][:60]}'


def check_directive(page, site):
    yield from page.yaml_errors
    for line in page.html.get_text().splitlines():
        if re.match(r'\s*#\|', line): yield line.strip()


def check_list(page, site):
    for p in page.named('p'):
        for line in p.get_text().split('\n'):
            if re.match(r'\s*(?:[-*+]|\d{1,2}[.)])\s', line): yield f'in a paragraph: {line[:60]}'
    for ol in page.named('ol'):
        items = ol.find_all('li', recursive=False)
        if ol.get('start', '1') != '1' or ol.get('type', '1') != '1' or len(items) == 1:
            yield f'a paragraph that begins with a number became a list: {items[0].get_text()[:60]!r}'


def check_markdown(page, site):
    for pre in page.named('pre', 'code'):
        if pre.name == 'code' and (pre.parent.name == 'pre' or pre.find_parent('pre')): continue
        for found in re.findall(r'\[[^\]\n]+\]\((?:https?:|[\w/.]+\.(?:ipynb|html))[^)]*\)', pre.get_text()): yield found
    for a in page.named('a'): # nbdev has linked a name inside a link
        if '](http' in a.get_text(): yield a.get_text()


def check_emphasis(page, site):
    for text in page.prose:
        for found in re.findall(r'.{0,25}(?:\*\*|`|(?<=[\w.)])\*(?=[\s.,)])|(?<=[\s(])\*(?=\w)|^\*\w).{0,25}', text):
            yield found.strip()


    entries = page.html.select('.cell-output-markdown')
    for entry in (e for e in entries if e.find(re.compile('^h[2-6]$'))): # the first line of a docstring is set in italics by nbdev
        for first in entry.select('div.sourceCode + p'):
            inside = first.get_text().split('\n')[0]
            if not first.em or first.em.previous_sibling or len(first.em.get_text().split('\n')[0]) < len(inside):
                yield f'an asterisk in a docstring: {inside[:70]}'


def check_script(page, site):
    for tag in page.named('sup', 'sub', 'del'):
        if 'footnote' in ' '.join(tag.get('class', [])) or tag.find_parent(class_='footnote-ref'): continue
        if tag.name == 'del' or not re.fullmatch(r'[\w−+-]{1,5}', tag.get_text()): yield f'<{tag.name}> {tag.get_text()[:40]}'


def check_math(page, site):
    for found in re.findall(r'Could not convert TeX math (.*?), rendering', page.warnings, re.S): yield found[:60]
    for text in page.prose:
        for found in re.findall(r'\$\$|\\[(\[]|\\(?:frac|sum|mathbb|mathcal|hat|tilde|lVert|left)\b', text): yield f'{found} in {text.strip()[:50]}'


def check_heading(page, site):
    before = 1
    for tag in page.named('h1', 'h2', 'h3', 'h4', 'h5', 'h6'):
        level = int(tag.name[1])
        if level == 1 and 'title' not in tag.get('class', []): yield f'a second title: {tag.get_text()[:50]}'
        if level > before + 1: yield f'h{before} -> h{level}: {tag.get_text()[:50]}'
        before = level


def check_alt(page, site):
    for img in page.named('img'):
        if not img.get('alt', '').strip(): yield img.get('src', '')


def check_caption(page, site):
    for img in page.named('img'):
        figure = img.find_parent('figure')
        caption = figure and figure.find('figcaption')
        if not caption or not caption.get_text(strip=True): yield img.get('src', '')


def check_label(page, site):
    for img in page.html.select('img.cell-figure'):
        figure = img.find_parent('figure') or img
        if not (figure.get('id') or img.get('id', '')).startswith('fig-') and not re.search(r'-[1-9]\d*\.\w+$', img['src']): yield img['src']
    own = Counter(tag['id'] for tag in page.tags if re.match('(fig|eq|tbl|sec)-', tag.get('id', '')))
    for name, n in own.items():
        if n > 1: yield f'{name} stands {n} times on the page'
        others = [p.source for p in site.values() if p is not page and name in p.ids and name.startswith('fig-')]
        if others: yield f'{name} is also on {", ".join(others)}'


def check_link(page, site):
    pages = {p.url: p for p in site.values()}
    for href in [a['href'] for a in page.named('a') if a.has_attr('href')]:
        if href.startswith(HOST): target = href.removeprefix(HOST)
        elif urlsplit(href).scheme or href.startswith('//'): continue
        else: target = os.path.join(os.path.dirname(page.url), href)
        where, _, anchor = target.partition('#')
        where = os.path.normpath(where) if where else ''
        if href.startswith('#'): where = page.url
        elif where in ('', '.'): where = 'index.html'
        if where in pages:
            if anchor and unquote(anchor) not in pages[where].ids: yield f'no anchor: {href}'
        elif not (page.path.parents[len(Path(page.url).parts) - 1]/where).is_file(): yield f'no page: {href}'
    if page.html.select('.cell-output-html script'): yield 'an HTML output with a script: Quarto then loads require.js and jQuery from another host'
    for src in [t['src'] for t in page.named('img', 'video', 'source', 'script') if t.has_attr('src')]:
        if urlsplit(src).scheme in ('http', 'https'): yield f'from another host: {src}'
        elif not src.startswith('data:') and not (page.path.parent/unquote(src)).is_file(): yield f'no file: {src}'


def check_address(page, site):
    "Another number with every rendering, and of no use to a reader"
    yield from re.findall(r'\bat 0x[0-9a-f]{6,}', page.html.get_text())


def check_stem(page, site):
    for code in page.named('code'):
        text = code.get_text()
        if ' ' in text or not re.search(r'(?<![\w/])(?:nbs/|\w+/)?\d\d[a-z]?_[a-z]\w+(?:\.ipynb)?$', text): continue
        if not code.find_parent(['a', 'pre']): yield text
    for text in page.prose:
        found = re.findall(r'[Cc]hapters? \d\d?\b|[Nn]otebooks? \d\d[a-z]?\b|\b\d\d[a-z]?_[a-z]\w+', text)
        if found and not text.find_parent('a'): yield from found


def check_reference(page, site):
    yield from (f'not in references.bib: {key}' for key in re.findall(r'citation (\S+) not found', page.warnings))
    for text in page.prose:
        yield from re.findall(r'\?@[\w-]+|\{#[\w-]+\}|\[-?@\w+|(?<![\w.])@(?:eq|fig|sec|tbl)-[\w-]+', text)


def check_wide(page, site):
    for pre in page.html.select('.cell pre'):
        if pre.find_parent(class_='cell-output-markdown'): continue # signatures: a comment of any length stands beside a parameter
        for line in pre.get_text().splitlines():
            if len(line) > WIDTH: yield f'{len(line)}: {line[:70]}'


def check_size(page, site):
    files = {page.path, *(page.path.parent/unquote(t['src']) for t in page.tags if t.has_attr('src') and not urlsplit(t['src']).scheme)}
    total = QUARTO_BYTES + sum(f.stat().st_size for f in files if f.is_file())
    if total > MOST_BYTES: yield f'{total/1e6:.2f} MB with the {QUARTO_BYTES/1e6:.1f} MB that Quarto adds'


def check_api(page, site):
    entries = list(public(page.module))
    names, headings = [name for name, _ in entries], page.named('h3', 'h4', 'h5', 'h6')
    anchors = {h.get('id') for h in (*headings, *page.named('h2'))}
    for name, entry in entries:
        if name.lower() not in anchors: yield f'no entry: {name}'
        elif not entry: yield f'no docstring: {name}'
        same = [h for h in headings if h.get_text() == name]
        if len(same) > 1: yield f'two entries (drop the show_doc cell): {name}'
        owner, _, bare = name.rpartition('.')
        if owner and bare not in names and any(h.string == bare for h in headings): yield f'an entry without its class: {name}'


def source_of(module):
    "The file of a module that a notebook exports, or None"
    file = ROOT/'drift_rae'/(module.replace('.', '/') + '.py')
    return file if module and file.is_file() else None


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parsed(file):
    "The public functions and classes of a module, and the methods that it adds to classes with @patch"
    body = ast.parse(file.read_text()).body
    exported = next((ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign)
                     and getattr(n.targets[0], 'id', '') == '__all__'), [])
    found = [n for n in body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
    added = [n for n in found if isinstance(n, FUNCTIONS) and patched(n) and not n.name.startswith('_')]
    return [n for n in found if n.name in exported and n not in added], added


def public(module):
    "(name, has a docstring) of every public function, class and method that a module defines"
    file = source_of(module)
    if not file: return
    own, added = parsed(file)
    for node in own:
        yield node.name, ast.get_docstring(node)
        if not isinstance(node, ast.ClassDef): continue
        for method in node.body:
            if isinstance(method, FUNCTIONS) and not method.name.startswith('_'):
                yield f'{node.name}.{method.name}', ast.get_docstring(method)
    for node in added: yield f'{patched(node)}.{node.name}', ast.get_docstring(node)


def check_param(page, site):
    file = source_of(page.module)
    if not file: return
    lines = file.read_text().splitlines()
    commented = lambda node: '#' in lines[node.end_lineno - 1][node.end_col_offset:] or '#' in lines[node.lineno - 1][node.end_col_offset:]
    for node in parsed(file)[0]:
        if isinstance(node, ast.ClassDef):
            if not any('dataclass' in ast.unparse(d) for d in node.decorator_list): continue
            parts = [(n.target.id, n) for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith('_')]
        else: parts = [(a.arg, a) for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)][bool(patched(node)):]
        bare = [name for name, part in parts if not commented(part)]
        if bare: yield f'{node.name}: {", ".join(bare)}'


def patched(node):
    "The class that a function with @patch extends"
    if not any('patch' in ast.unparse(d) for d in node.decorator_list) or not node.args.args: return ''
    annotation = node.args.args[0].annotation
    return ast.unparse(annotation) if annotation is not None else ''


def problems(page, site):
    "(check, what and where) of everything that is wrong with a page"
    return [(name, what) for name in CHECKS for what in globals()[f'check_{name}'](page, site)]


# ---- the command

def table(found):
    "Counts: a line for each page, a column for each check"
    names = [c for c in CHECKS if any(k == c for ps in found.values() for k, _ in ps)]
    width = max(map(len, found))
    lines = [' '*width + ' ' + ' '.join(f'{n:>9}' for n in names) + '     total']
    for source, ps in found.items():
        counts = Counter(k for k, _ in ps)
        lines.append(f'{source:{width}} ' + ' '.join(f'{counts[n] or ".":>9}' for n in names) + f'{len(ps):>10}')
    counts = Counter(k for ps in found.values() for k, _ in ps)
    lines.append(f'{"total":{width}} ' + ' '.join(f'{counts[n]:>9}' for n in names) + f'{sum(counts.values()):>10}')
    return '\n'.join(lines)


def main(arguments):
    keep = next((Path(a.removeprefix('--to=')) for a in arguments if a.startswith('--to=')), None)
    with tempfile.TemporaryDirectory() as scratch:
        base = keep or Path(scratch)
        base.mkdir(parents=True, exist_ok=True)
        site = shared_site(base)
        found = {p.source: problems(p, site) for p in site.values()}
        if '--browser' in arguments:
            import browser
            for source, more in browser.problems_of(site).items(): found[source] += more
            CHECKS.update(browser.CHECKS)
        if '--list' in arguments:
            only = [a for a in arguments if not a.startswith('--')]
            for source, ps in found.items():
                if only and not any(o in source for o in only): continue
                for name, what in ps: print(f'{source}: {name}: {what}')
        else: print(table(found))
        return int(any(found.values()))


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
