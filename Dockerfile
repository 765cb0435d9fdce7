# The gateway and the sandbox exchanges. No tests, no settings and no secrets are in it: see .dockerignore.
FROM python:3.13.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
COPY requirements.txt /build/
RUN /opt/venv/bin/pip install --quiet --no-deps --requirement /build/requirements.txt
COPY config.py maintenance.py /app/
COPY src /app/src
# Bytecode that is never held against its source: the file system is read-only and dates may change on the way.
RUN /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /app

FROM python:3.13.12-slim-bookworm
ARG VERSION=dev
LABEL org.opencontainers.image.title="virtuoso" \
      org.opencontainers.image.description="A self-hosted gateway to crypto market data" \
      org.opencontainers.image.version="${VERSION}"
# Docker may give every container a proxy, which has no business between a container and itself.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NO_PROXY=localhost,127.0.0.1 \
    no_proxy=localhost,127.0.0.1
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
WORKDIR /app
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "__import__('urllib.request').request.urlopen('http://127.0.0.1:8000/health/live',timeout=3)"]
# Idle connections are kept longer than the edge keeps them (60 s), so that it never sends into a closing one. Whose
# client an address is, TRUSTED_PROXIES decides, not the server. A stop waits 10 s for answers that have begun. Clients of
# /ws send little, and one that answers no ping is gone. What they get is not compressed: that would cost memory and time
# for each of them, and an update is framed once for all.
CMD ["uvicorn", "src.api:app", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", "--no-server-header", \
     "--no-proxy-headers", "--timeout-keep-alive", "75", "--timeout-graceful-shutdown", "10", "--ws-max-size", "65536", \
     "--ws-ping-interval", "20", "--ws-ping-timeout", "20", "--ws-per-message-deflate", "false"]
