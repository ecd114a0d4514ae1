# syntax=docker/dockerfile:1
#
# A Jetson's end of the link, for boards whose own Python is not to be touched: an sshd with what the agent needs, and
# nothing of `deploy` itself, which pushes the agent when it comes. docker/README.md.
#
#   docker build --file docker/jetson.Dockerfile --build-arg REGISTRY=HOST --build-arg JETPACK=6 --tag edge-board .
#   docker run --detach --runtime nvidia --network host --volume /run/lock:/run/lock \
#     --volume "$HOME/.ssh/authorized_keys:/etc/ssh/authorized_keys:ro" --volume edge-board-keys:/keys edge-board
#
# REGISTRY is the host of NVIDIA's container registry, as its catalogue (NGC) writes it before `/nvidia/l4t-tensorrt`.
# JETPACK is the first number of the board's own JetPack: its image brings TensorRT with its Python module, and the driver
# below is the host's. BASE takes another image in its place, for a version between: an engine runs under the version
# that built it. BASE=ubuntu:22.04 with RUNTIME=onnxruntime gives the processor.

ARG REGISTRY=registry-of-nvidia
ARG JETPACK=6
ARG BASE=jetpack${JETPACK}

# L4T 32.7, TensorRT 8.2, Ubuntu 18.04; the key of the package list that it comes with has expired
FROM ${REGISTRY}/nvidia/l4t-tensorrt:r8.2.1-runtime AS jetpack4
RUN rm -f /etc/apt/sources.list.d/cuda.list

# L4T 35, TensorRT 8.5, Ubuntu 20.04
FROM ${REGISTRY}/nvidia/l4t-tensorrt:r8.5.2-runtime AS jetpack5

# L4T 36.4 and later, TensorRT 10.3, Ubuntu 22.04; 36.2 and 36.3 want BASE=HOST/nvidia/l4t-tensorrt:r8.6.2-runtime
FROM ${REGISTRY}/nvidia/l4t-tensorrt:r10.3.0-runtime AS jetpack6

# L4T 38 and later, TensorRT 10.13, Ubuntu 24.04: from here on a Jetson takes the images of Arm servers
FROM ${REGISTRY}/nvidia/tensorrt:25.08-py3 AS jetpack7

# hadolint ignore=DL3006
FROM ${BASE}
ARG UID=1000
ARG RUNTIME=
# Ubuntu 24.04 lets pip install beside its own packages only where this is said; older ones do not know it
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# versions follow the base image; one of Ubuntu 24.04 has a user of its own, 'ubuntu', with the id 1000
# hadolint ignore=DL3008,DL3013,SC2086
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        openssh-server python3 python3-numpy python3-pip \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && if [ -n "${RUNTIME}" ]; then python3 -m pip install --no-cache-dir ${RUNTIME}; fi \
    && if taken="$(getent passwd "${UID}")"; then userdel --remove "${taken%%:*}"; fi \
    && useradd --uid "${UID}" --create-home --shell /bin/bash --password '*' deploy \
    && install --directory --owner=deploy --mode=0700 /keys
COPY --chmod=0644 docker/jetson.sshd_config /etc/ssh/sshd_config.board
USER ${UID}
VOLUME ["/keys"]
EXPOSE 2222
HEALTHCHECK --interval=1h --timeout=30s --start-period=10s --retries=1 CMD ["python3", "-c", "import numpy"]
# the host key is made once and lies in a volume, so that it stays the same; sshd needs no root for its own user
CMD ["/bin/sh", "-c", "[ -f /keys/host ] || ssh-keygen -q -t ed25519 -N '' -f /keys/host; exec /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config.board"]
