# Image of the gateway and the sandbox exchanges. .dockerignore excludes tests, settings and
# secrets.
FROM python:3.13.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
COPY requirements.txt /build/
RUN /opt/venv/bin/pip install --quiet --no-deps --requirement /build/requirements.txt
COPY config.py maintenance.py /app/
COPY src /app/src
# Unchecked bytecode: the file system is read-only, and file times may change when layers are
# copied.
RUN /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /app

FROM python:3.13.12-slim-bookworm
ARG VERSION=dev
LABEL org.opencontainers.image.title="virtuoso" \
      org.opencontainers.image.description="A self-hosted gateway to crypto market data" \
      org.opencontainers.image.version="${VERSION}"
# Docker may set a proxy in every container. The health check must not use it.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NO_PROXY=localhost,127.0.0.1 no_proxy=localhost,127.0.0.1
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "__import__('urllib.request').request.urlopen('http://127.0.0.1:8000/health/live',timeout=3)"]
# Keep-alive is longer than the edge's 60 s, so that the edge never uses a closing connection.
# TRUSTED_PROXIES decides which X-Forwarded-For headers are trusted; uvicorn's own proxy handling is
# off. On shutdown, open requests get 10 s to finish. Clients of /ws send small messages and are
# disconnected if they answer no ping. WebSocket compression is off: it costs memory and CPU per
# client, and an update is framed once for all clients.
CMD ["uvicorn", "src.api:app", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", \
     "--no-server-header", "--no-proxy-headers", "--timeout-keep-alive", "75", \
     "--timeout-graceful-shutdown", "10", "--ws-max-size", "65536", "--ws-ping-interval", "20", \
     "--ws-ping-timeout", "20", "--ws-per-message-deflate", "false"]
