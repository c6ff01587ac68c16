"""Every line of wrong_inputs.txt: none is accepted in silence, none late, and raw errors are at most one in fifty.

`python tests/test_wrong_inputs.py` prints what is not as wanted, and the counts."""
import collections, contextlib, io, os, sys, tempfile, warnings
import pytest
import wrong

PARTS = 8 # of the table, so that several workers share it
LONG = {'start', 'start_flow', 'start_stage1', 'export_onnx', 'load_generator', 'load_rae', 'launch'} # seconds a line
LINES = list(wrong.lines())

def judged(line):
    "What became of a line: right, silent, raw, late or refused; and the message"
    number, target, expression, wanted = line
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        word, message = wrong.outcome(expression, folder)
    if word == wanted: return 'right', message
    if wanted == 'accepted': return 'refused', message
    return ('silent' if word == 'accepted' else word), message

def check(lines, most_raw):
    wrong_ones = [(n, word, expression, message) for n, target, expression, wanted in lines
                  for word, message in [judged((n, target, expression, wanted))] if word != 'right']
    raw = [w for w in wrong_ones if w[1] == 'raw']
    assert [w for w in wrong_ones if w[1] != 'raw'] == []
    assert len(raw) <= most_raw, raw

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True) # if it was imported before, by another test

@pytest.mark.parametrize('part', range(PARTS))
def test_wrong_inputs_are_refused(part):
    lines = [l for l in LINES if l[1] not in LONG][part::PARTS]
    check(lines, len(lines)//50)

@pytest.mark.slow
@pytest.mark.parametrize('target', sorted(LONG))
def test_wrong_inputs_of_programs_and_files_are_refused(target): check([l for l in LINES if l[1] == target], 0)

def test_the_table_is_large(): assert len(LINES) > 300 and len({l[2] for l in LINES}) == len(LINES)

if __name__ == '__main__':
    os.environ['HF_HUB_OFFLINE'] = '1'
    count = collections.Counter()
    for line in LINES:
        word, message = judged(line)
        count[word] += 1
        if word != 'right': print(line[0], word, line[2], '|', message[:200])
    print(dict(count))
