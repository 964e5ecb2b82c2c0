#!/bin/bash
# Several stages of a run, each a Slurm job that waits for the one before it.
#
#     slurm/chain.sh s0 s1 s2 config=demo name=mine
#     slurm/chain.sh s0 s1 config=demo name=mine -- --partition=gpu --nodes=2
#
# Words with = go to every stage, the others are stages in their order, options behind -- go to sbatch. Nothing is
# skipped: a job of a stage that is done ends at once. When one is refused, those before it are cancelled.
set -u

script=$(dirname -- "${BASH_SOURCE[0]}")/stage.sbatch
stages=()
keys=()
name=""
config=""
while [ $# -gt 0 ]; do
  case $1 in
    --)
      shift
      break
      ;;
    -*)
      echo "$1 stands before --; options of sbatch come behind it: slurm/chain.sh s0 s1 -- $1" >&2
      exit 2
      ;;
    name=*)
      name=${1#name=}
      keys+=("$1")
      ;;
    config=*)
      config=${1#config=}
      keys+=("$1")
      ;;
    *=*) keys+=("$1") ;;
    *) stages+=("$1") ;;
  esac
  shift
done
options=("$@")

if [ ${#stages[@]} -eq 0 ]; then
  echo "usage: slurm/chain.sh <stage> ... [key=value ...] [-- <options of sbatch>]" >&2
  echo "such as: slurm/chain.sh s0 s1 s2 config=demo name=mine -- --partition=gpu" >&2
  exit 2
fi

# Without name= the run is called what the file of config= says. A mistake in a key is said here, and not hours later.
if [ -z "$name" ] && [ -n "$config" ]; then
  name=$(python - "${keys[@]}" <<'END'
import sys

from tdro_hpc.config.load import load_config

try:
    print(load_config(sys.argv[1:]).config.name)
except ValueError as mistakes:
    sys.exit(str(mistakes))
END
  ) || exit 2
fi
name=${name:-default}

jobs=()
for stage in "${stages[@]}"; do
  command=(sbatch --parsable "--job-name=tdro-$name-$stage")
  after=""
  if [ ${#jobs[@]} -gt 0 ]; then
    after=${jobs[-1]}
    # Without the second option a job whose predecessor failed would wait for ever.
    command+=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
  fi
  command+=(${options[@]+"${options[@]}"} "$script" "$stage" ${keys[@]+"${keys[@]}"})
  # Its words, if it refuses, go to the terminal. Sites with several clusters answer <job>;<cluster>.
  if ! job=$("${command[@]}"); then
    echo "$stage was not submitted. The command was:" >&2
    printf ' %q' "${command[@]}" >&2
    echo >&2
    if [ ${#jobs[@]} -gt 0 ]; then
      scancel "${jobs[@]}"
      echo "The jobs before it are cancelled: ${jobs[*]}" >&2
    fi
    exit 2
  fi
  jobs+=("${job%%;*}")
  echo "$stage  job ${jobs[-1]}${after:+  after $after}"
done

list=$(IFS=,; echo "${jobs[*]}")
echo
echo "look    squeue --jobs=$list"
echo "        python -m tdro_hpc.submit status name=$name"
echo "cancel  scancel ${jobs[*]}"
