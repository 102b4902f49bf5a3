"""How much of a request is read, and for how long it is worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.errors import error_response
from serve_app.errors import AudioTooLarge
from serve_app.settings import MiB

T = TypeVar("T")

# The other fields of the form and the boundaries between its parts.
FORM_ALLOWANCE = 1 * MiB


def upload_too_large(max_upload_bytes: int) -> AudioTooLarge:
    return AudioTooLarge(f"The upload is larger than {max_upload_bytes / MiB:g} MiB.", param="file")


class BodyLimit:
    """Refuses a body above the cap: at once where Content-Length tells, else when the cap is passed while reading."""

    def __init__(self, app: ASGIApp, *, max_upload_bytes: int):
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        cap = self.max_upload_bytes + FORM_ALLOWANCE
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > cap:
            await error_response(upload_too_large(self.max_upload_bytes))(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > cap:
                raise upload_too_large(self.max_upload_bytes)
            return message

        await self.app(scope, counted_receive, send)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; cancels it, and raises ClientDisconnect, when the client leaves first.

    The body must have been read to its end: from then on ``receive`` has nothing to tell but that.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        departure.result()
        raise ClientDisconnect
    finally:
        for each in (task, departure):
            each.cancel()
        await asyncio.gather(task, departure, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
