"""The command line and the exit status of the entry points."""

from __future__ import annotations

import argparse
import http.client
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from config import Config, ConfigError
from sllm import __version__
from sllm.observe import logs
from sllm.observe.report.standard import complain, occupy_closed_descriptors, silence
from sllm.protocol.errors import OutputError, UsageError

HEALTHCHECK_S = 3.0
_EXITS = "Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 an output could not be written, 130 or 143 after a second signal."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or version. argparse itself would ignore an error of stdout."""
        _print(message)


def launch(
    role: str, description: str, argv: Sequence[str], environ: Mapping[str, str], serve: Callable[[Config, Mapping[str, str]], int]
) -> int:
    """Read arguments and environment and `serve`; returns the exit status. Wrong usage: one line on stderr, status 2. An unexpected exception is logged
    with its stack, status 1. Closed standard streams are no error, unless an output was asked for on one of them (OutputError, status 3)."""
    occupy_closed_descriptors()
    try:
        arguments = _parse(role, description, argv)
        config = Config.from_env(environ)
        if arguments.print_config:
            _print("".join(f"{name}={value}\n" for name, value in config.describe().items()))
            return 0
        if arguments.healthcheck:
            return healthcheck(config, arguments.healthcheck)
        return serve(config, environ)
    except ConfigError as error:
        complain(f"{role}: {error}")
        return UsageError.status
    except UsageError as error:
        complain(f"{role}: {error}")
        return error.status
    except KeyboardInterrupt:
        return 130
    except Exception:
        logs.setup(environ.get("LOG_LEVEL", "info") if environ.get("LOG_LEVEL") in logs.LEVELS else "info", environ.get("LOG_FORMAT", "text"))
        logs.logger().exception("unexpected error")
        return 1


def _print(text: str) -> None:
    """Print an output that the user asked for to stdout. OutputError if stdout is closed or full."""
    if sys.stdout is None:
        raise OutputError("stdout: cannot write: it is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise OutputError(f"stdout: cannot write: {error.strerror}") from None


def _parse(role: str, description: str, argv: Sequence[str]) -> argparse.Namespace:
    variables = "\n".join(f"  {name:<26} {meaning}" for name, meaning in variables_of(role).items())
    parser = _Parser(
        prog=f"entrypoint_{role}.py", description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"It is configured by environment variables:\n{variables}\n\n{_EXITS}",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--print-config", action="store_true", help="print the effective configuration, which holds no secrets, and exit")
    parser.add_argument(
        "--healthcheck", nargs="?", const="livez", choices=("livez", "readyz"), metavar="livez|readyz",
        help="ask the process on this machine how it is and exit 0 or 1",
    )  # fmt: skip
    return parser.parse_args(argv)


# The variables a role goes by that are not of its own group in `config`. DEMO_MODELS may make the demonstration catalogue larger, for all alike.
_CATALOG = frozenset({"SEED", "MODEL_CATALOG", "MODELS", "DEMO_MODELS", "HARDWARE", "ENGINE_PROFILE", "LOADER", "ENGINE", "SERVICE_MEAN"})
_ALSO = {
    "coordinator": _CATALOG | {"REPORT_INTERVAL", "POLICY"},
    "worker": _CATALOG | {"ACK_EVERY", "REPORT_INTERVAL", "SERVICE", "SERVICE_LOAD", "SLOTS", "KEEP_ALIVE", "RETRY_INITIAL"},
    "client": _CATALOG | {
        "SLOTS", "WORKERS", "DURATION", "RATE", "ARRIVALS", "CV", "STAGES", "CONCURRENCY", "THINK", "LENGTHS", "MIX", "PRIORITIES", "SESSIONS", "TRACE",
        "MODEL_MAP", "TRACE_RATE", "TRACE_COLUMNS", "ZIPF", "DRAIN_TIMEOUT",
    },
}  # fmt: skip
_OUTPUTS = {"client": {"REQUESTS_CSV": "write one row for each request here"}}


def variables_of(role: str) -> dict[str, str]:
    """The environment variables of an entry point, with their meanings."""
    rules = [field.metadata for field in Config.__dataclass_fields__.values()]
    mine = {rule["env"]: rule["meaning"] for rule in rules if rule["group"] in ("common", role) or rule["env"] in _ALSO[role]}
    return mine | _OUTPUTS.get(role, {})


def healthcheck(config: Config, path: str) -> int:
    """Ask the HTTP server of this host whether the process is ready or alive; 0 if it answers yes."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(config.bind_host, config.bind_host)
    if config.health_port == 0:
        complain("HEALTH_PORT=0: there is nothing to ask")
        return 1
    connection = http.client.HTTPConnection(host, config.health_port, timeout=HEALTHCHECK_S)
    try:
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        text = answer.read(200).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        complain(f"no answer from {host}:{config.health_port}: {error}")
        return 1
    finally:
        connection.close()
    if sys.stdout is not None:
        print(text)  # for people; programs use the exit status
    return 0 if answer.status == 200 else 1
