"One torch thread per process, here and in every program that a test starts: see `core.limit_threads`"
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
import torch
torch.set_num_threads(1)
