#!/bin/sh
# Build a target of the Dockerfile and push it, where there is neither docker nor root: in moby/buildkit:rootless.
#
#   sh .ci/build_image.sh ci NAME:TAG       the image of the jobs
#   sh .ci/build_image.sh serve NAME:TAG    the service with models/$MODEL_TAG in it; release.env has set MODEL_*
#
# Writes image.env (IMAGE=NAME@sha256:…) for later jobs. Signs in by RELEASE_TOKEN, which a Maintainer has made and which
# may push protected tags; where a job does not see it, by CI_REGISTRY_USER and CI_REGISTRY_PASSWORD.
set -eu
target=$1 name=$2

DOCKER_CONFIG=$(mktemp -d)
export DOCKER_CONFIG
trap 'rm -rf "$DOCKER_CONFIG"' EXIT
user=${CI_REGISTRY_USER:-} password=${CI_REGISTRY_PASSWORD:-}
if [ -n "${RELEASE_TOKEN:-}" ]; then
  # GitLab takes any user name beside a token. A line break that was pasted along would spoil it.
  user=release-token password=$(printf %s "$RELEASE_TOKEN" | tr -d '[:space:]')
fi
if [ -n "$password" ]; then
  auth=$(printf '%s:%s' "$user" "$password" | base64 | tr -d '\n')
  (umask 077 && printf '{"auths": {"%s": {"auth": "%s"}}}' "$CI_REGISTRY" "$auth" > "$DOCKER_CONFIG/config.json")
fi

# The registry of a GitLab behind a private authority mostly has a certificate of the same one.
if [ -r "${CI_SERVER_TLS_CA_FILE:-}" ]; then
  cat "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$CI_SERVER_TLS_CA_FILE" > "$DOCKER_CONFIG/ca.pem"
  export SSL_CERT_FILE="$DOCKER_CONFIG/ca.pem"
fi

# A cache lies beside the image, so that a build on another runner repeats only what has changed. Merge requests have one
# of their own, which nothing else reads; production has none.
case $target in
  ci)
    protected=${name%:*}:cache-protected own=$protected
    set -- --opt "build-arg:TORCH_INDEX=${TORCH_INDEX:-}" --import-cache "type=registry,ref=$protected"
    if [ -n "${CI_MERGE_REQUEST_IID:-}" ]; then
      own=${name%:*}:cache-merge-requests
      set -- "$@" --import-cache "type=registry,ref=$own"
    fi
    set -- "$@" --export-cache "type=registry,ref=$own,mode=max,ignore-error=true" ;;
  serve)
    set -- --opt "build-arg:MODEL_TAG=$MODEL_TAG" --opt "build-arg:MODEL_SHA256=$MODEL_SHA256" \
           --opt "build-arg:DATA_HASH=$DATA_HASH" --opt "build-arg:REVISION=$CI_COMMIT_SHA" \
           --opt "build-arg:CREATED=$CI_COMMIT_TIMESTAMP" ;;
  *)
    echo "error: $target is no target of the Dockerfile. Give ci or serve." >&2; exit 2 ;;
esac

buildctl-daemonless.sh build --frontend dockerfile.v0 --local context=. --local dockerfile=. \
  --opt "target=$target" "$@" \
  --output "type=image,name=$name,push=true,rewrite-timestamp=true" --metadata-file image.json

digest=$(sed -n 's/.*"containerimage\.digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' image.json)
[ -n "$digest" ] || { echo "error: image.json names no digest, so nothing can be deployed by it." >&2; exit 1; }
printf 'IMAGE=%s@%s\n' "${name%:*}" "$digest" > image.env
echo "$name@$digest"
