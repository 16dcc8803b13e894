# MLflow's tracking server with what the chart can enable: basic-auth, PostgreSQL, S3.
#   docker build -f docker/mlflow.Dockerfile -t REGISTRY/canvastune/mlflow:3.17.2 .
# For another index or a proxy's certificate, see docker/README.md.
ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE} AS installed

# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || { apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build

ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
COPY docker/requirements-mlflow.txt ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    pip install --no-cache-dir --no-deps -r requirements-mlflow.txt && pip check

FROM installed AS sbom
ARG PIP_CONFIG_FILE=/run/secrets/pip
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca python3 -m venv /bom \
    && /bom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && /bom/bin/cyclonedx-py environment --output-file /sbom.cdx.json /opt/venv

FROM installed
COPY --from=sbom /sbom.cdx.json /usr/share/sbom/canvastune.cdx.json
# Any user ID works, and a read-only root with a writable /tmp; the server's arguments set where SQLite and artifacts are stored.
ENV HOME=/tmp \
    USER=canvastune \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 5000
# Kubernetes uses the chart's probes instead. The first start takes about 25 seconds.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--backend-store-uri", "sqlite:////tmp/mlflow.db"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="canvastune mlflow" \
      org.opencontainers.image.description="MLflow's tracking server with basic-auth, PostgreSQL and S3" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
