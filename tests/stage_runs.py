"What `test_stages.py` runs in several processes: they import it from here"
from drift_rae.flow import FlowConfig
from drift_rae.imagenet.stage1 import Stage1Config, run_stage1
from drift_rae.imagenet.stage2 import run_flow

DECODER, TEACHER = Stage1Config.preset('tiny', steps=16, batch=8), FlowConfig(steps=6, batch=8, at_once=2)

def both(folder, resume='auto'):
    "A short training of each stage into `folder`; the teacher's latents are in `folder`/latents"
    rows = run_stage1('tiny', DECODER, f'{folder}/decoder', resume=resume, every=12)
    losses = run_flow('tiny', TEACHER, f'{folder}/teacher', latents=f'{folder}/latents', monitor_every=6, samples=20, resume=resume, every=4)
    return rows, losses
