"""Serves the page, on the loopback interface unless asked otherwise; it loads nothing from elsewhere."""

import os
import socket
from collections.abc import Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridle.demo.page import build
from bridle.demo.session import Session
from bridle.demo.views import asset
from bridle.errors import UserError
from bridle.utils.http import is_loopback

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Gradio's own scripts are inline; none comes from another host, and nothing is sent to one."""


class ContentSecurityPolicy:
    """Adds `POLICY` to every response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)


def application(session: Session, host: str) -> FastAPI:
    """The page as a web application; on the loopback interface it answers to this machine's names only."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(ContentSecurityPolicy)
    if is_loopback(host):  # a page elsewhere that rebinds its name to 127.0.0.1 must not ask for texts
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])
    return gr.mount_gradio_app(
        app,
        build(session),
        path="/",
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        theme=_theme(),
        css=asset("demo.css"),
        head=f"<script>{asset('demo.js')}</script>",
    )


def serve(session: Session, host: str, port: int, show: Callable[[str], None]) -> None:
    """Serves until a signal arrives.

    Args:
        session: what is shown.
        host: an address or name of this machine.
        port: 0 for a free one.
        show: called with the page's address when it answers.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error  # else a name's, which is text
        raise UserError(f"--host {host} --port {port}: {reason}; name another") from error
    name = f"[{host}]" if ":" in host else host
    server = uvicorn.Server(uvicorn.Config(application(session, host), log_level="warning"))
    show(f"http://{name}:{listener.getsockname()[1]}/")
    with listener:
        server.run(sockets=[listener])


def _theme() -> gr.themes.Base:
    """Gradio's own with the reader's fonts, and a button dark enough for its white text."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    filled = dict.fromkeys(("button_primary_background_fill", "button_primary_background_fill_dark"), "*primary_700")
    return gr.themes.Default(primary_hue="blue", **fonts).set(**filled)
