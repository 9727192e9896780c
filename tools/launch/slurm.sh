#!/usr/bin/env bash
# Trains on hosts with GPUs under Slurm, one process on each, and queues the job again where the run
# can go on. On the login node, in the checkout, with its virtual environment in .venv:
#
#   sbatch --nodes=2 tools/launch/slurm.sh --config=configs/qwen2_5_vl_7b_grpo.py:h100:8 \
#       --workdir=/shared/runs/7b --config.data.folder=/shared/MORE
#
# The checkout and .venv must be on a file system that all hosts share, and --workdir too, unless it
# is in a bucket: --workdir=gs://BUCKET/runs/7b needs the extra gcs in .venv, and credentials on all
# hosts, such as a file that GOOGLE_APPLICATION_CREDENTIALS names.
# `scancel --signal=TERM JOB` saves and queues again, `scancel JOB` ends for good.
#
#SBATCH --job-name=morer1
#SBATCH --nodes=2
# One process a host, which has all GPUs of the host.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
# SIGTERM 180 s before the limit of time, to the processes and not to this script (that would be
# B:TERM): enough for the rest of a step and a checkpoint.
#SBATCH --signal=TERM@180
#SBATCH --requeue
# A requeued job has the same number and goes on in the same log.
#SBATCH --output=morer1-%j.log
#SBATCH --open-mode=append
set -uo pipefail

# Requeueings after which a human should look, whatever ended the run.
most=${MORER1_RESTARTS:-50}
python=${MORER1_PYTHON:-$PWD/.venv/bin/python}
# srun does not take the job's --cpus-per-task over by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# A process that fails ends all others, with its own code, which srun must not cut short: 75 means
# that all have saved. What still runs a minute after the first end is killed.
srun --kill-on-bad-exit=0 --wait=60 "$python" -m morer1_jax.train "$@"
code=$?

case $code in
  # Stopped by SIGTERM and saved; another process died.
  75 | 3) ;;
  # A process was ended by a signal, as by a host that fails: the highest code is srun's own.
  134 | 135 | 137 | 139 | 143) ;;
  # Done, or an error that would come again: 2 is the user's to correct.
  *) exit "$code" ;;
esac
# A job that is cancelled, or over its limit of time, is no longer running.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" != RUNNING ]; then
  echo "code $code in a job that is ${state:-unknown}: not queued again" >&2
  exit "$code"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
  echo "code $code after $most restarts: not queued again" >&2
  exit "$code"
fi
echo "code $code: queued again; the same command goes on from what is saved" >&2
scontrol requeue "$SLURM_JOB_ID" || exit "$code"
