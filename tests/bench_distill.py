"How long a step of the distillation takes: `drift_rae bench` under its old name; --help lists the options"
from drift_rae.commands.bench import bench
from drift_rae.engine.command import run_command

if __name__ == '__main__': run_command(bench, prog='bench_distill.py')
