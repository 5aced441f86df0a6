"""MLflow's server as it should stand: a real database, artefacts in one place, a password, known hosts.

Settings are variables; secrets are files, so that neither `ps` nor an inspection of the container shows one.

    DATABASE    postgresql+pg8000://mlflow@127.0.0.1:5432/mlflow      its password: the secret postgres_password
    ARTEFACTS   s3://mlflow (made if it is absent), or a folder       keys: s3_access_key, s3_secret_key
    HOSTS       the names by which browsers and clients may ask, e.g. mlflow:5000,mlflow.example.org
    BIND, PORT  127.0.0.1, 5000
    SECRETS     the folder of the secrets, /run/secrets; it must also hold admin_password and session_key
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit


def secret(name: str) -> str:
    path = Path(os.environ.get("SECRETS", "/run/secrets"), name)
    text = path.read_text().strip() if path.is_file() else ""
    if not text:
        sys.exit(f"error NO_SECRET: {path} is absent or empty; deploy/tracking/secrets.sh makes it")
    return text


def database() -> str:
    """The address of the database with its password, for the environment of this process alone."""
    url = urlsplit(os.environ["DATABASE"])
    if url.password is not None:
        sys.exit("error SECRET_IN_URL: DATABASE holds a password; put it into the secret postgres_password")
    return url._replace(
        netloc=f"{url.username}:{secret('postgres_password')}@{url.hostname}:{url.port or 5432}"
    ).geturl()


def bucket(name: str) -> None:
    """Make the bucket, unless it is there."""
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client("s3")
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.create_bucket(Bucket=name)


def main() -> None:
    artefacts, url = os.environ["ARTEFACTS"], database()
    if artefacts.startswith("s3://"):
        os.environ |= {
            "AWS_ACCESS_KEY_ID": secret("s3_access_key"),
            "AWS_SECRET_ACCESS_KEY": secret("s3_secret_key"),
        }
        os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
        bucket(urlsplit(artefacts).netloc)
    rules = Path(tempfile.mkdtemp(prefix="mlflow-"), "auth.ini")  # 0700
    lines = ["[mlflow]", "default_permission = READ", "admin_username = admin"]
    # A password is checked by a slow hash: without this, every single request costs most of a second of CPU.
    lines += ["auth_cache_ttl_seconds = 300", f"database_uri = {url.replace('%', '%%')}"]
    rules.write_text("\n".join(lines) + "\n")
    os.environ |= {
        "MLFLOW_BACKEND_STORE_URI": url,
        "MLFLOW_AUTH_CONFIG_PATH": str(rules),
        "MLFLOW_AUTH_ADMIN_PASSWORD": secret("admin_password"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret("session_key"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    words = ["-m", "mlflow", "server", "--app-name", "basic-auth", "--artifacts-destination", artefacts]
    words += ["--host", os.environ.get("BIND", "127.0.0.1"), "--port", os.environ.get("PORT", "5000")]
    words += ["--workers", os.environ.get("WORKERS", "4"), "--allowed-hosts", os.environ["HOSTS"]]
    # A worker takes longer than uvicorn's 5 s to start on a busy machine, and would be started again and again.
    words += ["--uvicorn-opts", "--timeout-worker-healthcheck 120"]
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main()
