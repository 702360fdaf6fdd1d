# The companion with its environment, for two cores or for NVIDIA GPUs. Models, data and results stay outside, in the folder at /runs.
#
#   docker build -t medvlthinker .
#   docker run --rm -v "$PWD/_runs:/runs" medvlthinker smoke
#
# For NVIDIA GPUs, with vLLM, verl and Ray (10 GB); the driver is the host's:
#
#   docker build -t medvlthinker:gpu --build-arg SETUP=gpu .
#   docker run --rm --gpus all --ipc host -v "$PWD/_runs:/runs" medvlthinker:gpu mini
#
# BASE takes another Debian or Ubuntu image with Python 3.11 or 3.12, such as one that has CUDA's compiler.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG SETUP=cpu

# git names the commit in each record; vLLM and torch.compile need a C compiler
RUN apt-get update && apt-get install -y --no-install-recommends git gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 companion && mkdir -p /app /runs && chown companion /app /runs && git config --system --add safe.directory /app
USER companion
WORKDIR /app

# what the environment is made from comes first: an edited notebook does not install it anew
COPY --chown=companion reproduce.sh pyproject.toml settings.ini README.md LICENSE ./
COPY --chown=companion locks locks
COPY --chown=companion medvlthinker medvlthinker
RUN ./reproduce.sh setup ${SETUP}
COPY --chown=companion . .

ENV MEDVLTHINKER_HOME=/runs HF_HOME=/runs/hub NVIDIA_DRIVER_CAPABILITIES=compute,utility
# by its whole path: Apptainer starts in the folder of the caller
ENTRYPOINT ["/app/reproduce.sh"]
CMD ["--help"]
