#!/usr/bin/env bash
# A config on GPU nodes, from the root of the checkout: sbatch experiments/pods/slurm.sh CONFIG [FLAGS…]
# Back into the queue, at most 100 times, when it ends for preemption (75) or a lost process (76, 134). --fresh holds for
# the first time alone: it deletes what a run has.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts > 0)); then
  flags=()
  for flag; do [[ $flag == --fresh ]] || flags+=("$flag"); done
  set -- "${flags[@]}"
fi
srun --kill-on-bad-exit=0 .venv/bin/python -m experiments.run "$@" --distributed
status=$? # the highest of all processes'
case $status in
  75 | 76 | 134) if ((restarts < 100)); then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit $status
