#!/usr/bin/env bash
# What launch/tpu_vm.sh setup runs on each host: packages, and the bucket as a folder.
#
#   launch/tpu_host.sh [gs://BUCKET]

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bucket=${1:-}

python3 -m pip install -q --user uv
uv=$HOME/.local/bin/uv
[[ -x .venv/bin/python ]] || "$uv" venv -q --python 3.11 .venv
"$uv" pip install -q --python .venv/bin/python -e '.[tpu]'

[[ -n $bucket ]] || exit 0
if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
fi
mkdir -p bucket
# Checkpoints are folders that are renamed when they are whole, and hosts must see each other's files at once.
mountpoint -q bucket ||
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 "${bucket#gs://}" bucket
