# The demo's training alone, for compose.yaml: torch, numpy, and the trainer's side of gradwatch.
#   docker build -f docker/demo.Dockerfile -t gradwatch/demo:0.1.0 .
# torch comes from PyPI, whose build for Linux on x86-64 brings CUDA, some gigabytes. PIP_EXTRA chooses another:
#   --build-arg PIP_EXTRA=--index-url=ADDRESS-OF-PYTORCHS-CPU-BUILDS
ARG PYTHON=3.13-slim-bookworm
FROM python:${PYTHON} AS build
ARG PIP_EXTRA=
WORKDIR /src
RUN python -m venv --without-pip /opt/gradwatch \
 && python -m pip --python /opt/gradwatch/bin/python install --no-cache-dir --no-compile ${PIP_EXTRA} torch==2.13.0
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY agent agent
RUN python -m pip --python /opt/gradwatch/bin/python install --no-cache-dir --no-compile -c constraints.txt .

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="gradwatch demo" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/gradwatch /opt/gradwatch
ENV PATH=/opt/gradwatch/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "gradwatch.demo.train"]
CMD ["--steps=1200"]
