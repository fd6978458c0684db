#!/usr/bin/env bash
# A run on SLURM, one process a GPU; the run folder must be on a file system that all nodes share.
#   sbatch --nodes 4 docs/how-to/slurm.sh configs/llama3-8b-8gpu.toml --mesh.pipe 4
#SBATCH --job-name=trellax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time is up every process is told: trellax saves and exits with 0.
#SBATCH --signal=TERM@180
set -uo pipefail

srun trellax train "$@" --run.folder "${RUNS:-$PWD/runs}" --json > "trellax-$SLURM_JOB_ID.json"
code=$?

# Told to stop before its end, or a process was lost (75): the same job again, from its newest save. srun's code is the
# highest of all tasks, so where a process was killed it is that one's (above 128); what kills every time ends at last.
if [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 40 ]; } ||
  { [ "$code" -eq 0 ] && ! grep -q '"ended": "done"' "trellax-$SLURM_JOB_ID.json"; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
