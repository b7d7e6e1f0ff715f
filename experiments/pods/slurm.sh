#!/usr/bin/env bash
# A config on GPU nodes: sbatch slurm.sh CONFIG [FLAGS…]
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun --kill-on-bad-exit=0 python3 -m uv run --extra cuda python -m experiments.run "$@" --distributed
status=$?
if [ $status -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
