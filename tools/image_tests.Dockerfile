# An image with what its tests need, of which no user has a need: `make test-images`.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
USER 0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PACKAGES
# hadolint ignore=DL3013,SC2086
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca pip install --no-cache-dir ${PACKAGES}
USER 10001:10001
