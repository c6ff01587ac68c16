"The table of claims against the chapters that it repeats"
import json
import re
from pathlib import Path

import pytest

from drift_rae.best_teacher import best_findings
from drift_rae.claims import CLAIMS, ablation_findings, all_findings, claims_table, scratch_findings
from drift_rae.ablations import stored
from drift_rae.metrics.verdicts import NO_POWER
from drift_rae.worlds.findings import Finding, condition, direction

NBS = Path(__file__).parents[1]/'nbs'
WORDS = {'reproduced', 'not reproduced', 'undecided at this scale', 'too few seeds', 'withdrawn', 'not run',
         'reproduced at one setting', 'not reproduced at one setting', 'depends on length and rate', 'depends on the judge',
         'depends on the posterior', NO_POWER,
         'holds', 'fails', 'holds under a condition'}


@pytest.fixture(scope='module')
def found(): return [*all_findings(), *best_findings()]


def tables(name):
    "All Markdown tables that a notebook has stored, as one text"
    outputs = [o for c in json.loads((NBS/name).read_text())['cells'] for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)


def verdict_lines(name):
    "Lines of the tables of verdicts of a chapter: claim, ..., difference, adjusted interval, seeds, p, found, chances, verdict without the letter of its note"
    lines = [[c.strip() for c in l.strip('| ').split(' | ')] for l in tables(name).splitlines()]
    lines = [[*l[:10], re.sub(r' \([a-h]\)$', '', l[10])] for l in lines if len(l) == 11]
    return [l for l in lines if ('better than' in l[0] or 'worse than' in l[0] or 'equal to' in l[0])]


@pytest.mark.parametrize('name, findings', [('08_ablations.ipynb', lambda: ablation_findings(stored()[0])),
                                            ('09_from_scratch.ipynb', scratch_findings)])
def test_verdicts_are_those_of_the_chapter(name, findings):
    shown = [(l[0], l[4], l[10]) for l in verdict_lines(name)]
    assert shown
    for f in findings():
        if f.word == 'withdrawn': continue
        difference = f.here.split('; ')[1]
        if name.startswith('09'): # shown there without decimals
            assert any((f.claim, f.word) == (claim, word) for claim, _, word in shown), f
        else:
            said, = {word for claim, d, word in shown if (claim, d) == (f.claim, difference)}
            assert f.word in (said, f'{said} at one setting', 'depends on length and rate', 'depends on the judge'), f
            assert f.p and f.power and f.best and f.epochs, f


def test_every_claim_of_the_paper_is_there(found):
    where = {f.where for f in found}
    wanted = {'Theorem 1 (1)', 'Theorem 1 (2)', 'Proposition 1', 'Figure 1', *(f'Table {n}' for n in (1, 2, 3, 4, 5, 6, 7, 9))}
    assert wanted <= where
    for table, claims in CLAIMS.items():
        assert {str(c) for c in claims} <= {f.claim for f in found if f.where == f'Table {table}'}
    assert {f.word for f in found} <= WORDS


def test_the_geometry_has_the_words_of_its_chapters(found):
    said = {'same direction': 'reproduced', 'different': 'not reproduced', 'not resolved': 'undecided at this scale'}
    rows = [[c.strip() for c in l.strip('| ').split(' | ')] for l in tables('worlds/03a_measure.ipynb').splitlines()]
    shown = {r[0]: r[1:] for r in rows if len(r) == 3 and r[1] in said}
    for f in (f for f in found if f.where in ('Table 1', 'Table 2')):
        sampled, mean = shown[f.claim.split()[-1]]
        word = said[sampled] if sampled == mean else 'depends on the posterior'
        assert (f.word, f.reads.split(': ')[1]) == (word, said[mean]), f
    figure, = (f for f in found if f.where == 'Figure 1')
    assert figure.here.split()[1] in tables('worlds/05e_curvature.ipynb')


def test_the_teacher_is_compared_at_its_best(found):
    full, best = [f for f in found if f.where == 'Table 4'][:2]
    teacher, student = (float(v) for v in full.here.split(';')[0].split(' / '))
    at_best, same = (float(v) for v in best.here.split(';')[0].split(' / '))
    assert at_best < teacher and same == student


def test_each_row_leads_to_a_section(found):
    for f in found:
        path, _, anchor = f.link.partition('#')
        headings = [l.lstrip('# ') for c in json.loads((NBS/path).read_text())['cells'] if c['cell_type'] == 'markdown'
                    for l in ''.join(c['source']).splitlines() if l.startswith('##')]
        made = {''.join(ch for ch in h.lower().replace(' ', '-') if ch.isalnum() or ch in '-_.') for h in headings}
        assert anchor in made, (f.link, sorted(made))


def test_a_table_row_has_its_own_bars_escaped():
    f = Finding('Theorem 1', '|V| falls', '0', '|V| = 1', 'fails', 'x.ipynb')
    line = claims_table([f]).data.splitlines()[2]
    assert line.count('|') == 10 and '[Theorem 1](x.ipynb)' in line


def test_words():
    assert condition(False, True) == 'fails'
    assert direction(-.2, -.1, False) == 'reproduced'
