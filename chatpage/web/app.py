"""The web application: one Starlette object that tests, Spaces and other hosts run alike."""

import mimetypes
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from chatpage.engine import Engine
from chatpage.settings import Settings
from chatpage.web import errors, kv, metrics, openai
from chatpage.web.limits import BodyLimit, Guard

HERE = Path(__file__).resolve().parent
PANEL_FOLDERS = (HERE.parents[1] / "static", HERE.parent / "static")  # in a checkout, in a wheel

# How many seconds a thread may run Python while another one waits to. The event loop has to wait anew after each write
# to a socket: with Python's own 5 ms, a busy engine would let one piece of one answer be sent in that time.
SWITCH_SECONDS = 0.0005

mimetypes.add_type("text/javascript", ".js")  # some machines say otherwise, and browsers then refuse modules


def create_app(engine: Engine, settings: Settings, *, page: bool = True) -> Starlette:
    """All routes, the engine's life, and (with `page`) Gradio at "/" for whatever is left.

    Each group of ours is mounted below its own prefix, so that a wrong path or method there is answered by us: Gradio,
    which takes every path, would take those too.
    """
    hub = kv.Hub(engine, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sys.setswitchinterval(SWITCH_SECONDS)
        hub.start()
        engine.start()
        try:
            yield
        finally:
            hub.stop()
            await anyio.to_thread.run_sync(engine.stop)

    app = Starlette(
        routes=_routes(engine, hub, settings),
        middleware=[
            # With no origin allowed. Gradio, which reflects any origin otherwise, leaves CORS to it.
            Middleware(CORSMiddleware),
            Middleware(Guard, settings=settings),
            Middleware(BodyLimit),
        ],
        exception_handlers=errors.HANDLERS,
        lifespan=lifespan,
    )
    if page:
        from chatpage.web.page import mount_page  # late: Gradio takes seconds to import

        mount_page(app, engine, settings)
    return app


def _routes(engine: Engine, hub: kv.Hub, settings: Settings) -> list[BaseRoute]:
    operations = metrics.Operations(engine, hub, settings).routes()
    return [
        Mount("/v1", routes=openai.Api(engine, settings).routes()),
        Mount("/kv", routes=kv.Routes(engine, hub).routes()),
        Route("/panel", _to_panel),
        Mount("/panel", StaticFiles(directory=_panel_folder(), html=True)),
        *operations,
        *(Route(route.path, _refuse_method, methods=["POST", "PUT", "PATCH", "DELETE"]) for route in operations),
    ]


def _panel_folder() -> Path:
    return next((folder for folder in PANEL_FOLDERS if (folder / "panel.js").is_file()), PANEL_FOLDERS[0])


async def _to_panel(request: Request) -> Response:
    return RedirectResponse("panel/")


async def _refuse_method(request: Request) -> Response:
    raise errors.Refusal(405, f"{request.method} is not allowed at {request.url.path}.", headers={"Allow": "GET, HEAD"})
