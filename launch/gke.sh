#!/usr/bin/env bash
# TPU slices on Google Kubernetes Engine, as JobSets made by xpk.
#
#   launch/gke.sh image                          build and push IMAGE
#   launch/gke.sh create                         the cluster, with its node pools
#   launch/gke.sh storage                        mount BUCKET as /bucket in what is run from now on
#   launch/gke.sh run MODULE [ARGUMENT ...]      python -m MODULE on every host, e.g. wsparse.doctor
#   launch/gke.sh sweep [ARGUMENT ...]           WORKERS independent workers of wsparse.prune
#   launch/gke.sh status | stop | delete         what there is; end NAME; end the cluster, and its costs
#
# CLUSTER ZONE TYPE of the cluster, e.g. sparse europe-west4-b v5litepod-16
# NAME              of the workload (default wsparse)
# PROJECT           Google Cloud project
# IMAGE             e.g. europe-docker.pkg.dev/PROJECT/REPOSITORY/wsparse
# BUCKET            give --workdir=/bucket/NAME to what is run
# SLICES            how many slices (default 1)
# SPOT              1 for spot capacity (default 1)
# RESTARTS          how often a preempted workload of run begins again (default 100)
# WORKERS           of a sweep (default 8), each with CHIPS (default 4) of TOPOLOGY (default 2x2) and
#                   ACCELERATOR (default tpu-v5-lite-podslice): a slice of its own, as TYPE=v5litepod-4 makes
# STORAGE           of a sweep: the URL of its database, which workers are given as a secret
# SERVICE_ACCOUNT   of Kubernetes, for the workers of a sweep (default default)

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
[[ $# -ge 1 ]] || usage
verb=$1
shift

need PROJECT "the Google Cloud project"
name=${NAME:-wsparse}

cluster() {
  need CLUSTER "the name of the cluster"
  need ZONE "where the TPU type is offered: https://cloud.google.com/tpu/docs/regions-zones"
  have xpk "pip install xpk"
  where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
}

create() {
  cluster
  need TYPE "of the accelerator, e.g. v5litepod-16"
  local capacity=--on-demand
  if [[ ${SPOT:-1} == 1 ]]; then capacity=--spot; fi
  run xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" "$capacity" \
    --enable-workload-identity --enable-gcsfuse-csi-driver
}

storage() {
  cluster
  need BUCKET "that all hosts read and write"
  run xpk storage attach "$name-bucket" "${where[@]}" --type=gcsfuse --bucket="${BUCKET#gs://}" \
    --mount-point=/bucket --readonly=false --auto-mount=true \
    --mount-options=implicit-dirs,rename-dir-limit=1000000,metadata-cache:ttl-secs:0
}

image() {
  need IMAGE "to build, e.g. europe-docker.pkg.dev/$PROJECT/images/wsparse"
  have docker "https://docs.docker.com/engine/install"
  run docker build --platform=linux/amd64 --file="$here/Dockerfile" --tag="$IMAGE" "$here/.."
  run docker push "$IMAGE"
}

# A worker that was told to stop leaves with 128 + the signal, which xpk restarts; a mistake of the
# user's leaves with 2, which it does not.
workload() {
  cluster
  need TYPE "of the accelerator, e.g. v5litepod-16"
  need IMAGE "that launch/gke.sh image has pushed"
  [[ $# -ge 1 ]] || usage
  run xpk workload create "${where[@]}" --workload="$name" --tpu-type="$TYPE" \
    --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --max-restarts="${RESTARTS:-100}" \
    --termination-grace-period-seconds=180 --command="python -m $(quoted "$@")"
}

# A word as a YAML string.
yaml() {
  local word=${1//\\/\\\\}
  printf '"%s"' "${word//\"/\\\"}"
}

# Workers need nothing from each other, so each is a Job of its own on a slice of one host. One that loses
# its machine begins again; a mistake of the user's, which leaves with 2, ends the sweep.
sweep() {
  need IMAGE "that launch/gke.sh image has pushed"
  need BUCKET "that all workers read and write"
  need STORAGE "the URL of the sweep's database, e.g. postgresql://USER:PASSWORD@HOST/sweeps"
  have kubectl "gcloud components install kubectl"
  local arguments='' word manifest secret
  for word in "$@"; do
    arguments+=", $(yaml "$word")"
  done
  manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "$name-sweep")
spec:
  failurePolicy:
    maxRestarts: 0
  replicatedJobs:
  - name: worker
    replicas: ${WORKERS:-8}
    template:
      spec:
        backoffLimit: 6
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: prune
              operator: In
              values: [2]
          - action: Ignore
            onPodConditions:
            - type: DisruptionTarget
              status: \"True\"
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: \"true\"
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 60
            serviceAccountName: $(yaml "${SERVICE_ACCOUNT:-default}")
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(yaml "${ACCELERATOR:-tpu-v5-lite-podslice}")
              cloud.google.com/gke-tpu-topology: $(yaml "${TOPOLOGY:-2x2}")
            containers:
            - name: prune
              image: $(yaml "$IMAGE")
              command: [\"python\", \"-m\", \"wsparse.prune\"$arguments, \"--storage=\$(STORAGE)\"]
              env:
              - name: STORAGE
                valueFrom:
                  secretKeyRef:
                    name: $(yaml "$name-sweep")
                    key: url
              resources:
                limits:
                  google.com/tpu: ${CHIPS:-4}
              volumeMounts:
              - name: bucket
                mountPath: /bucket
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $(yaml "${BUCKET#gs://}")
                  mountOptions: implicit-dirs,rename-dir-limit=1000000,metadata-cache:ttl-secs:0"
  secret="apiVersion: v1
kind: Secret
metadata:
  name: $(yaml "$name-sweep")
stringData:
  url: $(yaml "$STORAGE")"
  printf '%s\n' "$manifest"
  run kubectl apply --filename=- <<<"$secret"$'\n---\n'"$manifest"
}

status() {
  cluster
  run xpk workload list "${where[@]}"
}

stop() {
  cluster
  run xpk workload delete "${where[@]}" --workload="$name" --force
}

delete() {
  cluster
  run xpk cluster delete "${where[@]}" --force
}

case $verb in
  image | create | storage | sweep | status | stop | delete) "$verb" "$@" ;;
  run) workload "$@" ;;
  *) usage ;;
esac
