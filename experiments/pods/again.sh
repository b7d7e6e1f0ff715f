#!/usr/bin/env bash
# Runs a config again as long as it ends because of what others do: preemption (75), a lost process (76, 134).
#   again.sh CONFIG [FLAGS…]
cd "$(dirname "$0")/../.." || exit 2
while true; do
  python3 -m uv run --extra tpu python -m experiments.run "$@"
  status=$?
  case $status in
    75 | 76 | 134) sleep 10 ;;
    *) exit $status ;;
  esac
done
