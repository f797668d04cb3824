# The image of cluster=kuberay, and of any other cluster that starts containers.
#   docker build -t crossover .                          CPU
#   docker build -t crossover --build-arg DEVICE=cuda .  NVIDIA: torch's general build brings CUDA
# With PIP_EXTRA_INDEX_URL set to PyTorch's CPU index (--build-arg) the CPU image is 2 GB smaller.
FROM python:3.11-slim-bookworm

ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL=
# Triton compiles what starts its kernels with a C compiler, when they are first run.
RUN apt-get update \
    && if [ "$DEVICE" = cuda ]; then compiler="gcc libc6-dev"; fi \
    && apt-get install --yes --no-install-recommends make procps ${compiler:-} \
    && rm -rf /var/lib/apt/lists/*

# Pods run as this user (cluster.kuberay.user_id): nobody's root.
RUN useradd --uid 1000 --create-home crossover && install -d -o crossover /app
USER crossover
WORKDIR /app

# What `make install` reads. Nothing else of the directory is in the build: see .dockerignore.
COPY --chown=crossover Makefile pyproject.toml constraints.txt README.md launch.py ./
COPY --chown=crossover conf conf
COPY --chown=crossover launch launch
COPY --chown=crossover training training
COPY --chown=crossover evaluation evaluation
COPY --chown=crossover kernels kernels
RUN if [ "$DEVICE" = cuda ]; then make install HAS_GPU=yes; else make install HAS_GPU=; fi

ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_DISABLE_TELEMETRY=1
CMD ["python", "launch.py"]
