"""``bentoml detectron serve``: starts a server for a saved model, without any code of the user's."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from bentoml_detectron.cli import options

if TYPE_CHECKING:
    from bentoml_detectron.engines import Precision
    from bentoml_detectron.service import Settings

_UNSAID = "ignore:::torch.jit._script,ignore:::torch.functional"
"""Warnings for those who write programs, as PYTHONWARNINGS has them: by whole names of modules."""


@click.command("serve")
@click.argument("tag")
@click.option("--host", default="127.0.0.1", show_default=True, help="IP address to listen on; 0.0.0.0 for all interfaces.")
@click.option("--port", default=3000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Number of worker processes.")
@click.option("--model-instances", type=click.IntRange(min=1), help="Model processes per worker; 1 or 2 by default.")
@options.device
@options.precision
@options.trust_remote_code
@options.trusted
@click.option("--max-queue", default=32, show_default=True, type=click.IntRange(min=1),
              help="Most waiting requests per worker.")  # fmt: skip
@click.option("--max-body-bytes", default=20 << 20, show_default=True, type=click.IntRange(min=1),
              help="Largest request body accepted.")  # fmt: skip
@options.max_image_pixels
@click.option("--request-seconds", default=60.0, show_default=True, type=click.FloatRange(min=0.1),
              help="Time limit for a request, in seconds.")  # fmt: skip
def command(
    tag: str,
    host: str,
    port: int,
    workers: int,
    model_instances: int | None,
    device: str,
    precision: Precision,
    trust_remote_code: bool,
    trusted: tuple[str, ...],
    max_queue: int,
    max_body_bytes: int,
    max_image_pixels: int,
    request_seconds: float,
) -> None:
    """Serve a saved model over HTTP, until SIGTERM or Ctrl-C.

    If the environment variable BENTOML_DETECTRON_TOKEN is set, requests must carry it: 'Authorization: Bearer TOKEN'.

    \b
    Example:
      bentoml detectron serve mask_rcnn:latest --port 3000
      curl -F image=@street.jpg http://127.0.0.1:3000/predict
    """
    from bentoml_detectron.store import check_code, check_precision, get

    model = get(tag)
    found = str(model.tag)  # all workers serve the version that is the latest now, also those that replace others
    host = _free(host, port)
    # These take seconds, and PyTorch warns, which is for no one-line error.
    check_code(model, trust_remote_code=trust_remote_code, trusted=trusted)
    if (precision, device) != ("fp32", "cpu"):
        check_precision(model, precision, device)
    from bentoml_detectron.service import Settings

    settings = Settings(
        device_id=device,
        precision=precision,
        model_instances=model_instances,
        max_body_bytes=max_body_bytes,
        max_image_pixels=max_image_pixels,
        max_queue=max_queue,
        request_seconds=request_seconds,
        trust_remote_code=trust_remote_code,
        trusted=trusted,
    )
    _become_server(found, host, port, workers, settings)


def _free(host: str, port: int) -> str:
    """The address as BentoML takes it.

    Raises:
        InvalidArgumentError: It is none, or in use.
    """
    from bentoml_detectron.errors import InvalidArgumentError

    host = "127.0.0.1" if host == "localhost" else host
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError as exc:
        raise InvalidArgumentError(f"--host is {host!r}; give an IP address of this machine", value=host) from exc
    with socket.socket(family) as each:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            each.bind((host, port))
        except OSError as exc:
            raise InvalidArgumentError(
                f"cannot listen on {host}, port {port} ({exc.strerror}); give another --host or --port", value=(host, port)
            ) from exc
    return host


def _become_server(tag: str, host: str, port: int, workers: int, settings: Settings) -> None:
    """Replaces this process by BentoML's own server, which gets its signals and gives its status."""
    from bentoml._internal.configuration import get_debug_mode

    from bentoml_detectron.service import SERVED_VARIABLE, TOKEN_VARIABLE

    is_local = host == "::1" or host.startswith("127.")
    if not is_local and not os.environ.get(TOKEN_VARIABLE):
        click.echo(f"note: anyone who can reach {host} can use this server; set {TOKEN_VARIABLE} to require a token", err=True)
    # The token stays in its own variable.
    fields = {name: value for name, value in asdict(settings).items() if name != "token"}
    os.environ[SERVED_VARIABLE] = json.dumps({"tag": tag, "workers": workers, "settings": fields})
    if not get_debug_mode():  # as in the other commands; what the user has set comes after it, and counts for more
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [_UNSAID, os.environ.get("PYTHONWARNINGS")]))
    # Without a limit, a client that does not take its answer would keep a worker that was told to end for a day.
    longest = str(int(settings.request_seconds) + 5)
    command = [
        sys.executable, "-m", "bentoml", "serve", "bentoml_detectron.service.served:service",
        "--host", host, "--port", str(port), "--timeout-graceful-shutdown", longest,
    ]  # fmt: skip
    os.execv(command[0], command)
