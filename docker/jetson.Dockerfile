# syntax=docker/dockerfile:1
#
# A Jetson's end of the link, for boards whose own Python is not to be touched: an sshd with what the agent needs, and
# nothing of `deploy` itself, which pushes the agent when it comes. docker/README.md.
#
#   docker build --file docker/jetson.Dockerfile --build-arg BASE=IMAGE --tag edge-board .
#   docker run --detach --runtime nvidia --network host --volume /run/lock:/run/lock \
#     --volume "$HOME/.ssh/authorized_keys:/etc/ssh/authorized_keys:ro" --volume edge-board-keys:/keys edge-board
#
# BASE is the image of the board's own L4T that has TensorRT with its Python module; an engine runs under the version
# that built it, and the driver below is the host's. Without one, RUNTIME=onnxruntime gives the processor.

ARG BASE=ubuntu:22.04
# hadolint ignore=DL3006
FROM ${BASE}
ARG UID=1000
ARG RUNTIME=
# versions follow the base image, which is pinned by whoever builds
# hadolint ignore=DL3008,DL3013,SC2086
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        openssh-server python3 python3-numpy python3-pip \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && if [ -n "${RUNTIME}" ]; then python3 -m pip install --no-cache-dir ${RUNTIME}; fi \
    && useradd --uid "${UID}" --create-home --shell /bin/bash --password '*' deploy \
    && install --directory --owner=deploy --mode=0700 /keys
COPY --chmod=0644 docker/jetson.sshd_config /etc/ssh/sshd_config.board
USER ${UID}
VOLUME ["/keys"]
EXPOSE 2222
HEALTHCHECK --interval=1h --timeout=30s --start-period=10s --retries=1 CMD ["python3", "-c", "import numpy"]
# the host key is made once and lies in a volume, so that it stays the same; sshd needs no root for its own user
CMD ["/bin/sh", "-c", "[ -f /keys/host ] || ssh-keygen -q -t ed25519 -N '' -f /keys/host; exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config.board"]
