"The house: where files stand, what may import what, how long things may be. Every rule here is of the project, not of a tool."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS, PACKAGE = ROOT/'nbs', ROOT/'drift_rae'
FOLDERS = ('engine', 'networks', 'metrics', 'worlds', 'parts', 'sharing', 'imagenet', 'own', 'second', 'commands') # worlds, parts and sharing are one row
MOST_NOTEBOOKS, MOST_LINES, WIDTH = 12, 350, 100

notebooks = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
modules = sorted(p for p in PACKAGE.rglob('*.py') if p.name != '_modidx.py')


def cells(path, kind='code'):
    "The sources of a notebook's cells of one kind"
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def module_of(path):
    "The module that a notebook exports, as 'parts.step', or ''"
    found = re.search(r'#\| default_exp (\S+)', '\n'.join(cells(path)))
    return found[1] if found else ''


def place(path):
    """Where a notebook stands in the order of dependence: engine, networks, metrics; then chapters and
    parts, mixed by the number and letter that their names begin with; then imagenet, own, second, commands."""
    folder = path.parent.name if path.parent != NBS else ''
    number = re.match(r'(\d\d)([a-z]?)_', path.name)
    number = (int(number[1]), number[2]) if number else (-1, path.stem)
    early, late = FOLDERS[:3], FOLDERS[6:]
    if folder in early: return (0, early.index(folder), *number)
    if folder in late: return (2, late.index(folder), *number)
    return (1, 0, *number)


PLACES = {module_of(p): place(p) for p in notebooks if module_of(p)}


def imports(source, package=''):
    "Modules of ours that a source imports, also inside functions: 'parts.step', 'engine', ..."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix('drift_rae.') for a in node.names if a.name.startswith('drift_rae.')}
        if not isinstance(node, ast.ImportFrom): continue
        base = node.module or ''
        if node.level:
            parts = package.split('.')[:len(package.split('.')) - node.level + 1] if package else []
            base = '.'.join([*parts[1:], *([base] if base else [])])
        elif base == 'drift_rae': base = ''
        elif base.startswith('drift_rae.'): base = base.removeprefix('drift_rae.')
        else: continue
        for a in node.names:
            whole = f'{base}.{a.name}'.strip('.')
            found.add(whole if whole in PLACES else base)
    return {f for f in found if f in PLACES}


def code_of(path):
    "What Python can parse of a notebook: without magics"
    return '\n'.join(l for s in cells(path) for l in s.splitlines() if not l.startswith(('%', '!')))


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_what_stands_before_it(path):
    name = path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')
    if name not in PLACES: return # __init__.py
    package = 'drift_rae.' + name.rpartition('.')[0] if '.' in name else 'drift_rae'
    for used in imports(path.read_text(), package):
        assert PLACES[used] < PLACES[name], f'{name} imports {used}, which stands after it'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(NBS).as_posix())
def test_a_notebook_imports_only_what_stands_before_it(path):
    for used in imports(code_of(path)) - {module_of(path)}:
        assert path.stem in ('index', 'start') or PLACES[used] < place(path), \
            f'{path.relative_to(NBS)} imports {used}, which stands after it'


def test_no_circle():
    graph = {}
    for path in modules:
        name = path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')
        package = 'drift_rae.' + name.rpartition('.')[0] if '.' in name else 'drift_rae'
        graph[name] = imports(path.read_text(), package)
    done = set()

    def visit(name, above):
        assert name not in above, ' -> '.join([*above, name])
        if name in done: return
        for used in graph.get(name, ()): visit(used, [*above, name])
        done.add(name)
    for name in graph: visit(name, [])


def test_folders_are_small_and_modules_short():
    for folder in FOLDERS:
        assert len(list((NBS/folder).glob('*.ipynb'))) <= MOST_NOTEBOOKS, folder
    long = {p.relative_to(PACKAGE).as_posix(): n for p in modules
            if (n := len(p.read_text().splitlines())) > MOST_LINES}
    assert not long, long


def test_every_notebook_has_a_place():
    for p in notebooks:
        where = p.relative_to(NBS)
        assert len(where.parts) == 1 or where.parts[0] in FOLDERS, where
        assert p.stem in ('index', 'start') or re.match(r'\d\d[a-z]?_\w+$', p.stem), where
        module = module_of(p) # the top of the package has a notebook in engine
        if len(where.parts) > 1: assert module in ('', '__init__', '__main__') or module.startswith(where.parts[0] + '.'), where


def sidebar():
    "Section title -> its notebooks, in the order of _quarto.yml"
    import yaml
    contents = yaml.safe_load((ROOT/'_quarto.yml').read_text())['website']['sidebar']['contents']
    flat = {}
    for entry in contents:
        if isinstance(entry, str): flat.setdefault('', []).append(entry)
        else: flat[entry['section']] = [c if isinstance(c, str) else c['href'] for c in entry['contents']]
    return flat


def test_the_sidebar_has_every_notebook_in_the_order_of_the_files():
    sections = sidebar()
    listed = [p for entries in sections.values() for p in entries]
    assert sorted(listed) == sorted(p.relative_to(NBS).as_posix() for p in notebooks)
    top = [p for p in listed if '/' not in p and p not in ('index.ipynb', 'start.ipynb')]
    assert top == sorted(top), 'chapters'
    for folder in FOLDERS:
        inside = [p for p in listed if p.startswith(folder + '/')]
        assert inside == sorted(inside), folder


def exported(path):
    "The sources of a notebook's exported cells"
    return [s for s in cells(path) if re.search(r'^#\| *export', s, re.M)]


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.relative_to(NBS).as_posix())
def test_lines_of_code_are_short(path):
    long = [l for s in cells(path) for l in s.splitlines() if len(l) > WIDTH]
    assert not long, long[:3]


def test_exported_cells_are_short():
    "Median and nine tenths over the book; `python tests/count_cells.py` prints the counts"
    lengths = sorted(len(s.splitlines()) for p in notebooks for s in exported(p))
    assert lengths[len(lengths)//2] <= 12 and lengths[int(.9*len(lengths))] <= 25, lengths[-20:]


def undocumented(tree, where):
    "Public functions, classes and methods without a docstring"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        if not ast.get_docstring(node): yield f'{where}.{node.name}'
        if isinstance(node, ast.ClassDef): yield from undocumented(node, f'{where}.{node.name}')


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_public_things_have_docstrings(path):
    assert not list(undocumented(ast.parse(path.read_text()), path.stem))


@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_comments_of_parameters_have_no_backticks(path):
    "nbdev would turn them into links that stand raw in the signature"
    found = [l for l in path.read_text().splitlines() if re.match(r'\s+\w+(:[^#]*)?(=[^#]*)?, *#.*`', l)]
    assert not found, found[:3]


def test_the_list_of_moved_modules_is_right():
    "Every new place in CHANGELOG.md exists, and holds the names that are said to stand there"
    rows = [l for l in (ROOT/'CHANGELOG.md').read_text().splitlines() if l.startswith(('| `drift_rae.', '| `nbs/'))]
    assert len(rows) > 50
    for row in rows:
        before, now = (re.findall('`([^`]+)`', half) for half in row.strip('| ').split(' | '))
        for place in now:
            if place.startswith('nbs/'): assert (ROOT/place).is_file(), row
            else:
                path = PACKAGE/(place.removeprefix('drift_rae.').replace('.', '/') + '.py')
                assert path.is_file(), row
                for name in before[1:]: assert re.search(rf'\b{name}\b', path.read_text()), (name, place)
