# gptailor's dashboard and engines in one container; docs/deploy.md says how to run it.
FROM python:3.11-slim

# tini reaps engines whose server has ended; curl asks for health.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home gptailor \
    && mkdir -p /data/runs /models \
    && chown -R gptailor /data

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .

USER gptailor
ENV GPTAILOR_RUNS=/data/runs \
    HF_HOME=/data/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /data
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD curl --fail --silent http://localhost:8501/_stcore/health
ENTRYPOINT ["tini", "--"]
CMD ["streamlit", "run", "streamlit_app.py", "--server.address", "0.0.0.0", "--server.headless", "true"]
