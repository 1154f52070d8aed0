"""The program of the init containers `cluster-key` on Kubernetes, which run before a pod's role starts.

    python3 -m sllm.deploy.key_secret [--name cluster-key] [--namespace NAMESPACE]     the coordinator's: makes the key's Secret if it is missing
    python3 -m sllm.deploy.key_secret --wait-for=coordinator                           a worker's: waits until a coordinator answers

The first asks the API server to create the Secret and takes "already exists" for success, so it may run any number of times and a second run changes
nothing. That takes one permission, to create Secrets in one namespace; it can read none. No key is ever printed. The second needs no permission: a
coordinator that answers over HTTP has a key, so the Secret is there.
Exit status: 0 the Secret is there, 1 it could not be made, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import secrets
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from config import Config, ConfigError
from sllm.deploy.keys import FILE_NAME
from sllm.protocol.errors import UsageError
from sllm.wire.keys import KEY_BYTES

ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where every pod with a service account finds its token
TRY_FOR_S = 60.0  # a network policy or a name may need some seconds to take effect on a new pod
RETRY_S = 2.0
ANSWER_S = 10.0
LOOK_S = 0.5  # interval at which a waiting worker asks whether a coordinator answers
SAY_S = 15.0  # interval at which a waiting worker prints that it waits


class Refused(Exception):
    """The API server refused the request; asking again will not help."""


def manifest(name: str, namespace: str, key: bytes) -> dict[str, object]:
    """The Secret with a key file that has `key` as its only key."""
    text = f"1 {key.hex()}\n"
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "sllm"}},
        "type": "Opaque",
        "data": {FILE_NAME: base64.b64encode(text.encode()).decode()},
    }


def post(url: str, body: bytes, token: str, tls: ssl.SSLContext | None) -> int:
    """POST JSON; returns the HTTP status of any answer. Raises OSError if there is no answer."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S, context=tls) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def ensure(api_server: str, name: str, namespace: str, token: str, tls: ssl.SSLContext | None) -> bool:
    """Create the Secret unless it exists; returns whether it was created. OSError if the server does not answer or is busy, `Refused` if it refuses."""
    url = f"{api_server}/api/v1/namespaces/{namespace}/secrets"
    status = post(url, json.dumps(manifest(name, namespace, secrets.token_bytes(KEY_BYTES))).encode(), token, tls)
    if status == 201:
        return True
    if status == 409:
        return False
    if status in (401, 403, 404, 422):
        raise Refused(f"the API server answered {status} to creating Secret {name} in namespace {namespace}")
    raise OSError(f"the API server answered {status}")


def ensure_patiently(attempt: Callable[[], bool], *, try_for_s: float, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    """Repeat `attempt` while it raises OSError, for a limited time; then raise the error."""
    give_up_at = now() + try_for_s
    while True:
        try:
            return attempt()
        except OSError as error:
            if now() + RETRY_S > give_up_at:
                raise
            _say("warning", f"trying again: {error}")
            sleep(RETRY_S)


def await_answer(host: str, port: int, sleep: Callable[[float], None] = time.sleep) -> None:
    """Return as soon as `/livez` of this host answers 200, without a time limit."""
    looks = 0
    while not _answers(host, port):
        if looks % round(SAY_S / LOOK_S) == 0:
            _say("info", f"no key yet: waiting for the coordinator at {host}:{port}, which makes it")
        looks += 1
        sleep(LOOK_S)


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=LOOK_S)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _api_server(environ: Mapping[str, str]) -> str:
    """The URL of the API server for a pod. The URL has an address, which the server's certificate covers, so that no name must be looked up."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


def _say(level: str, message: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, "level": level, "message": message}), flush=True)


def _account(folder: Path, namespace: str) -> tuple[str, str]:
    """(token, namespace) of this pod's service account. UsageError outside a cluster."""
    try:
        token = (folder / "token").read_text(encoding="ascii").strip()
        return token, namespace or (folder / "namespace").read_text(encoding="ascii").strip()
    except OSError as error:
        raise UsageError(f"no service account at {folder}: {error.strerror}; this command is meant for a pod") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m sllm.deploy.key_secret", description="Makes the cluster key's Secret if it is missing.")
    parser.add_argument("--name", default="cluster-key", help="the Secret's name (default %(default)s)")
    parser.add_argument("--namespace", default="", help="its namespace (default: the pod's own)")
    parser.add_argument("--api-server", default=_api_server(os.environ), help="where the API server is (default %(default)s)")
    parser.add_argument("--account-dir", type=Path, default=ACCOUNT_DIR, help="folder with token, namespace and ca.crt (default %(default)s)")
    parser.add_argument("--try-for", type=float, default=TRY_FOR_S, metavar="S", help="seconds to go on trying while nobody answers (default %(default)s)")
    parser.add_argument("--wait-for", choices=("coordinator",), help="make nothing, but wait until COORDINATOR_HOST answers at HEALTH_PORT")
    arguments = parser.parse_args(argv)
    try:
        if arguments.wait_for:
            config = Config.from_env(os.environ)
            await_answer(config.coordinator_host, config.health_port)
            return 0
        token, namespace = _account(arguments.account_dir, arguments.namespace)
        tls = ssl.create_default_context(cafile=str(arguments.account_dir / "ca.crt")) if arguments.api_server.startswith("https:") else None
        made = ensure_patiently(
            lambda: ensure(arguments.api_server, arguments.name, namespace, token, tls),
            try_for_s=arguments.try_for, now=time.monotonic, sleep=time.sleep,
        )  # fmt: skip
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, Refused) as error:
        _say("error", f"no Secret made: {error}")
        return 1
    _say("info", f"Secret {arguments.name} in namespace {namespace}: {'made' if made else 'is there already'}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the first process of a container ignores signals without a handler
    sys.exit(main())
