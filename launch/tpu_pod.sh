#!/usr/bin/env bash
# Train one run on all hosts of a TPU pod slice. Each host needs this project in
# ~/l2t_jax, with its environment (pip install "jax[tpu]"):
#   launch/tpu_pod.sh NAME ZONE --config=configs/X.py --workdir=DIR ...
# DIR must be shared by all hosts, such as a bucket mounted by gcsfuse.
# Create the slice with the Cloud TPU API, which has no TPUs newer than v6e:
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE \
#     --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite
# Written from Google Cloud's manual; it has not been run on a TPU.
set -euo pipefail
name=${1:?usage: launch/tpu_pod.sh NAME ZONE --config=... --workdir=...}
zone=${2:?the zone of the TPU}
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd l2t_jax && .venv/bin/python train.py --distributed $(printf '%q ' "$@")"
