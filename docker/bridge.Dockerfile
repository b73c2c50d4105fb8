# The bridge between MLflow, Alertmanager and Grafana. No torch, no compiler, no pip in what runs.
#   docker build -f docker/bridge.Dockerfile -t gradwatch/bridge:0.1.0 .
ARG PYTHON=3.13-slim-bookworm
FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY agent agent
# A venv without pip, filled by the builder's.
RUN python -m venv --without-pip /opt/gradwatch \
 && python -m pip --python /opt/gradwatch/bin/python install --no-cache-dir --no-compile -c constraints.txt '.[agent]'

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="gradwatch bridge" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/gradwatch /opt/gradwatch
ENV PATH=/opt/gradwatch/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
EXPOSE 9465
ENTRYPOINT ["gradwatch", "bridge"]
CMD ["--listen=0.0.0.0:9465"]
