# MLflow with what a server of a team needs: PostgreSQL's driver, and S3's client for artifacts.
#   docker build -f docker/mlflow.Dockerfile -t gradwatch/mlflow:0.1.0 .
ARG PYTHON=3.13-slim-bookworm
FROM python:${PYTHON} AS build
RUN python -m venv --without-pip /opt/mlflow \
 && python -m pip --python /opt/mlflow/bin/python install --no-cache-dir --no-compile \
      mlflow==3.17.2 psycopg2-binary==2.9.13 boto3==1.35.49

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="MLflow for gradwatch" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/mlflow /opt/mlflow
ENV PATH=/opt/mlflow/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
EXPOSE 5000
ENTRYPOINT ["mlflow"]
CMD ["server", "--host=0.0.0.0", "--port=5000"]
