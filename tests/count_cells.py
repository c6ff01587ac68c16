"Lengths of cells and lines of the notebooks: `python tests/count_cells.py [FOLDER]`"
import json
import re
import sys
from pathlib import Path


def count(folder):
    "Median and 90th percentile of lines per code cell, all and exported; lines over 100 characters"
    every, exported, long = [], [], 0
    for path in sorted(Path(folder).rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        for cell in json.loads(path.read_text())['cells']:
            if cell['cell_type'] != 'code': continue
            source = ''.join(cell['source'])
            lines = source.splitlines()
            long += sum(len(l) > 100 for l in lines)
            every.append(len(lines))
            if re.search(r'^#\| *export', source, re.M): exported.append(len(lines))
    return every, exported, long


def middle(lengths, share):
    "The number that this share of the lengths does not exceed"
    return sorted(lengths)[min(len(lengths) - 1, int(share*len(lengths)))]


if __name__ == '__main__':
    every, exported, long = count(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]/'nbs')
    for name, lengths in (('all code cells', every), ('exported cells', exported)):
        print(f'{name}: {len(lengths)}, median {middle(lengths, .5)}, 90 % {middle(lengths, .9)} lines')
    print(f'lines over 100 characters: {long}')
