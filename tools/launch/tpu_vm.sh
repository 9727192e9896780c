#!/usr/bin/env bash
# Sets a TPU VM up, and trains on it; the same commands go to all hosts of a slice, which find each
# other. Images for v6e and older bring Python 3.10, so that setup brings its own.
#
#   name=morer1 zone=us-west4-a
#   gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
#       --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite
#   gcloud compute tpus queued-resources describe "$name" --zone="$zone"    # until it is ACTIVE
#
#   # To all hosts: this commit, unpacked into ~/morer1, and what it needs. May be repeated.
#   git archive --output=morer1.tar.gz HEAD
#   gcloud compute tpus tpu-vm scp morer1.tar.gz "$name": --zone="$zone" --worker=all
#   gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command='
#       mkdir -p morer1 && tar -xzf morer1.tar.gz -C morer1 && morer1/tools/launch/tpu_vm.sh setup'
#
#   # It trains in the background, and outlives this connection.
#   gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command='
#       morer1/tools/launch/tpu_vm.sh start --config=configs/qwen2_5_vl_3b_sft.py:v5e:4x4 \
#           --workdir=gs://BUCKET/runs/3b --config.data.folder=gs://BUCKET/MORE \
#           --config.model.path=gs://BUCKET/Qwen2.5-VL-3B-Instruct'
#   gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command='
#       tail -f .morer1/train.log'
#   gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command='
#       morer1/tools/launch/tpu_vm.sh status'
#
#   # It saves and ends. The same start goes on from there.
#   gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command='
#       morer1/tools/launch/tpu_vm.sh stop'
#
# --workdir must be where all hosts can write: in a bucket, or in a folder that they share, such as
# Filestore's. On one host any folder will do. For a bucket the VMs' service account needs the role
# Storage Object User on it; `create --service-account=…` names another than the project's default.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/../.." && pwd)
here=${MORER1_HOME:-$HOME/.morer1}
venv=$here/venv
# One version, so that all hosts have the same.
python=${MORER1_PYTHON:-3.12}
extra=${MORER1_EXTRA:-tpu}
# Restarts after which a human should look, whatever ended the run.
most=${MORER1_RESTARTS:-50}
pause=${MORER1_PAUSE:-10}

usage() {
  echo "usage: tpu_vm.sh setup [FOLDER or WHEEL] | start FLAGS of morer1_jax.train | status | stop" >&2
  exit 2
}

# Makes a virtual environment and installs a checkout, by default this script's, or a wheel.
setup() {
  local source=${1:-$checkout}
  local old='import sys; sys.exit(sys.version_info < (3, 11))'
  mkdir -p "$here"
  # uv brings a Python where the machine's own is too old; nothing of the machine's is changed.
  PATH=$here/uv/bin:$PATH
  command -v uv > /dev/null || python3 -m pip install --quiet --target "$here/uv" uv
  # A venv that an interrupted setup has left may be broken.
  if ! "$venv/bin/python" -c "$old" 2> /dev/null; then
    rm -rf "$venv"
    uv venv --quiet --python "$python" "$venv"
  fi
  if [ -d "$source" ]; then
    uv pip install --quiet --python "$venv/bin/python" --editable "${source}[$extra,gcs]"
  else
    # A wheel of other code may have the same version.
    uv pip install --quiet --python "$venv/bin/python" --reinstall-package morer1-jax \
      "${source}[$extra,gcs]"
  fi
  "$venv/bin/python" -c 'import jax, morer1_jax; print("jax", jax.__version__)'
}

# Trains, and starts again where the run can go on.
train() {
  local code restarts=0
  cd "$checkout"
  while true; do
    code=0
    "$venv/bin/python" -m morer1_jax.train "$@" &
    echo $! > "$here/trainer.pid"
    wait $! || code=$?
    case $code in
      # Stopped by SIGTERM and saved; another process died.
      75 | 3) ;;
      # Ended by a signal.
      134 | 135 | 137 | 139 | 143) ;;
      # Done, or an error that would come again: 2 is the user's to correct.
      *) break ;;
    esac
    if [ -e "$here/stop" ] || [ "$restarts" -ge "$most" ]; then break; fi
    restarts=$((restarts + 1))
    echo "code $code: restart $restarts in $pause s"
    sleep "$pause"
    if [ -e "$here/stop" ]; then break; fi
  done
  echo "ended with code $code"
  return "$code"
}

start() {
  [ -x "$venv/bin/python" ] || { echo "no $venv; run tpu_vm.sh setup first" >&2; exit 2; }
  # The lock ends with the loop and the trainer, however they end.
  if ! flock --nonblock "$here/lock" true; then
    echo "another start still trains here; run tpu_vm.sh stop first" >&2
    exit 2
  fi
  rm -f "$here/stop"
  # Neither the end of this shell nor of its connection ends it.
  # A `status` that is given now has the lock for a moment.
  setsid nohup flock --timeout 10 "$here/lock" "$checkout/tools/launch/tpu_vm.sh" train "$@" \
    >> "$here/train.log" 2>&1 < /dev/null &
  echo "training in the background; its output goes to $here/train.log"
}

# Says whether it trains here, and the last lines of its output.
status() {
  if [ ! -e "$here/lock" ] || flock --nonblock "$here/lock" true; then
    echo "nothing trains here"
  else
    echo "it trains here"
  fi
  if [ -e "$here/train.log" ]; then tail -n 3 "$here/train.log"; fi
}

stop() {
  # First, so that the loop sees it.
  touch "$here/stop"
  if flock --nonblock "$here/lock" true; then
    echo "nothing trains here"
  else
    # Between two trainers there is none to tell.
    kill -TERM "$(cat "$here/trainer.pid")" 2> /dev/null || true
    echo "told to save and to end; $here/train.log says when it has"
  fi
}

[ $# -gt 0 ] || usage
case $1 in
  setup | start | status | train | stop) "$@" ;;
  *) usage ;;
esac
