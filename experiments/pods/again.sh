#!/usr/bin/env bash
# Runs a config again, at most 100 times, while it ends for what others do: preemption (75), a lost process (76, 134).
#   experiments/pods/again.sh CONFIG [FLAGS…]
# --fresh holds for the first time alone: it deletes what a run has. SIGTERM to this script and to the run ends both.
cd "$(dirname "$0")/../.." || exit 2
trap 'exit 75' TERM
for ((tries = 1; tries <= 100; tries++)); do
  .venv/bin/python -m experiments.run "$@" # not by uv, which hands a second SIGTERM on
  status=$?
  case $status in
    75 | 76 | 134) ;;
    *) exit $status ;;
  esac
  flags=()
  for flag; do [[ $flag == --fresh ]] || flags+=("$flag"); done
  set -- "${flags[@]}"
  sleep 10
done
echo "again.sh: ended $status for the 100th time, no more tries" >&2
exit $status
