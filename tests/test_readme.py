"The commands of the README, parsed: their shape, and that CI runs the same"
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text()


def blocks():
    "The shell blocks of the README, each a list of lines with continuations joined"
    found = re.findall(r'(?ms)^```sh\n(.*?)^```', README)
    return [re.sub(r'\\\n\s*', '', block).splitlines() for block in found]


def commands(line): return [shlex.split(part) for part in line.split('&&')]


def two_commands():
    "The blocks that begin with a clone"
    return [b for b in blocks() if b[0].startswith('git clone')]


def test_there_are_two_and_they_start_from_nothing():
    distil, check = two_commands()
    for block in (distil, check):
        clone, line = block
        (git, verb, address), (cd, folder) = commands(clone)
        assert (git, verb, cd) == ('git', 'clone', 'cd') and address.endswith('/'+folder) and address.startswith('https://github.com/')
        venv, activate, pip = commands(line)[:3]
        assert venv == ['python', '-m', 'venv', '.venv'] and activate == ['.', '.venv/bin/activate']
        assert pip == ['pip', 'install', '-e', '.[dev]']


def test_the_first_distils_with_papermill():
    papermill, notebook, out, *rest = commands(two_commands()[0][1])[3]
    assert papermill == 'papermill' and notebook == 'nbs/06_distill.ipynb' and out.endswith('.ipynb') and not rest
    assert (ROOT/notebook).is_file()


def test_the_second_tests_notebooks_and_the_rest_as_ci_does():
    nbdev_test, pytest_ = commands(two_commands()[1][1])[3:]
    assert nbdev_test[0] == 'nbdev_test' and pytest_[0] == 'pytest'
    script = re.sub(r'\\\n\s*', '', (ROOT/'.ci/run').read_text())
    ci = [shlex.split(l) for l in map(str.strip, script.splitlines()) if l.startswith(('nbdev_test', 'pytest', 'pip', 'papermill'))]

    def alike(command): return any(words[:len(command)] == command for words in ci)
    assert alike(nbdev_test) and alike(pytest_), ci
    assert any(w[0] == 'pip' and w[-1] == '.[dev]' for w in ci) and any('nbs/06_distill.ipynb' in w for w in ci)


def test_the_commands_for_imagenet_name_parameters_that_exist():
    import ast
    import inspect
    import json
    from drift_rae.distill import start
    lines = [shlex.split(l) for b in blocks() for l in b if l.startswith(('papermill', 'torchrun'))]
    assert [l[0] for l in lines] == ['papermill']*3 + ['torchrun']
    for line in lines:
        if line[0] == 'torchrun':
            given, known = {w[2:] for w in line[line.index('drift_rae.distill'):] if w.startswith('--')}, set(inspect.signature(start).parameters)
        else:
            cell, = [c for c in json.loads((ROOT/line[1]).read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
            known = {n.targets[0].id for n in ast.parse(''.join(cell['source'])).body}
            given = {line[i+1] for i, w in enumerate(line) if w == '-p'}
        assert given and given <= known, (line, given - known)


def test_no_line_of_a_command_is_cut():
    for block in re.findall(r'(?ms)^```sh\n(.*?)^```', README):
        for line in block.splitlines(): assert len(line) <= 75, line


def test_all_notebooks_and_pictures_of_the_readme_exist():
    paths = re.findall(r'\]\((?!https?:|#)([^)#]+)', README)
    paths += [w for b in blocks() for line in b for w in line.split() if w.startswith('nbs/')]
    assert len(paths) > 50
    for path in paths: assert (ROOT/path).is_file(), path
    assert '.ipynb' not in re.sub(r'(?ms)^```.*?^```|\]\([^)]*\)|`out.ipynb`|<!--.*?-->', '', README), 'a notebook without a link'


def test_every_dependency_has_its_reason():
    import configparser
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT/'settings.ini')
    listed = README.split('| package | reason |')[1]
    for key in ('requirements', 'eval_requirements', 'sdvae_requirements', 'onnx_requirements', 'dev_requirements'):
        for name in re.findall(r'[\w.-]+(?=[<>=\s]|$)', re.sub(r'[<>=]+[\d.,<>=]+', '', settings['DEFAULT'][key])):
            assert re.search(rf'\b{re.escape(name)}\b', listed), name
