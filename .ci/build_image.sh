#!/bin/sh
# Build a target of the Dockerfile and push it, where there is neither docker nor root: in moby/buildkit:rootless.
#
#   sh .ci/build_image.sh ci NAME:TAG       the image of the jobs
#   sh .ci/build_image.sh serve NAME:TAG    the service with models/$MODEL_TAG in it; release.env has set MODEL_*
#
# Writes image.env (IMAGE=NAME@sha256:…) for later jobs. Signs in by CI_REGISTRY_USER and CI_REGISTRY_PASSWORD.
set -eu
target=$1 name=$2

DOCKER_CONFIG=$(mktemp -d)
export DOCKER_CONFIG
trap 'rm -rf "$DOCKER_CONFIG"' EXIT
if [ -n "${CI_REGISTRY_PASSWORD:-}" ]; then
  auth=$(printf '%s:%s' "$CI_REGISTRY_USER" "$CI_REGISTRY_PASSWORD" | base64 | tr -d '\n')
  (umask 077 && printf '{"auths": {"%s": {"auth": "%s"}}}' "$CI_REGISTRY" "$auth" > "$DOCKER_CONFIG/config.json")
fi

case $target in
  ci)
    set -- --opt "build-arg:TORCH_INDEX=${TORCH_INDEX:-}" ;;
  serve)
    set -- --opt "build-arg:MODEL_TAG=$MODEL_TAG" --opt "build-arg:MODEL_SHA256=$MODEL_SHA256" \
           --opt "build-arg:DATA_HASH=$DATA_HASH" --opt "build-arg:REVISION=$CI_COMMIT_SHA" \
           --opt "build-arg:CREATED=$CI_COMMIT_TIMESTAMP" ;;
  *)
    echo "error: $target is no target of the Dockerfile. Give ci or serve." >&2; exit 2 ;;
esac

# The cache lies beside the image, so a build on another runner repeats only what has changed.
cache="${name%:*}:cache-$target"
buildctl-daemonless.sh build --frontend dockerfile.v0 --local context=. --local dockerfile=. \
  --opt "target=$target" "$@" \
  --import-cache "type=registry,ref=$cache" --export-cache "type=registry,ref=$cache,mode=max,ignore-error=true" \
  --output "type=image,name=$name,push=true,rewrite-timestamp=true" --metadata-file image.json

digest=$(sed -n 's/.*"containerimage\.digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' image.json)
[ -n "$digest" ] || { echo "error: image.json names no digest, so nothing can be deployed by it." >&2; exit 1; }
printf 'IMAGE=%s@%s\n' "${name%:*}" "$digest" > image.env
echo "$name@$digest"
