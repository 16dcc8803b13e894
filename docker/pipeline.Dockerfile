# The pipeline's steps and the launcher of training jobs: torch for the CPU, the engine, Kubeflow's and Kubernetes' clients.
#   docker build -f docker/pipeline.Dockerfile -t REGISTRY/canvastune/pipeline:0.1.0 .
# For steps on a GPU (evaluate):   --build-arg BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04 --build-arg TORCH=cuda --build-arg TORCH_INDEX=
# For another index, a proxy's certificate or a CPU build of torch, see docker/README.md.
ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE} AS installed

# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build

# What changes least comes first: torch (gigabytes), the other dependencies, the code.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/requirements-torch-${TORCH}.txt ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r requirements-torch-${TORCH}.txt
COPY docker/requirements-pipeline.txt ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    pip install --no-cache-dir --no-deps -r requirements-pipeline.txt
COPY pyproject.toml README.md LICENSE ./
COPY canvastune canvastune
COPY components components
COPY pipelines pipelines
RUN pip install --no-cache-dir --no-deps --no-build-isolation --no-index . && pip check

FROM installed AS sbom
ARG PIP_CONFIG_FILE=/run/secrets/pip
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca python3 -m venv /bom \
    && /bom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && /bom/bin/cyclonedx-py environment --output-file /sbom.cdx.json /opt/venv

FROM installed
# Triton builds its launcher of kernels with the C compiler and Python's headers.
ARG TORCH=cpu
# hadolint ignore=DL3008
RUN if [ "${TORCH}" = cuda ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*; fi
COPY --from=sbom /sbom.cdx.json /usr/share/sbom/canvastune.cdx.json
# Any user ID works, and a read-only root with a writable /tmp. Weights from the Hub are stored on the workspace, where the
# training pods look for them too. PyTorch would replace some matrix products by Triton kernels that it compiles at first use.
ENV HOME=/tmp \
    USER=canvastune \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/workspace/huggingface \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TORCH_DISABLE_NATIVE_JIT=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 10001:10001
CMD ["canvastune", "--help"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="canvastune pipeline" \
      org.opencontainers.image.description="The steps of Canvastune's pipeline, and its command line" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
