# The training pods: torch and the engine, without Kubeflow's SDK.
#   docker build -f docker/trainer.Dockerfile -t REGISTRY/canvastune/trainer:0.1.0 .
# For another index, a proxy's certificate or a CPU build of torch, see docker/README.md.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE_IMAGE} AS installed

# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build

# What changes least comes first: torch (gigabytes), the other dependencies, the code.
ARG TORCH=cuda
ARG TORCH_INDEX=
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/requirements-torch-${TORCH}.txt ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r requirements-torch-${TORCH}.txt
COPY docker/requirements-trainer.txt ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    pip install --no-cache-dir --no-deps -r requirements-trainer.txt
COPY pyproject.toml README.md LICENSE ./
COPY canvastune canvastune
# The command line needs Kubeflow's SDK; this image runs `torchrun -m canvastune.train`.
RUN pip install --no-cache-dir --no-deps --no-build-isolation --no-index . && pip check && rm /opt/venv/bin/canvastune

FROM installed AS sbom
ARG PIP_CONFIG_FILE=/run/secrets/pip
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca python3 -m venv /bom \
    && /bom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && /bom/bin/cyclonedx-py environment --output-file /sbom.cdx.json /opt/venv

FROM installed
# Triton builds its launcher of kernels with the C compiler and Python's headers.
ARG TORCH=cuda
# hadolint ignore=DL3008
RUN if [ "${TORCH}" = cuda ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*; fi
COPY --from=sbom /sbom.cdx.json /usr/share/sbom/canvastune.cdx.json
# Any user ID works, and a read-only root with a writable /tmp. PyTorch would replace some matrix
# products by Triton kernels that it compiles at first use.
ENV HOME=/tmp \
    USER=canvastune \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TORCH_DISABLE_NATIVE_JIT=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 10001:10001
CMD ["python", "-m", "canvastune.train", "--help"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="canvastune trainer" \
      org.opencontainers.image.description="Fine-tunes DiffusionGemma: torchrun -m canvastune.train" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
