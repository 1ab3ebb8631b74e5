"""The page's server: Gradio's upload, queue and progress, and a route that hands out pictures, on one local address."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cyclegan_fast import comparison as compare
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.demo.limits import Limits
from cyclegan_fast.inference.demo.markup import LABELS, comparison, introduction, message
from cyclegan_fast.inference.demo.workbench import Workbench, directions
from cyclegan_fast.inference.translate import Translator

__all__ = ["bound_socket", "build_app", "is_loopback", "require_gradio", "serve"]

logger = logging.getLogger("cyclegan_fast.demo")

# The browser itself refuses whatever is not from this page's own address.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_WAITING = 16  # photographs in the queue, beyond which the page asks to try again later


def require_gradio() -> Any:
    """The package gradio, told to be quiet before it is imported. Raises InputError where it is missing."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f'the demo page needs packages that are not installed ({error}): pip install "cyclegan_fast[demo]"'
        ) from error
    return gradio


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises InputError when the address cannot be had."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is not allowed: from 0, which is any free one, to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot serve on {host} port {port}: {reason}; choose another --port or --host") from error


def serve(translator: Translator, listening: socket.socket, *, host: str, name: str, limits: Limits) -> None:
    """Serve the page until SIGINT or SIGTERM, and remove its temporary folder then.

    The translation under way is waited for. Raises KeyboardInterrupt after SIGINT, SystemExit after SIGTERM.
    """
    gradio = require_gradio()
    import uvicorn

    port = listening.getsockname()[1]
    shown_host = f"[{host}]" if ":" in host else host
    if not is_loopback(host):
        logger.warning(
            "warning: %s is not only this machine: whoever reaches port %d can translate pictures here", host, port
        )
    with _own_folder() as folder:
        bench = Workbench(translator, folder, limits)
        app = build_app(gradio, bench, directions(translator), name=name, local=is_loopback(host))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
        print(f"http://{shown_host}:{port}/   (Ctrl-C ends it)", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            bench.close()


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder for uploads and results that is removed also after SIGTERM."""

    def stop(signum: int, frame: object) -> None:  # noqa: ARG001
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="cyclegan_fast_demo_") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, previous)


def build_app(gradio: Any, bench: Workbench, available: list[str], *, name: str, local: bool) -> Any:
    """The ASGI application: pictures by token, everything else Gradio's; answers to local names only if ``local``."""
    from fastapi import FastAPI, Response
    from fastapi.responses import FileResponse, PlainTextResponse

    os.environ["GRADIO_TEMP_DIR"] = str(bench.uploads)
    app = FastAPI(openapi_url=None)

    @app.get("/picture/{token}/{picture}")
    def picture(token: str, picture: str) -> Response:
        found = bench.file(token, picture)
        if found is None:
            return PlainTextResponse("this picture is no longer here: translate it again", 404)
        path, download = found
        headers = {"cache-control": "no-store"}
        if picture == "result":
            return FileResponse(path, filename=download, headers=headers)
        return FileResponse(path, headers=headers)

    # Gradio's own answers 404, an error in the browser's console, once a file has arrived, which locally is at once.
    @app.get("/gradio_api/upload_progress")
    def upload_progress() -> Response:
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    page = _page(gradio, bench, available, introduction(name, bench.limits, local=local))
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=bench.limits.upload,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=[compare.CSS],
        head=f"<script>{compare.JS.read_text(encoding='utf-8')}</script>",
    )
    return _Guard(app, local)


def _page(gradio: Any, bench: Workbench, available: list[str], heading: str) -> Any:
    """The Gradio page: one file, a direction, and what came of it; what is dropped is translated at once."""

    def translate(upload: str | None, direction: str, progress: Any = gradio.Progress()) -> str:  # noqa: B008
        if upload is None:  # the direction was chosen before a photograph
            return ""
        try:
            return comparison(bench.translate(upload, direction, lambda share, words: progress(share, desc=words)))
        except InputError as error:
            return message(str(error))
        except Exception:
            logger.exception("a translation failed")
            return message("The translation failed for a reason that the terminal of this program shows.")

    with gradio.Blocks(analytics_enabled=False, title="cyclegan_fast", delete_cache=(600, 3600)) as page:
        gradio.HTML(heading)
        upload = gradio.File(label="Photograph", file_types=None, height=140)
        direction = gradio.Radio(
            [(LABELS[value], value) for value in available],
            value=available[0],
            label="Direction",
            visible=len(available) > 1,
        )
        outcome = gradio.HTML(min_height=100)
        chosen = gradio.State(None)
        # The drop area empties itself, so that the next photograph can be dropped on it at once.
        taken = upload.upload(
            lambda path: (path, None),
            upload,
            [chosen, upload],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        how: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "translation", "api_visibility": "private"}
        taken.then(translate, [chosen, direction], outcome, **how)
        direction.input(translate, [chosen, direction], outcome, trigger_mode="always_last", **how)
    page.queue(max_size=_WAITING)
    return page


class _Guard:
    """ASGI: the headers that keep the page to itself, and no answer to names that other sites gave this machine.

    A site may let its own name point to 127.0.0.1 and so have its scripts talk to local servers (DNS rebinding).
    """

    def __init__(self, app: Any, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self.local and not _names_this_machine(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page answers to its local address only"})
            return

        async def send_guarded(event: dict[str, Any]) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event.get("headers", []), *_HEADERS.items()]
            await send(event)

        await self.app(scope, receive, send_guarded)


def _names_this_machine(scope: dict[str, Any]) -> bool:
    host = next((value for key, value in scope["headers"] if key == b"host"), b"").decode("latin-1")
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
