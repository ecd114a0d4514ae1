# syntax=docker/dockerfile:1
#
# The x86-64 host: `deploy` with the CPU build of torch, for building on it and for nightly checks. docker/README.md.
#
#   docker build --file docker/build.Dockerfile --tag edge-deploy .
#
# TORCH and TORCH_INDEX choose the build of torch, as TORCH does for make: TORCH alone takes what pip's own index has,
# which on x86-64 brings CUDA along; with TORCH=torch==2.13.0+cpu and PyTorch's index of CPU builds it stays small.
# PACKAGES: what your project's own code imports, e.g. "scikit-learn pillow".

FROM python:3.11.14-slim-bookworm AS install
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG PACKAGES=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and alone, as in the Makefile; it is a layer of its own, which a change of the code does not make anew
RUN python -m venv /opt/edge-deploy \
    && /opt/edge-deploy/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY profiles profiles
COPY targets targets
COPY pipeline pipeline
# hadolint ignore=SC2086
RUN /opt/edge-deploy/bin/pip install "${TORCH}" . ${PACKAGES} ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
    && /opt/edge-deploy/bin/pip check

FROM python:3.11.14-slim-bookworm
ARG UID=1000
LABEL org.opencontainers.image.title="edge-deploy" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=install /opt/edge-deploy /opt/edge-deploy
COPY --chmod=0755 docker/nightly.sh /usr/local/bin/nightly.sh
# The volumes take over owner and mode of these folders when they are made.
RUN useradd --uid "${UID}" --create-home deploy \
    && install --directory --owner=deploy /work /work/.deploy /work/runs
ENV PATH=/opt/edge-deploy/bin:$PATH \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER ${UID}
WORKDIR /work
VOLUME ["/work/.deploy", "/work/runs"]
# Once an hour, since it costs a second of CPU time; compose.yaml switches it off where something is measured.
HEALTHCHECK --interval=1h --timeout=60s --start-period=60s --retries=1 CMD ["deploy", "--version"]
CMD ["deploy", "--help"]
